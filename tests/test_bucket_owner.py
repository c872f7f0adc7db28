"""Who is at work in a workdir in a bucket, on a real storage server on loopback."""

import json
import socket
import threading
import time

import pytest

from trace_jax import bucket, bucket_owner, remote
from trace_jax.errors import InputError

pytest.importorskip("gcsfs", reason="needs the extra gcs")


def _signs_elsewhere(url: str, ago: float = 0.0, host: str = "elsewhere"):
    owner = remote.open_path(url) / ".owner.json"
    owner.parent.mkdir(parents=True, exist_ok=True)
    sign = {"host": host, "copy": "another", "since": "12:00", "time": time.time() - ago}
    owner.write_text(json.dumps(sign))
    return owner


@pytest.mark.fault
@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])  # pods may share a name
def test_a_run_elsewhere_holds_the_workdir_until_it_is_silent(machine, monkeypatch, host):
    url = f"gs://bucket/runs/held-by-{host}"
    _signs_elsewhere(url, host=host)
    assert bucket.owner(url)["host"] == host
    threading.Timer(1.0, _signs_elsewhere, [url, 0.0, host]).start()  # its next sign of life
    with pytest.raises(InputError, match=f"another run is at work there .on {host}"):
        with bucket.opened(url):
            pass
    monkeypatch.setattr(bucket_owner, "_STALE", 2.0)
    owner = _signs_elsewhere(url, host=host)
    with bucket.opened(url):
        assert json.loads(owner.read_text())["host"] == socket.gethostname()
    assert not owner.exists()


def test_after_a_kill_the_same_machine_goes_on_at_once(machine, capsys):
    url = "gs://bucket/runs/killed-here"
    with bucket.opened(url):
        left = (remote.open_path(url) / ".owner.json").read_text()
    (remote.open_path(url) / ".owner.json").write_text(left)  # as a kill leaves it
    with bucket.opened(url):
        pass
    assert "waiting" not in capsys.readouterr().err


@pytest.mark.fault
@pytest.mark.parametrize("ahead", [0, 3600, -3600])
def test_one_that_was_there_a_moment_ago_and_is_gone_is_waited_for(
    machine, monkeypatch, capsys, ahead
):
    """A launcher starts the job elsewhere at once; clocks may differ."""
    monkeypatch.setattr(bucket_owner, "_STALE", 3.0)
    url = f"gs://bucket/runs/gone{ahead}"
    owner = _signs_elsewhere(url, ago=-ahead)
    with bucket.opened(url):
        assert json.loads(owner.read_text())["host"] == socket.gethostname()
    assert "a run on elsewhere was at work there a moment ago; waiting" in capsys.readouterr().err


@pytest.mark.fault
def test_a_run_whose_clock_is_slow_is_at_work_all_the_same(machine):
    url = "gs://bucket/runs/slow-clock"
    _signs_elsewhere(url, ago=999)
    threading.Timer(1.0, _signs_elsewhere, [url, 998.0]).start()
    with pytest.raises(InputError, match="another run is at work there"), bucket.opened(url):
        pass


@pytest.mark.fault
def test_a_run_that_was_taken_over_writes_nothing_more(machine):
    url = "gs://bucket/runs/over"
    with pytest.raises(InputError, match="took this workdir over.*on elsewhere"):
        with bucket.opened(url) as path:
            (path / "a.txt").write_text("mine")
            bucket.publish()
            owner = _signs_elsewhere(url)
            (path / "a.txt").write_text("too late")
            bucket.publish()
    assert json.loads(owner.read_text())["host"] == "elsewhere"  # it is not given free for another
    listed = sorted((remote.open_path(url) / ".files").iterdir())
    assert [file.name for file in listed] == ["0-1.json"]
    assert (remote.open_path(url) / "a.txt").read_text() == "mine"


@pytest.mark.fault
def test_a_long_upload_gives_signs_of_life(machine, monkeypatch):
    url, upload = "gs://bucket/runs/slow", remote.upload
    monkeypatch.setattr(bucket_owner, "_PERIOD", 0.2)

    def slowly(file, target):
        time.sleep(2.0)
        upload(file, target)

    with bucket.opened(url) as path:
        (path / "a.txt").write_text("a")
        monkeypatch.setattr(remote, "upload", slowly)
        owner, times = remote.open_path(url) / ".owner.json", set()
        uploading = threading.Thread(target=bucket.publish)
        uploading.start()
        while uploading.is_alive():
            times.add(json.loads(owner.read_text())["time"])
            time.sleep(0.1)
    assert len(times) > 4
