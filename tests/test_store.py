import concurrent.futures
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys

import pytest

from trace_jax import policy, records
from trace_jax.errors import InputError
from trace_jax.judges import store

CALM, KIND = policy.parse("""\
name: p
clauses:
  - {id: calm, requirement: The story is calm.}
  - {id: kind, requirement: The story is kind.}
""").clauses
ONE = store.Reader("gemini", "m1", "{}", "t")
OTHER = store.Reader("gemini", "m2", "{}", "t")
YES, NO = records.ClauseVerdict("compliant", 0.9), records.ClauseVerdict("violating", 0.1)
ERROR, UNSURE = records.ClauseVerdict("error", None), records.ClauseVerdict("abstain", None)
ITEM = store.item_hash("x", "y")
CALL = store.Call("ok", 100, 40, 10, 0.5, "because", "{raw}")


def statuses(kept, reader=ONE, clauses=(CALM, KIND), item=ITEM):
    answers = kept.find(reader, clauses, [item])
    return {name: a.verdict.status for name, a in answers[item].items()} if answers else {}


def test_what_was_added_is_found_again(tmp_path):
    path = tmp_path / "s.sqlite"
    kept = store.Store(path)
    assert statuses(kept) == {}
    kept.add(ONE, "x", "y", CALL, {CALM: YES, KIND: NO})
    kept.close()
    answer = store.Store(path).find(ONE, [CALM], [ITEM])[ITEM]["calm"]
    assert answer[:2] == (YES, "because") and answer.tokens == 110
    assert answer.date.startswith("20") and answer.date.endswith("+00:00")


def test_the_key_is_reader_clause_text_prompt_and_response():
    kept = store.Store(":memory:")
    kept.add(ONE, "x", "y", CALL, {CALM: YES})
    assert statuses(kept) == {"calm": "compliant"}
    assert statuses(kept, OTHER) == {}
    assert statuses(kept, ONE._replace(parameters='{"t": 1}')) == {}
    assert statuses(kept, ONE._replace(template="u")) == {}
    assert statuses(kept, item=store.item_hash("x", "z")) == {}
    assert statuses(kept, item=store.item_hash("z", "y")) == {}
    edited = policy.parse("name: p\nclauses: [{id: calm, requirement: Very calm.}]").clauses
    assert statuses(kept, clauses=edited) == {}
    same = "name: p\nclauses: [{id: calm, tier: high, requirement: 'The  story is calm.'}]"
    assert statuses(kept, clauses=policy.parse(same).clauses) == {"calm": "compliant"}


def test_chats_and_texts_are_different_items():
    chat = [{"role": "user", "content": "x"}]
    assert store.item_hash(chat, "y") != store.item_hash("x", "y")
    assert store.item_hash("ab", "c") != store.item_hash("a", "bc")
    kept = store.Store(":memory:")
    kept.add(ONE, chat, "\ud800", CALL, {CALM: YES})  # half a character is still an item
    assert statuses(kept, item=store.item_hash(chat, "\ud800")) == {"calm": "compliant"}


@pytest.mark.parametrize(
    "first, then, left",
    [(YES, NO, NO), (ERROR, YES, YES), (YES, ERROR, YES), (ERROR, ERROR, ERROR), (UNSURE, NO, NO)],
)
def test_an_error_never_replaces_an_answer(first, then, left):
    kept = store.Store(":memory:")
    for verdict in (first, then):
        kept.add(ONE, "x", "y", CALL, {CALM: verdict})
    assert statuses(kept) == {"calm": left.status}


def test_every_attempt_is_accounted_for():
    kept = store.Store(":memory:")
    assert kept.spent() == store.Spent(0, 0, 0, 0, 0)
    kept.add(ONE, "x", "y", store.Call("http 429"), {})
    kept.add(ONE, "x", "y", CALL, {CALM: YES})
    kept.add_comparison(ONE, b"q", CALL, None)
    assert kept.spent() == store.Spent(3, 200, 80, 20, 1.0)


def test_comparisons():
    kept = store.Store(":memory:")
    kept.add_comparison(ONE, b"q", CALL, None)
    assert kept.find_comparisons(ONE, [b"q"]) == {}
    kept.add_comparison(ONE, b"q", CALL, "tie")
    assert kept.find_comparisons(ONE, [b"q", b"r"]) == {b"q": "tie"}
    assert kept.find_comparisons(OTHER, [b"q"]) == {}


def test_batches():
    kept = store.Store(":memory:")
    kept.add_batch(ONE, "batches/b", "[1]")
    kept.add_batch(ONE, "batches/a", "[2]")
    assert kept.batches(OTHER) == {}
    assert set(kept.batches(ONE).items()) == {("batches/a", "[2]"), ("batches/b", "[1]")}
    kept.forget_batch("batches/b")
    assert kept.batches(ONE) == {"batches/a": "[2]"}


def test_a_failed_write_leaves_nothing_behind():
    kept = store.Store(":memory:")
    bad = records.ClauseVerdict(status=None, probability=None)  # NOT NULL
    with pytest.raises(InputError, match="the judgement store cannot be used"):
        kept.add(ONE, "x", "y", CALL, {CALM: YES, KIND: bad})
    assert (statuses(kept), kept.spent().calls) == ({}, 0)
    kept.add(ONE, "x", "y", CALL, {CALM: YES})
    assert statuses(kept) == {"calm": "compliant"}


