"""The judgement store: every answer of a judge that reads, and every call that was paid for.

One SQLite file, in WAL mode, for any number of processes of one machine. A verdict is kept per
(reader, clause text, prompt, response); a reader is a judge with model, parameters and template. So
equal pairs are asked once, and editing a clause asks for that clause alone. The raw reply, tokens
and price of every attempt stay in `calls`.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from trace_jax import metrics, records
from trace_jax import policy as policies
from trace_jax.errors import InputError
from trace_jax.judges import store_file

_MANY = 400  # parameters of one SELECT; SQLite allows at least 999
_IS_READER = "(judge, model, parameters, template) = (?, ?, ?, ?)"


class Reader(NamedTuple):
    """Who answered: any change here is another reader, with answers of its own.

    parameters: canonical JSON. template: hash of the question's text without clauses and item.
    """

    judge: str
    model: str
    parameters: str
    template: str


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One attempt at a question: what came of it, and what it cost.

    Attributes:
      outcome: "ok", or what went wrong in a word or two, such as "http 429" or "malformed".
      cached_tokens: those of the input tokens that the service had in its cache.
      price: US dollars.
      rationale: the judge's own words, if it gave any.
    """

    outcome: str
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    price: float = 0.0
    rationale: str = ""
    raw: str = ""


KEPT = Call("kept")  # no attempt: another process had asked, and kept the answer


class Answer(NamedTuple):
    """A stored verdict on one clause, with what its call said and took."""

    verdict: records.ClauseVerdict
    rationale: str
    date: str
    tokens: int
    call: int


@dataclasses.dataclass(frozen=True)
class Spent:
    """Attempts, tokens and US dollars so far."""

    calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    price: float = 0.0


def item_hash(prompt: records.Text, response: records.Text) -> bytes:
    """Of the exact content."""
    canonical = json.dumps([prompt, response], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).digest()[:16]


