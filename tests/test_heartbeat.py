"""Signs of life, and who keeps whom waiting."""

import json
import re
import time

import pytest

from trace_jax import heartbeat, locks, metrics, records, status


@pytest.fixture
def told() -> list[str]:
    return []


def _until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_sign_says_what_is_done_and_is_gone_in_the_end(tmp_path):
    with heartbeat.beating(tmp_path, stuck_after=0, interval=0.01):
        with heartbeat.doing("stage triage"), metrics.progress(4, "triage by rules") as bar:
            bar.advance(3)
            _until(lambda: [r["doing"] for r in heartbeat.read(tmp_path)]
                   == ["stage triage, triage by rules 3/4"])  # fmt: skip
        _until(lambda: heartbeat.read(tmp_path)[0]["doing"] == "")
        assert not heartbeat.is_dead(heartbeat.read(tmp_path)[0])
    assert not (tmp_path / heartbeat.FOLDER).exists()


def test_what_moves_is_never_called_stuck(tmp_path, told):
    with heartbeat.beating(tmp_path, stuck_after=0.3, interval=0.01, say=told.append):
        for _ in range(60):
            heartbeat.moved()
            time.sleep(0.01)
    assert told == []


def test_a_stuck_judge_is_named_again_after_twice_as_long(tmp_path, told):
    with (
        heartbeat.beating(tmp_path, stuck_after=0.1, interval=0.01, say=told.append),
        heartbeat.doing("triage by gemini:model"),
    ):
        _until(lambda: len(told) == 2)
    assert all("triage by gemini:model" in line for line in told)
    seconds = [float(line.split("for ")[1].split(" s")[0]) for line in told]
    assert seconds == sorted(seconds)


def test_a_stuck_collective_names_who_is_late_dead_or_gone(tmp_path, told):
    folder = tmp_path / heartbeat.FOLDER
    folder.mkdir()
    now = time.time()
    others = {1: "waiting for the other processes (before train)", 2: "stage triage", 3: "train 7"}
    for process, doing in others.items():
        sign = {"process": process, "host": f"host{process}", "pid": 1, "doing": doing,
                "since": now - 900, "time": now - 800 if process == 3 else now}  # fmt: skip
        (folder / f"{process}.json").write_text(json.dumps(sign))
    (folder / "9.json").write_text('{"process": 9')  # cut off
    with (
        heartbeat.beating(tmp_path, stuck_after=0.05, interval=0.01, processes=5, say=told.append),
        heartbeat.doing("waiting for the other processes (before train)"),
    ):
        _until(lambda: told)
    assert "process 1" not in told[0]
    assert "process 2 on host2 does: stage triage" in told[0]
    assert "process 3 on host3 gives no sign of life" in told[0]
    assert "process 4 has not begun, or is gone" in told[0]


def test_status_shows_the_signs_of_a_run_at_work(tmp_path, capsys):
    records.write_json(tmp_path / "config.json", {})
    beating = heartbeat.beating(tmp_path, stuck_after=0, interval=0.01)
    with locks.of(tmp_path), beating, heartbeat.doing("stage align"):
        _until(lambda: [r["doing"] for r in status.of(tmp_path)["processes"]] == ["stage align"])
        assert status.main([str(tmp_path)]) == 0
    assert re.search(r"stage align \(last progress \d+ s ago\)", capsys.readouterr().out)
    assert status.of(tmp_path)["processes"] == []


@pytest.mark.fault
def test_a_disk_that_takes_nothing_stops_no_run(tmp_path, told):
    (tmp_path / heartbeat.FOLDER).write_text("a file where the folder should be")
    with heartbeat.beating(tmp_path, stuck_after=0.05, interval=0.01, say=told.append):
        _until(lambda: told)


def test_a_speed_is_counted_from_the_first_item_on(monkeypatch):
    """What comes before it is compilation."""
    clock = iter([0.0, 0.0, 60.0, 62.0, 64.0])
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(clock))
    with heartbeat.doing("train", total=10, first=3):
        heartbeat.moved(done=4)
        first = heartbeat._state.counted()
        assert (first["first"], first["done"], first["seconds"]) == (4, 4, 0.0)
        heartbeat.moved(done=6)
        later = heartbeat._state.counted()
        assert (later["first"], later["done"], later["seconds"]) == (4, 6, 2.0)
