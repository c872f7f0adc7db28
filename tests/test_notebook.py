"""The Colab notebook runs from top to bottom, holds no output and no secret."""

import os
import re
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
nbformat = pytest.importorskip("nbformat")


def test_it_is_valid_and_has_neither_outputs_nor_secrets():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert not re.search(r"hf_\w{20,}|AIza[\w-]{30,}|sk-\w{20,}", NOTEBOOK.read_text())


def test_it_runs_to_its_end(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TRACE_VARIANT", "smoke")
    small = {"data.pairs": 120, "data.test_prompts": 20, "data.validation_prompts": 10,
             "model.scratch.training.total_steps": 40, "align.total_steps": 20,
             "train.total_steps": 20, "impact.gold_size": 30}  # fmt: skip
    monkeypatch.setenv("TRACE_FLAGS", " ".join(f"--config.{k}={v}" for k, v in small.items()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=children.PATIENCE, kernel_name="python3", resources=run
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "re-aligned: " in printed and "comply with the new policy" in printed
    assert (tmp_path / "runs" / "colab" / "report.html").exists()
    assert (tmp_path / "runs" / "colab" / "model" / "model.safetensors").exists()
