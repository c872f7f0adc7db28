import json
import os
import pty
import subprocess
import sys

import pytest

from trace_jax import metrics
from trace_jax.errors import InputError


def _write(path, steps, resume_after=0):
    with metrics.MetricsWriter(path, resume_after=resume_after) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 2})


def test_rows_are_appended_and_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = metrics.MetricsWriter(path, resume_after=0)
    writer.write(1, {"train/loss": 0.5, "train/kl": 0})
    assert path.read_text() == '{"step": 1, "train/loss": 0.5, "train/kl": 0.0}\n'
    writer.close()


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 6))
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')
    _write(path, (4, 5), resume_after=3)
    straight = tmp_path / "straight.jsonl"
    _write(straight, range(1, 6))
    assert path.read_text() == straight.read_text()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "straight.jsonl"]


@pytest.mark.fault
def test_steps_that_a_power_cut_took_are_told(tmp_path, capsys):
    """Their checkpoint is there: it was on the disk before them."""
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    _write(path, (4, 5), resume_after=3)
    assert capsys.readouterr().err == ""
    _write(path, (9,), resume_after=8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"  warning: {path} lacks 3 of the 8 steps before this one; ")


def test_a_fresh_run_forgets_the_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 6))
    _write(path, (1,))
    assert [row["step"] for row in metrics.read_metrics(path)] == [1]


def test_resume_without_a_file_starts_one(tmp_path):
    _write(tmp_path / "metrics.jsonl", (4,), resume_after=3)
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [4]


def test_a_killed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 6))
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.MetricsWriter(path, resume_after=2)
    assert path.read_text() == before


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path, resume_after=0) as writer:
        writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2 is not JSON"):
        metrics.read_metrics(path)


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    with metrics.progress(106, "judging [red]pairs", start=100) as bar:
        for _ in range(6):
            now += 6.0
            bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "judging [red]pairs: 102/106 in 12 s, about 24 s left",
        "judging [red]pairs: 104/106 in 24 s, about 12 s left",
        "judging [red]pairs: 106/106 in 36 s",
    ]


def test_the_first_item_compiles_and_says_nothing_of_the_others(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    with metrics.progress(12, "train") as bar:
        for seconds in (11.0, 5.0, 5.0, *[1.0] * 9):
            now += seconds
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "train: 1/12 in 11 s",
        "train: 3/12 in 21 s, about 45 s left",
        "train: 12/12 in 30 s",
    ]


def test_progress_without_a_total(capsys):
    with metrics.progress(None, "reading") as bar:
        bar.advance(40)
        bar.advance(2)
    assert capsys.readouterr().err == "reading: 42 in 0 s\n"


def test_progress_on_a_terminal_is_a_live_bar():
    code = """
from trace_jax import metrics
with metrics.progress(5, "steps [red]", 2) as bar:
    bar.advance(3)
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env=environment)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "\x1b[" in shown and "5/5" in shown and "steps [red]" in shown


def test_say_is_one_plain_line_on_stderr(capsys):
    metrics.say("[train] " + "x" * 300)
    assert capsys.readouterr() == ("", "[train] " + "x" * 300 + "\n")


@pytest.mark.parametrize(("seconds", "shown"), [(3.4, "3 s"), (75, "1 min 15 s"), (7200, "2.0 h")])
def test_durations(seconds, shown):
    assert metrics.duration(seconds) == shown


def test_table_prints_plain_cells(capsys):
    rows = [{"model": "[bold]base", "rate": 0.123456}, {"model": "x" * 100, "rate": 1.0}]
    metrics.table("Results", rows)
    out = capsys.readouterr().out
    assert "[bold]base" in out and "0.1235" in out and "x" * 100 in out
    metrics.table("Nothing", [])
