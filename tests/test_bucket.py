"""Workdirs and models in a bucket: a real storage server on loopback, the real client libraries."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import children
import jax.numpy as jnp
import pytest
from faults import runs
from flax import nnx

from trace_jax import (
    bucket,
    checkpoints,
    errors,
    metrics,
    policy,
    processes,
    records,
    remote,
)
from trace_jax.errors import InputError
from trace_jax.judges import store

pytest.importorskip("gcsfs", reason="needs the extra gcs")
ROOT = Path(__file__).resolve().parents[1]


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.txt")}


def test_another_machine_finds_what_one_wrote_changed_and_deleted(machine):
    url = "gs://bucket/runs/changes"
    with bucket.opened(url) as path:
        for name in ("a", "b", "folder/c", "folder/empty"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / f"{name}.txt").write_text("" if "empty" in name else name)
        bucket.publish()
        (path / "a.txt").write_text("again")
        (path / "b.txt").unlink()
    machine("two")
    with bucket.opened(url) as path:
        assert files(path) == {"a.txt": "again", "folder/c.txt": "folder/c", "folder/empty.txt": ""}
        (path / "a.txt").unlink()
    machine("one")
    with bucket.opened(url) as path:
        assert files(path) == {"folder/c.txt": "folder/c", "folder/empty.txt": ""}


def test_what_a_killed_run_had_not_yet_brought_to_the_bucket_stays_on_its_machine(machine):
    url = "gs://bucket/runs/ahead"
    with bucket.opened(url) as path:
        (path / "paid.txt").write_text("one")
    (path / "paid.txt").write_text("one two")  # and then a kill
    (path / "new.txt").write_text("new")
    with bucket.opened(url) as path:
        assert files(path) == {"paid.txt": "one two", "new.txt": "new"}
    machine("two")
    with bucket.opened(url) as path:
        assert files(path) == {"paid.txt": "one two", "new.txt": "new"}
        (path / "paid.txt").write_text("one two three")
    machine("one")
    (path.parents[2] / "nothing").mkdir()
    stale = bucket.Mirror(url).local
    (stale / "paid.txt").write_text("old")
    (stale / "stray.txt").write_text("old")
    with bucket.opened(url) as path:  # the bucket has gone on meanwhile: it wins
        assert files(path) == {"paid.txt": "one two three", "new.txt": "new"}


def test_what_was_written_before_anything_reached_the_bucket_stays(machine):
    mirror = bucket.Mirror("gs://bucket/runs/early")
    mirror.pull()
    (mirror.local / "paid.txt").write_text("one")  # and then a kill
    with bucket.opened("gs://bucket/runs/early") as path:
        assert files(path) == {"paid.txt": "one"}


def test_a_second_run_on_this_machine_is_refused_and_changes_nothing(machine):
    url = "gs://bucket/runs/second"
    with bucket.opened(url) as path:
        (path / "new.txt").write_text("not in the bucket yet")
        with pytest.raises(InputError, match="another run is at work there"):
            with bucket.opened(url):
                pass
        assert files(path) == {"new.txt": "not in the bucket yet"}


@pytest.mark.fault
def test_what_ended_a_run_is_told_even_where_the_bucket_is_gone_too(machine, monkeypatch, capsys):
    close, url = bucket.Mirror.close, "gs://bucket/runs/gone"

    def closed_and_gone(mirror):
        close(mirror)
        raise InputError(f"{mirror.url} cannot be written")

    monkeypatch.setattr(bucket.Mirror, "close", closed_and_gone)
    with pytest.raises(InputError, match="loss is not finite"), bucket.opened(url):
        raise InputError("the loss is not finite")
    assert f"warning: {url} cannot be written" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be written"), bucket.opened(url):
        pass


def test_a_list_that_could_not_be_written_is_written_the_next_time(machine, monkeypatch):
    write, url = bucket.Mirror._list, "gs://bucket/runs/unlisted"

    def fails(mirror):
        raise ConnectionResetError(104, "Connection reset by peer")

    with bucket.opened(url) as path:
        (path / "a.txt").write_text("a")
        monkeypatch.setattr(bucket.Mirror, "_list", fails)
        with pytest.raises(errors.Unavailable):
            bucket.publish()
        monkeypatch.setattr(bucket.Mirror, "_list", write)
    machine("two")
    with bucket.opened(url) as path:
        assert files(path) == {"a.txt": "a"}


def test_a_file_that_did_not_get_there_goes_there_the_next_time(machine, monkeypatch):
    upload, url = remote.upload, "gs://bucket/runs/lost"

    def fails(*_):
        raise ConnectionResetError(104, "Connection reset by peer")

    with bucket.opened(url) as path:
        (path / "a.txt").write_text("a")
        monkeypatch.setattr(remote, "upload", fails)
        with pytest.raises(errors.Unavailable):
            bucket.publish()
        monkeypatch.setattr(remote, "upload", upload)
    machine("two")
    with bucket.opened(url) as path:
        assert files(path) == {"a.txt": "a"}


def test_a_store_that_is_written_meanwhile_arrives_whole(machine):
    """Every copy that another machine finds is a sound database with no fewer answers."""
    url, text = "gs://bucket/runs/store", "x" * 3000
    with bucket.opened(url) as path:
        live = store.Store(path / "judgements.sqlite")
        stop = threading.Event()

        def write() -> None:
            reader = store.Reader("judge", "model", "{}", "")
            clause = policy.Clause("a", "", "says a")
            for i in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                verdict = {clause: records.ClauseVerdict("compliant", None)}
                live.add(reader, f"{i}", text, store.Call("ok", raw=text), verdict)

        writer = threading.Thread(target=write)
        writer.start()
        counts = [0]
        try:
            for i in range(5):
                bucket.publish()
                machine(f"other{i}")
                with bucket.opened(url, read_only=True) as view:
                    assert not list(view.glob("*-wal"))
                    with contextlib.closing(sqlite3.connect(view / "judgements.sqlite")) as db:
                        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                        counts.append(db.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0])
        finally:
            stop.set()
            writer.join()
            live.close()
        assert counts == sorted(counts) and counts[-1] > 0
        machine("one")


def test_the_log_of_an_older_store_is_not_read_into_a_newer_one(machine):
    url, reader = "gs://bucket/runs/log", store.Reader("judge", "model", "{}", "")
    with bucket.opened(url) as path:
        live = store.Store(path / "judgements.sqlite")
        live.add_call(reader, store.Call("ok", input_tokens=1))
        bucket.publish()  # and this machine is gone, with its log
        assert (path / "judgements.sqlite-wal").stat().st_size
    machine("two")
    with bucket.opened(url) as elsewhere:
        other = store.Store(elsewhere / "judgements.sqlite")
        other.add_call(reader, store.Call("ok", input_tokens=2))
        other.close()
    machine("one")
    with bucket.opened(url) as path:
        again = store.Store(path / "judgements.sqlite")
        assert again.spent() == store.Spent(2, 3)
        again.close()
    live.close()


def test_a_look_at_a_workdir_leaves_the_weights_where_they_are(machine):
    with bucket.opened("gs://bucket/runs/look") as path:
        (path / "model.safetensors").write_bytes(b"weights")
        (path / "a.txt").write_text("a")
    with bucket.opened("gs://bucket/runs/look", read_only=True) as view:
        assert [p.name for p in view.rglob("*") if not p.name.startswith(".")] == ["a.txt"]


def test_files_of_several_processes_meet(machine, monkeypatch):
    mirrors = []
    for index in range(3):
        monkeypatch.setattr(processes, "_this", processes._This(index, 3))
        mirrors.append(bucket.Mirror("gs://bucket/runs/several"))
        mirrors[-1].pull()
        (mirrors[-1].local / f"of{index}.txt").write_text(str(index))
    for round_ in range(2):
        versions = []
        for index, mirror in enumerate(mirrors):
            monkeypatch.setattr(processes, "_this", processes._This(index, 3))
            versions.append(mirror.publish())
        assert versions == [round_ + 1, 1, 1]
        for index, mirror in enumerate(mirrors):
            monkeypatch.setattr(processes, "_this", processes._This(index, 3))
            mirror.fetch(versions)
        found = [files(mirror.local) for mirror in mirrors]
        assert found[0] == found[1] == found[2]
        assert len(found[0]) == 3 - round_
        if not round_:
            (mirrors[0].local / "of2.txt").unlink()  # the first one may delete what others wrote


@pytest.mark.fault
@pytest.mark.parametrize("at", ["upload", "list", "delete"])
def test_a_kill_within_a_publication_leaves_a_workdir_to_go_on_with(machine, monkeypatch, at):
    """On another machine with what was listed, on the same one with all that was there."""
    url, listed = f"gs://bucket/runs/within-{at}", bucket.Mirror._list
    for where, expected in (("two", {"listed": "old"}), ("one", {"new": "1", "more": "2"})):
        machine("one")
        mirror = bucket.Mirror(url)
        mirror.pull()
        (mirror.local / "listed.txt").write_text("old")
        (mirror.local / "new.txt").unlink(missing_ok=True)
        mirror.publish()
        (mirror.local / "listed.txt").unlink()
        (mirror.local / "new.txt").write_text("1")
        with monkeypatch.context() as patched:
            if at == "upload":
                patched.setattr(remote, "upload", _killed)
            elif at == "list":
                patched.setattr(bucket.Mirror, "_remember", _killed)
            else:
                patched.setattr(bucket.Mirror, "_list", lambda mirror: (listed(mirror), _killed()))
            with pytest.raises(KeyboardInterrupt):
                mirror.publish()
        (mirror.local / "more.txt").write_text("2")
        machine(where)
        if at == "delete" and where == "two":
            expected = {"new": "1"}
        again = bucket.Mirror(url)
        again.pull()
        assert files(again.local) == {f"{name}.txt": text for name, text in expected.items()}
        again.publish()


def _killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.fault
def test_an_object_that_is_listed_and_gone_is_as_deleted(machine):
    url = "gs://bucket/runs/lost-object"
    with bucket.opened(url) as path:
        for name in ("kept", "lost"):
            (path / f"{name}.txt").write_text(name)
    (remote.open_path(url) / "lost.txt").unlink()
    machine("two")
    with bucket.opened(url) as path:
        assert files(path) == {"kept.txt": "kept"}


@pytest.mark.fault
def test_what_a_machine_that_took_over_had_not_yet_brought_there_stays_on_it(machine):
    """It was killed before it had published anything."""
    url = "gs://bucket/runs/taken"
    with bucket.opened(url) as path:
        (path / "paid.txt").write_text("one")
    machine("two")
    mirror = bucket.Mirror(url)
    mirror.pull()
    (mirror.local / "paid.txt").write_text("one two")
    (mirror.local / "new.txt").write_text("new")
    with bucket.opened(url) as path:
        assert files(path) == {"paid.txt": "one two", "new.txt": "new"}


@pytest.mark.fault
def test_what_is_left_of_a_workdir_that_was_deleted_is_not_taken_for_the_next_one(machine):
    url = "gs://bucket/runs/again"
    with bucket.opened(url) as path:
        (path / "a.txt").write_text("old")
    remote.open_path(url).rmtree()
    machine("two")
    with bucket.opened(url) as path:
        (path / "b.txt").write_text("new")
    machine("one")
    with bucket.opened(url) as path:
        assert files(path) == {"b.txt": "new"}


@pytest.mark.fault
def test_answers_in_progress_are_there_within_half_a_minute(machine):
    url = "gs://bucket/runs/answers"
    mirror = bucket.Mirror(url)
    mirror.pull()
    (mirror.local / ".responses").mkdir()
    (mirror.local / ".responses" / "base.txt").write_text("paid with hours")
    mirror.publish(everything=False)
    machine("two")
    again = bucket.Mirror(url)
    again.pull()
    assert files(again.local) == {".responses/base.txt": "paid with hours"}


@pytest.mark.fault
def test_the_store_is_the_first_process_s_alone(machine, monkeypatch):
    """Another one that opens its copy changes that, and must not send it to the first."""
    mirrors, reader = [], store.Reader("judge", "model", "{}", "")
    for index in range(2):
        monkeypatch.setattr(processes, "_this", processes._This(index, 2))
        mirrors.append(bucket.Mirror("gs://bucket/runs/stores"))
        mirrors[-1].pull()
        if not index:
            live = store.Store(mirrors[0].local / "judgements.sqlite")
            live.add_call(reader, store.Call("ok", input_tokens=1))
        version = mirrors[-1].publish()
    theirs = store.Store(mirrors[1].local / "judgements.sqlite")
    theirs.add_call(reader, store.Call("ok", input_tokens=5))
    assert mirrors[1].publish() == version
    theirs.close()
    monkeypatch.setattr(processes, "_this", processes._This(0, 2))
    mirrors[0].fetch([1, mirrors[1]._version])
    live.close()
    again = store.Store(mirrors[0].local / "judgements.sqlite")
    assert again.spent().input_tokens == 1
    again.close()


def test_a_list_of_files_that_leaves_the_workdir_is_refused(machine, tmp_path):
    url = "gs://bucket/runs/hostile"
    listed = remote.open_path(url) / ".files" / "0-1.json"
    listed.parent.mkdir(parents=True, exist_ok=True)
    for name in ("../outside.txt", "/etc/outside.txt", "a/../../b.txt"):
        listed.write_text(json.dumps({name: [1, "1-1"]}))
        with pytest.raises(InputError, match="leaves the workdir"):
            with bucket.opened(url):
                pass
        assert bucket.owner(url) is None
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("path", ["gs://no-such-bucket/run", "gs://bucket/no/such/model"])
def test_a_model_that_is_not_there_is_one_line(machine, path):
    with pytest.raises(InputError, match="check its name|check the path"):
        remote.local(path)


def test_a_model_in_a_bucket_is_fetched_once_and_again_when_it_changes(machine, capsys):
    folder = remote.open_path("gs://bucket/models/tiny")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    found = remote.local("gs://bucket/models/tiny")
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert capsys.readouterr().err.count("fetching") == 2
    assert remote.local("gs://bucket/models/tiny") == found
    assert "fetching" not in capsys.readouterr().err
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").unlink()
    remote._fetched.cache_clear()  # as in another process
    assert {p.name for p in remote.local("gs://bucket/models/tiny").iterdir()} == {"config.json"}
    assert (remote.local("gs://bucket/models/tiny") / "config.json").read_text() == '{"a": 1}'


@pytest.mark.fault
def test_a_checkpoint_in_the_bucket_has_the_metrics_of_its_steps_beside_it(machine):
    url = "gs://bucket/runs/checkpoint"
    with bucket.opened(url) as path, checkpoints.Checkpoints(path / "c", keep=1) as saved:
        for step in (1, 2):
            with (path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
            saved.save(step, nnx.State({"w": nnx.Param(jnp.ones(3))}))
            with bucket.opened(url, read_only=True) as there:  # as another machine after a kill
                rows = metrics.read_metrics(there / "metrics.jsonl")
            assert [row["step"] for row in rows] == list(range(1, step + 1))


@pytest.mark.fault
def test_a_run_killed_in_training_ends_the_same_on_another_machine(
    straight, config, storage, tmp_path
):
    url = "gs://bucket/runs/killed"
    one, two = ({"TRACE_JAX_CACHE": str(tmp_path / n)} | storage for n in ("one", "two"))
    process = runs.start(config, url, **one)
    deadline = time.monotonic() + children.PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if list((tmp_path / "one").rglob("checkpoints/began.json")):
            time.sleep(1.0)
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "one")
    done = runs.run(config, url, **two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[align] done before, skipped" in done.stderr
    (path,) = (tmp_path / "two" / "workdirs").glob("killed-*/p0")
    runs.assert_same_end(path, straight[0])
    status = [sys.executable, "-m", "trace_jax.status", url, "--json"]
    told = subprocess.run(status, cwd=ROOT, env=os.environ | two, capture_output=True, text=True)
    states = [row["state"] for row in json.loads(told.stdout)["stages"]]
    assert set(states) == {"done"}
    kept = bucket_listing(url, two)
    assert any("/.checkpoints/checkpoints/4/" in name for name in kept)
    assert not [name for name in kept if name.endswith("/.owner.json")]


def bucket_listing(url: str, environment: dict[str, str]) -> list[str]:
    program = (
        "import sys; from trace_jax import remote\n"
        "def walk(p):\n"
        "    for q in p.iterdir():\n"
        "        print(q) if not q.is_dir() else walk(q)\n"
        "walk(remote.open_path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, url]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.fault
@pytest.mark.soak
def test_a_bucket_that_nobody_can_reach_is_one_line_and_exit_code_75(config, tmp_path):
    nobody = "http://127.0.0.1:9"
    environment = {"STORAGE_EMULATOR_HOST": nobody, "TRACE_JAX_CACHE": str(tmp_path)}
    done = runs.run(config, "gs://bucket/runs/x", NO_GCE_CHECK="true", **environment)
    assert done.returncode == 75 and "the bucket cannot be reached" in done.stderr.splitlines()[-1]
