"""Metrics in TensorBoard and W&B, read back by their own programs."""

import importlib
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from trace_jax import config as config_lib
from trace_jax import metrics, tracking


def _settings(**changes) -> dict:
    return config_lib.base_config().tracking.to_dict() | changes


def _read(folder, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def _write(directory, *, resume_after: int, rows: dict) -> None:
    with (
        tracking.to(_settings(), directory, {}),
        metrics.MetricsWriter(directory / "metrics.jsonl", resume_after=resume_after) as writer,
    ):
        for step, value in rows.items():
            writer.write(step, {"loss/total": value})


def test_tensorboard_shows_what_metrics_jsonl_holds(tmp_path):
    _write(tmp_path, resume_after=0, rows={1: 3.0, 2: 2.0, 3: 1.5, 4: 9.0})
    _write(tmp_path, resume_after=2, rows={3: 1.25, 4: math.inf})  # killed after 4, saved at 2
    assert _read(tmp_path / "tensorboard" / "train", "loss/total") == [
        (1, 3.0), (2, 2.0), (3, 1.25), (4, math.inf),
    ]  # fmt: skip
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.fault
def test_a_kill_loses_no_event_of_a_step_that_is_saved(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with (
        tracking.to(_settings(), tmp_path, {}),
        metrics.MetricsWriter(path, resume_after=0) as writer,
    ):
        writer.write(1, {"loss/total": 3.0})
        writer.write(2, {"loss/total": 2.0})
        writer.sync()  # as before a checkpoint
        shutil.copytree(tmp_path / "tensorboard", tmp_path / "killed")
    assert _read(tmp_path / "killed" / "train", "loss/total") == [(1, 3.0), (2, 2.0)]


def test_each_training_has_a_folder(tmp_path):
    (tmp_path / "ref_checkpoints").mkdir()
    _write(tmp_path / "ref_checkpoints", resume_after=0, rows={1: 3.0})
    assert (tmp_path / "ref_checkpoints" / "tensorboard" / "ref").is_dir()


def test_pytorch_is_not_imported_for_it_and_can_be_imported_after(tmp_path):
    pytest.importorskip("torch")
    program = f"""
import sys
from pathlib import Path
from trace_jax import config, tracking
with tracking.to(config.base_config().tracking.to_dict(), Path({str(tmp_path)!r}), {{}}):
    tracking.scalars("train", 1, {{"loss/total": 1.0}})
assert {{"torch", "google.cloud.storage", "boto3"}}.isdisjoint(sys.modules)
import torch
torch.zeros(1)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert _read(tmp_path / "tensorboard" / "train", "loss/total") == [(1, 1.0)]


def test_off_writes_nothing_and_no_sink_outlives_its_run(tmp_path):
    with tracking.to(_settings(tensorboard=False), tmp_path, {}):
        tracking.scalars("train", 1, {"a": 1.0})
    with tracking.to(_settings(), tmp_path / "on", {}):
        pass
    tracking.scalars("train", 1, {"a": 1.0})
    assert not list(tmp_path.rglob("*tfevents*"))


def _wandb_records(path):
    """Records of an offline run: a log in blocks of 32 KiB, as of LevelDB, behind 7 bytes."""
    internal = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = internal.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_holds_the_steps_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for step in (1, 2):
        with tracking.to(_settings(wandb="trace"), tmp_path, {"train.beta": 0.1}):
            tracking.scalars("train", step, {"loss/total": 3.0 / step})
        time.sleep(1.1)  # its folders are named by the second
    runs, rows = set(), []
    for path in sorted(tmp_path.rglob("*.wandb")):
        for record in _wandb_records(path):
            if record.HasField("run"):
                runs.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: i.value_json for i in items})
    assert runs == {(tmp_path / ".wandb_id").read_text()}
    found = [(int(r["train/step"]), float(r["train/loss/total"])) for r in rows]
    assert found == [(1, 3.0), (2, 1.5)]


class _Service:
    """Stands for package wandb and its service: rows of each run; a resumed run has a summary."""

    def __init__(self):
        self.rows: dict[str, list[dict]] = {}

    def Settings(self, **_):
        return None

    def init(self, *, id, **_):
        rows = self.rows.setdefault(id, [])
        summary = {key: value for row in rows for key, value in row.items()}
        return types.SimpleNamespace(
            log=rows.append, summary=summary, finish=lambda: None, define_metric=lambda *_, **__: 0
        )


@pytest.mark.fault
def test_wandb_is_told_no_step_twice(tmp_path, monkeypatch):
    service = _Service()
    monkeypatch.setitem(sys.modules, "wandb", service)

    def told(*steps: int) -> None:
        with tracking.to(_settings(tensorboard=False, wandb="trace"), tmp_path, {}):
            for step in steps:
                tracking.scalars("train", step, {"loss": 1.0})

    def steps() -> list[list[int]]:
        return [[row["train/step"] for row in rows] for rows in service.rows.values()]

    told(1, 2, 3, 4, 5)  # killed
    told(4, 5, 6, 7)  # from the checkpoint at 3
    assert steps() == [[1, 2, 3, 4, 5, 5, 6, 7]]  # the last may have more to tell
    told(1, 2)  # trained anew
    told(2, 3)
    assert steps()[1:] == [[1, 2, 2, 3]]
    assert list(service.rows)[1] == (tmp_path / ".wandb_id").read_text()


@pytest.mark.fault
def test_a_wandb_id_that_a_power_cut_emptied_is_another_one(tmp_path, monkeypatch):
    service = _Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    (tmp_path / ".wandb_id").write_text("")
    with tracking.to(_settings(tensorboard=False, wandb="trace"), tmp_path, {}):
        pass
    assert list(service.rows) == [(tmp_path / ".wandb_id").read_text()] != [""]


def test_wandb_without_a_key_is_one_line(tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc"),
                   "WANDB_BASE_URL": "http://127.0.0.1:9", "JAX_PLATFORMS": "cpu"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "trace_jax.launch", "--config=configs/quickstart.py",
         f"--workdir={tmp_path / 'run'}", "--config.tracking.wandb=trace"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [t for t in done.stderr.splitlines() if t.startswith("error:")]
    assert "refuses the run" in line and "set WANDB_API_KEY" in line
