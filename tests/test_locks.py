"""Two runs in one workdir: the second is refused, unless the first is dead."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import children
import pytest
from faults import runs

from trace_jax import heartbeat, locks, stages, workdir
from trace_jax.errors import InputError

HOLD = "import sys, time; from pathlib import Path; from trace_jax import locks\n"
HOLD += "with locks.of(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_is_there(holder, tmp_path):
    with pytest.raises(InputError, match=f"another run is at work there .process {holder.pid} on"):
        with locks.of(tmp_path / "run"):
            pass
    with locks.of(tmp_path / "other"):
        pass


@pytest.mark.fault
def test_a_dead_owner_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.of(tmp_path / "run"):
        pass


def test_the_lock_ends_with_its_block_and_leaves_an_empty_file(tmp_path):
    for _ in range(2):
        with locks.of(tmp_path), pytest.raises(InputError, match="another run"):
            with locks.of(tmp_path):
                pass
        assert (tmp_path / locks.NAME).read_bytes() == b""


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        with locks.of(tmp_path / "file" / "run"):
            pass


@pytest.fixture
def elsewhere(monkeypatch):
    """This process is on another machine than the holder of a lock, and waits for 5 s."""
    monkeypatch.setattr(locks.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(locks, "_LEASE", 5.0)


@pytest.mark.fault
def test_a_lock_of_a_machine_that_is_gone_is_waited_for(holder, elsewhere, tmp_path, capsys):
    """A file server keeps it for a while, and a launcher starts the job elsewhere at once."""
    threading.Timer(1.5, holder.kill).start()
    with locks.of(tmp_path / "run"):
        pass
    assert "was at work there a moment ago; waiting" in capsys.readouterr().err


def test_one_of_a_machine_that_gives_signs_of_life_is_not(holder, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_LEASE", 600.0)
    folder = tmp_path / "run" / heartbeat.FOLDER
    folder.mkdir()
    sign = {"process": 0, "host": "a", "pid": 1, "doing": "stage train", "since": 1.0}
    (folder / "0.json").write_text(json.dumps(sign | {"time": 1.0}))
    threading.Timer(1.5, (folder / "0.json").write_text, [json.dumps(sign | {"time": 2.0})]).start()
    with pytest.raises(InputError, match="another run is at work there"):
        with locks.of(tmp_path / "run"):
            pass


def test_one_that_comes_to_its_end_meanwhile_is(holder, elsewhere, tmp_path):
    """Its signs of life go away before its lock."""
    sign = tmp_path / "run" / heartbeat.FOLDER / "0.json"
    sign.parent.mkdir()
    row = {"process": 0, "host": "a", "pid": 1, "doing": "", "since": 1.0, "time": 1.0}
    sign.write_text(json.dumps(row))
    threading.Timer(1.0, sign.unlink).start()
    threading.Timer(3.0, holder.kill).start()
    with locks.of(tmp_path / "run"):
        pass


def test_nor_one_that_stays(holder, elsewhere, tmp_path):
    begin = time.monotonic()
    with pytest.raises(InputError, match="another run is at work there"):
        with locks.of(tmp_path / "run"):
            pass
    assert time.monotonic() - begin > 4


@pytest.mark.fault
def test_the_program_is_refused(holder, config, tmp_path):
    command = [sys.executable, "-m", "trace_jax.launch", f"--config={config}"]
    command += [f"--workdir={tmp_path / 'run'}", "--stages=prepare"]
    begin = time.monotonic()
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(said) == 1 and "another run is at work there" in said[0]
    assert time.monotonic() - begin < 30


@pytest.mark.fault
def test_of_two_runs_the_second_is_refused_until_the_first_is_dead(straight, config, tmp_path):
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    workdir.Workdir(path).forget("report", stages.STAGES[-1].artefacts)
    first, lock = runs.start(config, path), path / locks.NAME
    try:
        end = time.monotonic() + children.PATIENCE
        while not lock.read_text() and time.monotonic() < end:
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGSTOP)  # so that it is not done before the second comes
        assert json.loads(lock.read_text())["process"] == first.pid
        said = runs.error_of(runs.run(config, path))
        assert f"another run is at work there (process {first.pid} on" in said
        assert "wait for its end, or use another --workdir" in said
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert not (path / "report.html").exists()
    third = runs.run(config, path)
    assert third.returncode == 0, third.stderr[-2000:]
    assert "[report]\n" in third.stderr and (path / "report.html").exists()
    runs.assert_same_end(path, straight[0])


def test_a_look_at_the_lock_keeps_nobody_out(tmp_path):
    """As `status` looks: shared, and not for long."""
    with locks.of(tmp_path):
        pass
    with open(tmp_path / locks.NAME) as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(look, fcntl.LOCK_UN)).start()
        with locks.of(tmp_path):
            pass
