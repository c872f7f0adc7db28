"""The SQLite file of the judgement store: its schema, its versions, sums against damage.

Reservations are what processes that share the file have in flight, so that all keep one budget, and
claims the questions that they ask just now. They end by what their owner says; with its process,
where that was on this machine; or by the time.
"""

import contextlib
import functools
import json
import os
import secrets
import socket
import sqlite3
import time
import urllib.parse
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trace_jax.errors import InputError

VERSION = 2  # PRAGMA user_version of the schema below; 1 had no sums
_SCHEMA = """
CREATE TABLE readers(id INTEGER PRIMARY KEY, judge TEXT NOT NULL, model TEXT NOT NULL,
  parameters TEXT NOT NULL, template TEXT NOT NULL, UNIQUE(judge, model, parameters, template));
CREATE TABLE clauses(id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
  requirement TEXT NOT NULL);
CREATE TABLE items(id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, prompt TEXT NOT NULL,
  response TEXT NOT NULL);
CREATE TABLE calls(id INTEGER PRIMARY KEY, reader INTEGER NOT NULL, item INTEGER,
  date TEXT NOT NULL, outcome TEXT NOT NULL, input_tokens INTEGER NOT NULL,
  cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, price REAL NOT NULL,
  rationale TEXT NOT NULL, raw TEXT NOT NULL);
CREATE TABLE verdicts(item INTEGER NOT NULL, reader INTEGER NOT NULL, clause INTEGER NOT NULL,
  status TEXT NOT NULL, probability REAL, call INTEGER NOT NULL, sum INTEGER NOT NULL,
  PRIMARY KEY(item, reader, clause)) WITHOUT ROWID;
CREATE TABLE comparisons(reader INTEGER NOT NULL, question BLOB NOT NULL, answer TEXT NOT NULL,
  call INTEGER NOT NULL, sum INTEGER NOT NULL, PRIMARY KEY(reader, question)) WITHOUT ROWID;
CREATE TABLE batches(name TEXT PRIMARY KEY, reader INTEGER NOT NULL, date TEXT NOT NULL,
  questions TEXT NOT NULL);
"""
# Files of version 2 may be without: it was added later, and means nothing to who does not know it.
_IN_FLIGHT = """
CREATE TABLE IF NOT EXISTS reservations(owner TEXT PRIMARY KEY, calls INTEGER NOT NULL,
  price REAL NOT NULL, until REAL NOT NULL, batch INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claims(question TEXT PRIMARY KEY, owner TEXT NOT NULL,
  until REAL NOT NULL) WITHOUT ROWID;
"""
_LONGEST = 3600.0  # seconds that a reservation may hold


def checksum(*values: object) -> int:
    """CRC-32 of an answer and what it is of: SQLite does not notice a flipped bit in a row."""
    text = json.dumps([v.hex() if isinstance(v, bytes) else v for v in values])
    return zlib.crc32(text.encode())


def connect(path: str) -> sqlite3.Connection:
    """An open store; an empty file becomes one, one of version 1 is brought up to date."""
    if path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Answers may arrive in a thread of their own; one at a time.
    db = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
    _keep_trying(lambda: db.execute("PRAGMA journal_mode = WAL"))
    db.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut the last seconds
    db.execute("BEGIN IMMEDIATE")
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not tables and not version:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
        elif version == 1:
            _add_sums(db)
        elif version != VERSION:
            raise _other_version(path, version)
        for statement in _IN_FLIGHT.split(";"):
            db.execute(statement)
        db.execute("DELETE FROM claims WHERE NOT (until > ? AND until <= ?)", _times())
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        db.close()
        raise
    return db


def connect_to_read(path: str) -> sqlite3.Connection:
    """A store opened for a look: nothing is written, and nobody who writes waits for it.

    One of version 1 is brought up to date all the same.
    """
    name = "file:" + urllib.parse.quote(str(Path(path).absolute()))
    try:
        db, version = _with_version(f"{name}?mode=ro")
    except sqlite3.OperationalError:  # no file may be made beside it, so nobody writes
        db, version = _with_version(f"{name}?immutable=1")
    if version == VERSION:
        return db
    db.close()
    if version == 1:
        return connect(path)
    raise _other_version(path, version)


def _with_version(uri: str) -> tuple[sqlite3.Connection, int]:
    db = sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
    try:
        return db, db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error:
        db.close()
        raise


def _keep_trying(action: Callable[[], object]) -> object:
    """For what SQLite refuses at once, whatever its timeout, while another opens the same file."""
    for left in reversed(range(600)):
        try:
            return action()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or not left:
                raise
            time.sleep(0.05)


def _other_version(path: str, version: int) -> InputError:
    kind = "a newer trace_jax" if version > VERSION else "another program or an older trace_jax"
    return InputError(
        f"{path}: written by {kind} (schema {version}, this one is {VERSION}); use that version to "
        "export it, or give another file with --config.asking.store=FILE"
    )


