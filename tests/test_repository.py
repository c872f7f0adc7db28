import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import children
import pytest
from packaging import requirements

import trace_jax

ROOT = Path(__file__).resolve().parents[1]
# Modules that a laptop without jax can import, in milliseconds.
LIGHT = (
    "config", "errors", "judges", "methods", "metrics", "policy", "records", "report", "sources",
    "synth", "triage", "workdir",
)  # fmt: skip
# Spelt apart, so that this file holds none of them.
FORBIDDEN = ("TO" + "DO", "FIX" + "ME", "pypi" + ".org", "python" + "hosted", "npm" + "js")
MAX_LINES = 400


def _tracked() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _setup_arguments() -> dict:
    """What setup.py passes to setuptools, without running a build."""
    seen = {}
    stub = types.ModuleType("setuptools")
    stub.setup = seen.update
    stub.find_packages = lambda include: include
    real = sys.modules.get("setuptools")
    sys.modules["setuptools"] = stub
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        sys.modules.pop("setuptools")
        if real is not None:
            sys.modules["setuptools"] = real
    return seen


def test_the_package_imports_in_under_a_second():
    code = """
import sys
import trace_jax
assert "jax" not in sys.modules and "numpy" not in sys.modules
"""
    assert children.cpu_seconds(code, below=1.0) < 1.0


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_never_import_jax(module):
    _python(f"import sys, trace_jax.{module}; assert 'jax' not in sys.modules, 'imports jax'")


def test_submodules_load_on_first_use():
    _python("import trace_jax; trace_jax.metrics.say('loaded')")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = trace_jax.nonsense


def test_one_version():
    assert _setup_arguments()["version"] == trace_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", trace_jax.__version__)


def test_constraints_pin_every_requirement():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), line
            name, version = line.split("==")
            pins[re.sub("[-_.]+", "-", name).lower()] = version
    arguments = _setup_arguments()
    for text in arguments["install_requires"] + arguments["extras_require"]["test"]:
        wanted = requirements.Requirement(text)
        pin = pins[re.sub("[-_.]+", "-", wanted.name).lower()]
        assert wanted.specifier.contains(pin), f"constraints.txt pins {wanted.name}=={pin}"


def test_data_files_are_packaged():
    patterns = _setup_arguments()["package_data"]["trace_jax"]
    packaged = {path for pattern in patterns for path in (ROOT / "trace_jax").glob(pattern)}
    data = {
        p
        for p in _tracked()
        if p.suffix in (".yaml", ".j2", ".css", ".js") and ROOT / "trace_jax" in p.parents
    }
    assert data and data == packaged


def test_packages_have_an_init_file():
    folders = {
        path.parent for path in _tracked() if path.suffix == ".py" and "trace_jax" in path.parts
    }
    assert all((folder / "__init__.py").is_file() for folder in folders if folder != ROOT)


def test_no_forbidden_words():
    found = []
    for path in _tracked():
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_modules_stay_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in _tracked()
        if path.suffix == ".py" and path.parent != ROOT / "tests"
    }
    assert {name: n for name, n in lengths.items() if n >= MAX_LINES} == {}


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert _setup_arguments()["license"] == "Apache-2.0"


@pytest.fixture
def built(tmp_path) -> Path:
    """A checkout in which things were built and run."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("trace_jax", "tests", "configs", "bench", "build", ".venv", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "judgements.sqlite").write_text("paid for")
    return tmp_path


def _make(target: str, where: Path, said: str = "") -> str:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", target], cwd=where, input=said, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cleaning_leaves_runs_alone(built):
    _make("clean", built)
    assert not (built / ".venv").exists() and not (built / "build").exists()
    assert (built / "runs" / "mine" / "judgements.sqlite").exists()


@pytest.mark.parametrize(("said", "stays"), [("y\n", False), ("n\n", True), ("\n", True)])
def test_runs_are_deleted_after_a_question(built, said, stays):
    told = _make("clean-runs", built, said)
    assert "runs/mine" in told and "paid judgements? [y/N]" in told
    assert (built / "runs").exists() is stays


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
