"""The Colab notebook installs itself, runs from top to bottom, holds no output and no secret."""

import ast
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
nbformat = pytest.importorskip("nbformat")
CELLS = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
SMALL = {"data.pairs": 120, "data.test_prompts": 20, "data.validation_prompts": 10,
         "model.scratch.training.total_steps": 40, "align.total_steps": 20,
         "train.total_steps": 20, "impact.gold_size": 30}  # fmt: skip


def test_it_is_valid_and_has_neither_outputs_nor_secrets():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert not re.search(r"hf_\w{20,}|AIza[\w-]{30,}|sk-\w{20,}", NOTEBOOK.read_text())


def test_no_cell_imports_jax():
    """The kernel would hold the TPU, or most of a GPU's memory, while the run needs it."""
    imported = {
        name.split(".")[0]
        for cell in CELLS
        for node in ast.walk(ast.parse(cell))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom)
            else []
        )
    }  # fmt: skip
    assert "trace_jax" in imported
    assert not imported & {"jax", "jaxlib", "flax", "optax", "orbax", "libtpu"}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Runs the first cell as on a machine without trace_jax; -> what pip is told."""
    told = tmp_path / "told"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{told}\n')
    python.chmod(0o755)
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin:/bin")
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)
    found = glob.glob
    monkeypatch.setattr(glob, "glob", lambda path: [] if path[:5] == "/dev/" else found(path))

    def run(source: str = "") -> str:
        assert CELLS[0].count('SOURCE = ""') == 1
        exec(CELLS[0].replace('SOURCE = ""', f"SOURCE = {source!r}"), {})
        *pip, wanted = told.read_text().splitlines()
        assert pip == ["-m", "pip", "install", "-q"]
        return wanted

    return run


def _nvidia_smi(folder: Path, code: int) -> None:
    program = folder / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("git+https://host/me/clone.git", "git+https://host/me/clone.git"),
        ("https://host/me/clone", "git+https://host/me/clone"),
        ("https://host/trace_jax-0.1.0-py3-none-any.whl",) * 2,
        (" git+ssh://git@host/clone ", "git+ssh://git@host/clone"),
    ],
)
def test_an_address_is_installed_as_it_is(installed, given, wanted):
    assert installed(given) == f"trace_jax @ {wanted}"


def test_what_was_uploaded_last_is_installed(installed, tmp_path):
    for age, name in enumerate(("trace_jax-0.1.0-py3-none-any.whl", "trace_jax.zip", "other.whl")):
        (tmp_path / "files" / name).touch()
        os.utime(tmp_path / "files" / name, (1e9 - age, 1e9 - age))
    first = tmp_path / "files" / "trace_jax-0.1.0-py3-none-any.whl"
    assert installed() == f"trace_jax @ file://{first}"
    assert installed("trace_jax.zip") == f"trace_jax @ file://{tmp_path}/files/trace_jax.zip"


@pytest.mark.parametrize("given", ["", "trace_jax", "no/such/folder"])
def test_without_a_source_nothing_is_installed(installed, tmp_path, given):
    """Least of all what an index holds under that name."""
    with pytest.raises(SystemExit) as stop:
        installed(given)
    assert ("upload the wheel" if not given else f"SOURCE={given} is neither") in str(stop.value)
    assert not (tmp_path / "told").exists()


def test_the_runtime_decides_what_comes_with_it(installed, tmp_path, monkeypatch):
    address = "git+https://host/clone"
    assert installed(address).startswith("trace_jax @")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    assert installed(address).startswith("trace_jax[tpu] @")
    _nvidia_smi(tmp_path, code=9)  # the program without a driver
    assert installed(address).startswith("trace_jax[tpu] @")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    assert installed(address).startswith("trace_jax @")
    monkeypatch.setattr(glob, "glob", lambda path: ["/dev/vfio/0"] if "vfio" in path else [])
    assert installed(address).startswith("trace_jax[tpu] @")
    _nvidia_smi(tmp_path, code=0)
    assert installed(address).startswith("trace_jax[cuda] @")


@pytest.mark.soak
def test_the_wheel_is_installed_where_nothing_is_and_plans(tmp_path):
    """The cells up to the plan, in a clean virtual environment beside an uploaded wheel."""
    tree, left_out = tmp_path / "tree", shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=left_out)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (tmp_path / "cells.py").write_text("\n".join(CELLS[:3]))
    environment = os.environ | {
        "TRACE_VARIANT": "smoke", "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PATH": "/usr/bin:/bin", "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-I", "cells.py"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for said in ("installing trace_jax @ file://", "CpuDevice", "configs/gemma2b.py:smoke"):
        assert said in done.stdout


def test_it_runs_to_its_end(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TRACE_VARIANT", "smoke")
    monkeypatch.setenv("TRACE_FLAGS", " ".join(f"--config.{k}={v}" for k, v in SMALL.items()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XLA_FLAGS", children.ONE_DEVICE)  # as Colab has
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    after = "import sys\n'jax' in sys.modules"  # what the kernel holds when all is done
    notebook.cells.append(nbformat.v4.new_code_cell(after))
    run = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=children.PATIENCE, kernel_name="python3", resources=run
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "re-aligned: " in printed and "comply with the new policy" in printed
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "False"
    (shown,) = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    assert "<iframe srcdoc=" in shown and "&lt;title&gt;" in shown
    assert (tmp_path / "runs" / "colab" / "report.html").exists()
    assert (tmp_path / "runs" / "colab" / "model" / "model.safetensors").exists()