def _add_sums(db: sqlite3.Connection) -> None:
    for table in ("verdicts", "comparisons"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN sum INTEGER NOT NULL DEFAULT 0")
    rows = db.execute(
        "SELECT hash, reader, clause, status, probability, item FROM verdicts "
        "JOIN items ON items.id = item"
    ).fetchall()
    db.executemany(
        "UPDATE verdicts SET sum = ? WHERE (item, reader, clause) = (?, ?, ?)",
        [(checksum(*row[:5]), row[5], row[1], row[2]) for row in rows],
    )
    rows = db.execute("SELECT question, reader, answer FROM comparisons").fetchall()
    db.executemany(
        "UPDATE comparisons SET sum = ? WHERE (reader, question) = (?, ?)",
        [(checksum(*row), row[1], row[0]) for row in rows],
    )
    db.execute(f"PRAGMA user_version = {VERSION}")


def export(db: sqlite3.Connection, path: str | Path) -> int:
    """Writes all verdicts with what was asked and replied as Parquet; returns how many rows."""
    import pyarrow
    from pyarrow import parquet

    names, cursor = _export_rows(db)
    kinds = {"probability": pyarrow.float64(), "price": pyarrow.float64()}
    whole = ("input_tokens", "cached_tokens", "output_tokens")
    kinds |= dict.fromkeys(whole, pyarrow.int64())
    schema = pyarrow.schema([(n, kinds.get(n, pyarrow.string())) for n in names])
    total = 0
    try:
        with parquet.ParquetWriter(path, schema) as writer:
            while rows := cursor.fetchmany(10_000):
                columns = zip(zip(*rows, strict=True), schema, strict=True)
                arrays = [pyarrow.array(column, field.type) for column, field in columns]
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
                total += len(rows)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); use another file") from error
    return total


def _export_rows(db: sqlite3.Connection) -> tuple[list[str], sqlite3.Cursor]:
    cursor = db.execute(
        "SELECT judge, model, parameters, template, name AS clause, requirement, prompt, "
        "response, status, probability, rationale, raw, outcome, calls.date, input_tokens, "
        "cached_tokens, output_tokens, price FROM verdicts "
        "JOIN readers ON readers.id = verdicts.reader JOIN clauses ON clauses.id = clause "
        "JOIN items ON items.id = verdicts.item JOIN calls ON calls.id = call "
        "ORDER BY verdicts.item, verdicts.reader, clause"
    )
    return [column[0] for column in cursor.description], cursor


class Held(NamedTuple):
    """What all owners of reservations together have in flight.

    batch: somebody else submits a batch.
    """

    calls: int
    price: float
    batch: bool


def owner() -> str:
    """A new name for who makes reservations, by which others see whether it is still there."""
    return f"{_machine()}/{os.getpid()}/{secrets.token_hex(4)}"


def hold(
    db: sqlite3.Connection, who: str, calls: int, price: float, seconds: float, batch: bool
) -> None:
    """Reserves this in place of what the owner had; it holds so long, if the owner is there."""
    if not calls and not batch:
        db.execute("DELETE FROM reservations WHERE owner = ?", (who,))
        return
    row = (who, calls, price, time.time() + min(seconds, _LONGEST), batch)
    db.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?)", row)


def held(db: sqlite3.Connection, who: str) -> Held:
    """Everybody's reservations, this owner's among them; those that are over are forgotten."""
    db.execute("DELETE FROM reservations WHERE NOT (until > ? AND until <= ?)", _times())
    for (other,) in db.execute("SELECT owner FROM reservations").fetchall():
        if _is_gone(other):
            db.execute("DELETE FROM reservations WHERE owner = ?", (other,))
    sums = "SELECT TOTAL(calls), TOTAL(price), TOTAL(batch AND owner != ?) FROM reservations"
    calls, price, batch = db.execute(sums, (who,)).fetchone()
    return Held(int(calls), price, batch > 0)


def claim(db: sqlite3.Connection, who: str, question: str, seconds: float) -> bool:
    """Whether nobody else has this question; if so this owner has, for so long."""
    query = "SELECT owner FROM claims WHERE question = ? AND until > ? AND until <= ?"
    for (other,) in db.execute(query, (question, *_times())).fetchall():
        if other != who and not _is_gone(other):
            return False
    row = (question, who, time.time() + min(seconds, _LONGEST))
    db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", row)
    return True


def release(db: sqlite3.Connection, who: str, question: str) -> None:
    """The owner has the question no longer."""
    db.execute("DELETE FROM claims WHERE question = ? AND owner = ?", (question, who))


def spent_since(db: sqlite3.Connection, call: int) -> tuple[int, int, float]:
    """(the newest attempt, how many after the one of this number, their US dollars)."""
    query = "SELECT MAX(id), COUNT(*), TOTAL(price) FROM calls WHERE id > ?"
    newest, n, price = db.execute(query, (call,)).fetchone()
    return newest or call, n, price


def batch_names(db: sqlite3.Connection) -> frozenset[str]:
    """Those of the batches that are out."""
    return frozenset(name for (name,) in db.execute("SELECT name FROM batches"))


def _times() -> tuple[float, float]:
    """Between which ends lie that hold: of a clock that was days ahead nothing stays."""
    now = time.time()
    return now, now + _LONGEST


@functools.cache
def _machine() -> str:
    """Where a number names one process."""
    space = ""
    with contextlib.suppress(OSError):  # containers may share a name, and number by themselves
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}"


def _is_gone(who: str) -> bool:
    machine, _, process = who.rpartition("/")[0].rpartition("/")
    if machine != _machine() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
