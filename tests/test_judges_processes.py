"""Several processes: of one run the first one asks; runs that share a store share its budget."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import children
import gemini_client
import pytest

from trace_jax import config, processes
from trace_jax.judges import pacing, store, store_file
from trace_jax.stages import correct

WORKER = Path(__file__).with_name("judge_process_worker.py")


def run(count, folder, address, **environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, where, str(count), str(i), folder],
            env=gemini_client.subprocess_environment(address, JAX_PLATFORMS="cpu", **environment),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    told = [err for _, err in children.said_by(started)]
    return [process.returncode for process in started], told


def test_the_first_process_asks_and_all_are_told(tmp_path):
    with gemini_client.running() as address:
        codes, told = run(2, tmp_path, address)
        assert codes == [0, 0], told
        counts = gemini_client.get(address)
    first, second = (json.loads((tmp_path / f"told-{i}.json").read_text()) for i in range(2))
    assert first == second
    assert first["verdicts"] == ["violating", "compliant"] * 15
    assert first["preferred"] == ["b", "tie"]
    assert first["texts"] == [["kind words for Tell 1"], ["kind words for Tell 2"]]
    assert first["price"] > 0
    assert counts["requests"] == 30 + 2 + 2  # responses, comparisons, texts: each asked once
    assert [p.name for p in tmp_path.glob("*.sqlite")] == ["s-0.sqlite"]  # the other opens none


@pytest.mark.fault
def test_another_process_opens_no_store(tmp_path, monkeypatch):
    """In a bucket its copy would take the place of the first one's, which is open."""
    monkeypatch.setattr(processes, "_this", processes._This(index=1, count=2))
    monkeypatch.setenv("GEMINI_API_KEY", gemini_client.KEY)
    assert gemini_client.judge(tmp_path / "s.sqlite").store.path == ":memory:"
    assert correct._gemini(_run(tmp_path))._service.store.path == ":memory:"
    assert not list(tmp_path.iterdir())


def _run(folder):
    return SimpleNamespace(
        config=config.base_config(),
        new_policy=gemini_client.POLICY,
        store_path=folder / "s.sqlite",
        workdir=SimpleNamespace(path=folder),
    )


@pytest.mark.fault
def test_what_stops_the_first_process_stops_all(tmp_path):
    with gemini_client.running() as address:
        codes, told = run(2, tmp_path, address, GEMINI_API_KEY="wrong")
    assert 2 in codes and 0 not in codes  # who leaves first may take the other along
    assert any("refuses the key in GEMINI_API_KEY" in text for text in told)


ALONE = """
import sys, gemini_client
from trace_jax.errors import InputError
name, path, kind, n, more = *sys.argv[1:4], int(sys.argv[4]), eval(sys.argv[5])
judge = gemini_client.judge(path, concurrency=8, **more)
print("ready", flush=True)
sys.stdin.readline()
try:
    found = judge.judge([("Tell", f"calm {kind}{i}") for i in range(n)])
    print(sorted({v.status for v in found}))
except InputError as error:
    print(error)
"""


def alone(address, path, kinds, n, **more):
    """A run a kind of item, all on one store and begun at the same time."""
    env = gemini_client.subprocess_environment(address, JAX_PLATFORMS="cpu")
    env["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, str(i), path, kind, str(n), repr(more)],
            env=env, text=True, **pipes,
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    return started


def ended(started):
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=100)[0].strip() for process in started]


@pytest.mark.fault
@pytest.mark.parametrize("limit", [{"budget_calls": 40}, {"budget_usd": 0.02}])
def test_runs_that_share_a_store_share_its_budget(tmp_path, limit):
    path = tmp_path / "s.sqlite"
    with gemini_client.running(latency=0.05, tokens=100) as address:
        told = ended(alone(address, path, ("x", "y", "z"), 60, **limit))
        counts = gemini_client.get(address)
    assert all("budget is spent" in text for text in told)
    spent = store.Store(path).spent()
    assert counts["requests"] == spent.calls
    if "budget_calls" in limit:
        assert spent.calls == 40
    assert 0.018 < spent.price <= 0.02 or "budget_calls" in limit


def test_of_runs_with_the_same_question_one_asks(tmp_path):
    path = tmp_path / "s.sqlite"
    with gemini_client.running(latency=0.05) as address:
        told = ended(alone(address, path, ("x", "x", "x"), 60))
        counts = gemini_client.get(address)
    assert told == ["['violating']"] * 3
    assert set(counts["asked"].values()) == {1} and counts["requests"] == 60
    assert store.Store(path).spent().calls == 60


@pytest.mark.fault
def test_what_a_killed_run_had_in_flight_blocks_nobody(tmp_path):
    path = tmp_path / "s.sqlite"
    with gemini_client.running(latency=30.0) as address:
        (hanging,) = alone(address, path, ("x",), 10, budget_calls=10)
        hanging.stdin.write("go\n")
        hanging.stdin.flush()
        while gemini_client.get(address)["requests"] < 8:
            time.sleep(0.05)
        hanging.send_signal(signal.SIGKILL)
        hanging.wait()
        gemini_client.get(address, "/set", {"latency": 0.0})
        with sqlite3.connect(path) as db:
            assert db.execute("SELECT calls FROM reservations").fetchall() == [(8,)]
            assert db.execute("SELECT COUNT(*) FROM claims").fetchone() == (8,)
        start = time.monotonic()
        assert ended(alone(address, path, ("x",), 10, budget_calls=10)) == ["['violating']"]
        assert time.monotonic() - start < 20
    with sqlite3.connect(path) as db:
        for table in ("reservations", "claims"):
            assert db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,)


def test_reservations_of_another_machine_end_with_their_time(tmp_path, monkeypatch):
    """As in the copy of a store that was made while a run was at work."""
    kept = store.Store(tmp_path / "s.sqlite")
    one, two = (pacing.Budget(kept, price=0.0, calls=3, seconds=60.0) for _ in range(2))
    one._owner = "elsewhere/1/abcd"
    assert one.reserve(0.0, 2) and one.claim("q") and one.begin_submitting()
    assert two.reserve(0.0) and two.reserve(0.0) is None and two.reserve(0.0, 4) is False
    assert not two.claim("q") and two.claim("p") and not two.begin_submitting()
    now = time.time()
    for ahead in (100.0, -1e6):  # later; and a clock that was far ahead when it was written
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda ahead=ahead: now + ahead)
            with kept.writing() as db:
                assert store_file.held(db, "me") == (0, 0.0, False)
                assert store_file.claim(db, "me", "q", 60.0)
                db.execute("DELETE FROM claims")
        one.settle(0.0, 2)
        assert one.reserve(0.0, 2) and one.claim("q") and not two.claim("q")


def test_a_store_without_reservations_goes_on_working(tmp_path):
    path = tmp_path / "s.sqlite"
    store.Store(path).close()
    with sqlite3.connect(path) as db:
        for table in ("reservations", "claims"):
            db.execute(f"DROP TABLE {table}")
    path.chmod(0o444)
    assert store.Store(path, read_only=True).spent().calls == 0
    path.chmod(0o644)
    assert pacing.Budget(store.Store(path), price=0.0, calls=1, seconds=60.0).reserve(0.0)