class Store:
    """An open judgement store; ":memory:" keeps nothing. read_only: nothing can be added.

    Raises:
      InputError: the file is no store, of another version, or cannot be written.
    """

    def __init__(self, path: records.AnyPath, *, read_only: bool = False):
        self.path = str(path)
        connect = store_file.connect_to_read if read_only else store_file.connect
        with self._mended():
            self._db = connect(self.path)
            self._opened = self._db.execute("PRAGMA data_version").fetchall()
        self._ids: dict[tuple[str, object], int] = {}  # rows that are there, by table and key

    def close(self) -> None:
        """Closes the file; the store is done with."""
        self._db.close()

    def find(
        self,
        reader: Reader,
        clauses: Sequence[policies.Clause],
        items: Iterable[bytes],
    ) -> dict[bytes, dict[str, Answer]]:
        """Stored answers on these clauses: item hash -> clause id -> answer; errors among them."""
        names = self._clause_names(clauses)
        row = self._select(f"SELECT id FROM readers WHERE {_IS_READER}", reader)
        found: dict[bytes, dict[str, Answer]] = {}
        if not row or not names:
            return found
        marks = ",".join("?" * len(names))
        for part in _parts(list(dict.fromkeys(items)), _MANY):
            rows = self._select(
                "SELECT items.hash, clause, status, probability, sum, rationale, date, "
                "input_tokens + output_tokens, call FROM items "
                "JOIN verdicts ON verdicts.item = items.id JOIN calls ON calls.id = call "
                f"WHERE verdicts.reader = ? AND clause IN ({marks}) "
                f"AND items.hash IN ({','.join('?' * len(part))})",
                (row[0][0], *names, *part),
            )
            for item, clause, status, probability, total, *rest in rows:
                if total != store_file.checksum(item, row[0][0], clause, status, probability):
                    self._damaged("verdict")
                    continue
                verdict = records.ClauseVerdict(status, probability)
                found.setdefault(item, {})[names[clause]] = Answer(verdict, *rest)
        return found

    def words(self, clauses: Sequence[policies.Clause], items: Iterable[bytes]) -> dict[bytes, str]:
        """Item hash -> what readers said of it when they judged these clauses, line by line."""
        names = self._clause_names(clauses)
        marks = ",".join("?" * len(names))
        said: dict[bytes, dict[str, None]] = {}
        for part in _parts(list(items), _MANY):
            for item, rationale in self._select(
                "SELECT DISTINCT items.hash, rationale FROM items "
                "JOIN verdicts ON verdicts.item = items.id JOIN calls ON calls.id = call "
                f"WHERE rationale != '' AND clause IN ({marks}) "
                f"AND items.hash IN ({','.join('?' * len(part))})",
                (*names, *part),
            ):
                said.setdefault(item, {})[rationale] = None
        return {item: "\n".join(lines) for item, lines in said.items()}

    def _damaged(self, what: str) -> None:
        """Damaged answers are as if they were not there."""
        metrics.say(f"  warning: {self.path}: a damaged {what} is left out, and asked for again")

    def add(
        self,
        reader: Reader,
        prompt: records.Text,
        response: records.Text,
        call: Call,
        verdicts: Mapping[policies.Clause, records.ClauseVerdict],
    ) -> None:
        """Keeps an attempt and the verdicts it gave, if any; on return nothing can lose them.

        An error never takes the place of an answer. call: KEPT adds nothing.
        """
        if call is KEPT:
            return
        digest = item_hash(prompt, response)
        with self.writing() as db:
            item = self._item(db, prompt, response)
            number, who = self._add_call(db, reader, item, call), self._reader(db, reader)
            rows = []
            for clause, v in verdicts.items():
                which = self._clause(db, clause)
                total = store_file.checksum(digest, who, which, v.status, v.probability)
                rows.append((item, who, which, v.status, v.probability, number, total))
            db.executemany(
                "INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "status = excluded.status, probability = excluded.probability, "
                "call = excluded.call, sum = excluded.sum "
                "WHERE excluded.status != 'error' OR verdicts.status = 'error'",
                rows,
            )

    def counts(self, clauses: Sequence[policies.Clause]) -> dict[str, int]:
        """Stored verdicts on each clause, of all readers, by clause id."""
        query = (
            "SELECT count(*) FROM verdicts WHERE clause IN (SELECT id FROM clauses WHERE hash = ?)"
        )
        with self._mended():
            return {c.id: self._select(query, (c.text_hash,))[0][0] for c in clauses}

    def find_comparisons(self, reader: Reader, questions: Iterable[bytes]) -> dict[bytes, str]:
        """Stored answers of `compare`: question hash -> "a", "b", "tie" or "undecided"."""
        found: dict[bytes, str] = {}
        for part in _parts(list(dict.fromkeys(questions)), _MANY):
            rows = self._select(
                f"SELECT question, answer, reader, sum FROM comparisons "
                f"JOIN readers ON readers.id = reader "
                f"WHERE {_IS_READER} AND question IN ({','.join('?' * len(part))})",
                (*reader, *part),
            )
            for question, answer, who, total in rows:
                if total == store_file.checksum(question, who, answer):
                    found[question] = answer
                else:
                    self._damaged("comparison")
        return found

    def add_comparison(
        self, reader: Reader, question: bytes, call: Call, answer: str | None
    ) -> None:
        """Keeps an attempt at a comparison, and its answer unless that is None."""
        with self.writing() as db:
            number = self._add_call(db, reader, None, call)
            if answer is not None:
                who = self._reader(db, reader)
                row = (who, question, answer, number, store_file.checksum(question, who, answer))
                db.execute("INSERT OR REPLACE INTO comparisons VALUES (?, ?, ?, ?, ?)", row)

    def add_call(self, reader: Reader, call: Call) -> None:
        """Keeps an attempt that was no judgement, for what it took."""
        with self.writing() as db:
            self._add_call(db, reader, None, call)

    def spent(self, reader: Reader | None = None) -> Spent:
        """What all attempts in this store took, or those of one reader."""
        columns = "input_tokens), SUM(cached_tokens), SUM(output_tokens), SUM(price"
        query, values = f"SELECT COUNT(*), SUM({columns}) FROM calls", ()
        if reader is not None:
            query += f" WHERE reader IN (SELECT id FROM readers WHERE {_IS_READER})"
            values = reader
        ((n, *sums),) = self._select(query, values)
        return Spent(n, *(value or 0 for value in sums))

    def has_answered(self, reader: Reader) -> bool:
        """Whether this reader ever gave a reply that was one, be it that it was withheld."""
        query = (
            "SELECT EXISTS(SELECT 1 FROM calls WHERE (outcome = 'ok' OR outcome LIKE 'blocked%') "
            f"AND reader IN (SELECT id FROM readers WHERE {_IS_READER}))"
        )
        return bool(self._select(query, reader)[0][0])

    def last_call(self) -> int:
        """The number of the newest attempt, 0 where there is none."""
        return self._select("SELECT MAX(id) FROM calls")[0][0] or 0

    def others_wrote(self) -> bool:
        """Whether another process, or store of this one, changed the file since it was opened."""
        return self._select("PRAGMA data_version") != self._opened

    def item(self, digest: bytes) -> tuple[records.Text, records.Text] | None:
        """(prompt, response) of this hash; None where it is not here, or damaged."""
        query = "SELECT prompt, response FROM items WHERE hash = ?"
        for prompt, response in self._select(query, (digest,)):
            with contextlib.suppress(ValueError):
                found = json.loads(prompt), json.loads(response)
                if item_hash(*found) == digest:
                    return found
        return None

    def add_batch(
        self,
        reader: Reader,
        name: str,
        questions: str,
        items: Iterable[tuple[records.Text, records.Text]] = (),
    ) -> None:
        """Remembers a batch that a service works on; questions: what it was asked, as JSON.

        items: (prompt, response) of the questions, for `item`.
        """
        with self.writing() as db:
            for prompt, response in items:
                self._item(db, prompt, response)
            row = (name, self._reader(db, reader), _now(), questions)
            db.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", row)

    def batches(self, reader: Reader | None = None) -> dict[str, str]:
        """Batches that are still out, of this reader or of all: name -> questions, oldest first."""
        where = "" if reader is None else f"WHERE {_IS_READER}"
        query = f"SELECT name, questions FROM batches JOIN readers ON readers.id = reader {where}"
        return dict(self._select(f"{query} ORDER BY date, name", reader or ()))

    def name_batch(self, begun: str, name: str) -> None:
        """The batch that was added under the name `begun` has this one."""
        with self.writing() as db:
            db.execute("UPDATE batches SET name = ? WHERE name = ?", (name, begun))

    def forget_batch(self, name: str) -> None:
        """Its answers will never come."""
        with self.taking_in(name):
            pass

    @contextlib.contextmanager
    def taking_in(self, name: str) -> Iterator[bool]:
        """The batch is forgotten, and what is added within is kept; all of it or nothing.

        False: it is not out any more, another process took it in.
        """
        with self.writing() as db:
            yield db.execute("DELETE FROM batches WHERE name = ?", (name,)).rowcount > 0

    def export(self, path: records.AnyPath) -> int:
        """Writes all verdicts with what was asked and replied as Parquet; returns how many rows."""
        return store_file.export(self._db, path)

    def _clause_names(self, clauses: Sequence[policies.Clause]) -> dict[int, str]:
        by_hash = {clause.text_hash: clause.id for clause in clauses}
        marks = ",".join("?" * len(by_hash))
        rows = self._select(f"SELECT id, hash FROM clauses WHERE hash IN ({marks})", tuple(by_hash))
        return {number: by_hash[digest] for number, digest in rows}

    def _add_call(
        self, db: sqlite3.Connection, reader: Reader, item: int | None, call: Call
    ) -> int:
        row = (self._reader(db, reader), item, _now(), *dataclasses.astuple(call))
        marks = ",".join("?" * len(row))
        cursor = db.execute(
            "INSERT INTO calls(reader, item, date, outcome, input_tokens, cached_tokens, "
            f"output_tokens, price, rationale, raw) VALUES ({marks})",
            row,
        )
        return cursor.lastrowid

    def _item(self, db: sqlite3.Connection, prompt: records.Text, response: records.Text) -> int:
        digest = item_hash(prompt, response)
        texts = (json.dumps(text, ensure_ascii=True) for text in (prompt, response))
        return self._row(db, "items", "hash", (digest,), "hash, prompt, response", (digest, *texts))

    def _reader(self, db: sqlite3.Connection, reader: Reader) -> int:
        columns = "judge, model, parameters, template"
        return self._row(db, "readers", f"({columns})", tuple(reader), columns, tuple(reader))

    def _clause(self, db: sqlite3.Connection, clause: policies.Clause) -> int:
        row = (clause.text_hash, clause.id, clause.requirement)
        return self._row(db, "clauses", "hash", row[:1], "hash, name, requirement", row)

    def _row(
        self, db: sqlite3.Connection, table: str, key: str, at: tuple, columns: str, values: tuple
    ) -> int:
        """The id of the row, which is made where it is not there."""
        if (table, at) in self._ids:
            return self._ids[table, at]
        marks = ",".join("?" * len(values))
        db.execute(f"INSERT OR IGNORE INTO {table}({columns}) VALUES ({marks})", values)
        where = f"{key} = ({','.join('?' * len(at))})"
        ((found,),) = db.execute(f"SELECT id FROM {table} WHERE {where}", at).fetchall()
        if table != "items":  # of those there may be millions
            self._ids[table, at] = found
        return found

    def _select(self, query: str, values: Sequence = ()) -> list[tuple]:
        with self._mended():
            return self._db.execute(query, tuple(values)).fetchall()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing; within another it is a part of that.

        Raises:
          InputError: the file cannot be written.
        """
        if self._db.in_transaction:
            yield self._db
            return
        with self._mended():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                self._ids.clear()
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _mended(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:  # the latter of a damaged schema
            raise InputError(
                f"{self.path}: the judgement store cannot be used ({error}); free space, close "
                "what holds it, or give another file with --config.asking.store=FILE"
            ) from error


def _parts(values: list, size: int) -> Iterator[list]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