def test_many_items_in_one_search():
    kept = store.Store(":memory:")
    for i in range(1000):
        kept.add(ONE, "x", str(i), CALL, {CALM: YES})
    hashes = [store.item_hash("x", str(i)) for i in range(1100)]
    found = kept.find(ONE, [CALM, KIND], hashes + hashes[:5])
    assert found.keys() == set(hashes[:1000])


def _adds(path, name):
    kept = store.Store(path)
    for i in range(100):
        kept.add(ONE, name, str(i), CALL, {CALM: YES, KIND: NO})
        kept.add(ONE, "all", str(i), CALL, {CALM: YES})


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "s.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_adds, args=(path, str(n))) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    kept = store.Store(path)
    assert kept.spent().calls == 800
    hashes = [store.item_hash(n, str(i)) for n in ("0", "1", "2", "3", "all") for i in range(100)]
    assert len(kept.find(ONE, [CALM], hashes)) == 500


def test_export_to_parquet(tmp_path):
    from pyarrow import parquet

    kept = store.Store(tmp_path / "s.sqlite")
    kept.add(ONE, [{"role": "user", "content": "é"}], "y", CALL, {CALM: YES, KIND: UNSURE})
    assert kept.export(tmp_path / "s.parquet") == 2
    rows = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert [(r["clause"], r["status"], r["probability"]) for r in rows] == [
        ("calm", "compliant", 0.9),
        ("kind", "abstain", None),
    ]
    assert json.loads(rows[0]["prompt"]) == [{"role": "user", "content": "é"}]
    assert json.loads(rows[0]["response"]) == "y"
    assert (rows[0]["raw"], rows[0]["model"], rows[0]["input_tokens"]) == ("{raw}", "m1", 100)
    with pytest.raises(InputError, match="cannot be written"):
        kept.export(tmp_path / "none" / "s.parquet")
    assert store.Store(":memory:").export(tmp_path / "empty.parquet") == 0


@pytest.mark.fault
def test_files_that_are_no_store_of_this_version(tmp_path):
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to look at: " * 100)
    with pytest.raises(InputError, match="text: the judgement store cannot be used"):
        store.Store(text)
    for version, who in ((0, "another program or an older"), (9, "a newer trace_jax")):
        path = tmp_path / f"v{version}.sqlite"
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE t(a)")
            db.execute(f"PRAGMA user_version = {version}")
        with pytest.raises(InputError, match=f"written by {who}.*asking.store=FILE"):
            store.Store(path)
    with pytest.raises(InputError, match="cannot be used"):
        store.Store(tmp_path)


def test_many_open_a_new_store_at_once(tmp_path):
    """The first to come makes it; SQLite lets no two switch its journal at the same time."""
    for n in range(30):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(lambda _, n=n: store.Store(tmp_path / f"{n}.sqlite"), range(8)))
        assert [s.spent().calls for s in opened] == [0] * 8


def test_a_look_at_a_store_waits_for_nobody_and_writes_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    writing = store.Store(path)
    writing.add(ONE, "x", "y", CALL, {CALM: YES})
    writing._db.execute("BEGIN IMMEDIATE")  # somebody is in the middle of a write
    look = store.Store(path, read_only=True)
    assert statuses(look) == {"calm": "compliant"} and look.spent().calls == 1
    with pytest.raises(InputError, match="readonly"):
        look.add_call(ONE, CALL)
    look.close()
    writing._db.execute("ROLLBACK")
    writing.close()
    assert [file.name for file in tmp_path.iterdir()] == ["s.sqlite"]
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    code = (
        "import os, sys; from trace_jax.judges import store; os.setuid(65534); "
        "print(store.Store(sys.argv[1], read_only=True).spent().calls)"
    )
    if os.getuid() == 0:  # as somebody who may read alone
        for parent in list(path.parents)[:-2]:
            parent.chmod(parent.stat().st_mode | 0o555)
        found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert found.stdout == "1\n", found.stderr
    tmp_path.chmod(0o755)


def test_a_store_of_version_1_is_brought_up_to_date(tmp_path):
    """Such a store is one of today without its sums."""
    path = tmp_path / "old.sqlite"
    kept = store.Store(path)
    kept.add(ONE, "x", "y", CALL, {CALM: YES, KIND: UNSURE})
    kept.add_comparison(ONE, b"q", CALL, "tie")
    before = kept.find(ONE, [CALM, KIND], [store.item_hash("x", "y")])
    kept.close()
    with sqlite3.connect(path) as db:
        for table in ("verdicts", "comparisons"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN sum")
        db.execute("PRAGMA user_version = 1")
    again = store.Store(path)
    assert again.find(ONE, [CALM, KIND], [store.item_hash("x", "y")]) == before
    assert again.find_comparisons(ONE, [b"q"]) == {b"q": "tie"}


@pytest.mark.fault
@pytest.mark.parametrize(
    "damage",
    ["status = 'violating'", "probability = 0.1", "item = 2", "sum = sum + 1"],
)
def test_a_damaged_answer_is_as_if_it_were_not_there(tmp_path, capsys, damage):
    path = tmp_path / "s.sqlite"
    kept = store.Store(path)
    kept.add(ONE, "x", "y", CALL, {CALM: YES})
    kept.add(ONE, "other", "y", CALL, {})
    kept.close()
    with sqlite3.connect(path) as db:
        db.execute(f"UPDATE verdicts SET {damage}")
    items = [store.item_hash("x", "y"), store.item_hash("other", "y")]
    assert store.Store(path).find(ONE, [CALM], items) == {}
    assert "a damaged verdict is left out" in capsys.readouterr().err
