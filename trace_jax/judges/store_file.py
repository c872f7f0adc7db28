"""The SQLite file of the judgement store: its schema, its versions, sums against damage."""

import json
import sqlite3
import time
import urllib.parse
import zlib
from collections.abc import Callable
from pathlib import Path

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
