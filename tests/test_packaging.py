"""What a wheel and a source archive hold, and that the wheel works where no checkout is."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import trace_jax

ROOT = Path(__file__).parent.parent


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A source archive of the tracked and new files, and the wheel that is built from it."""
    tree = tmp_path_factory.mktemp("tree")
    listed = _run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", str(out), str(tree), cwd=tree)
    return out


def _wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_its_data_and_the_configs(built):
    with zipfile.ZipFile(_wheel(built)) as wheel:
        names = set(wheel.namelist())
        (described,) = [n for n in names if n.endswith("METADATA")]
        metadata = wheel.read(described).decode()
    shipped = {
        f"trace_jax/{p.relative_to(ROOT / 'trace_jax')}"
        for pattern in ("**/*.py", "policies/*.yaml", "templates/*")
        for p in (ROOT / "trace_jax").glob(pattern)
    }
    shipped |= {f"trace_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert shipped <= names, shipped - names
    assert not [n for n in names if n.startswith(("tests/", "bench/"))]
    assert f"Version: {trace_jax.__version__}\n" in metadata
    assert any(n.endswith("LICENSE") for n in names)


def test_the_source_archive_holds_what_a_checkout_has(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as found:
        names = {name.partition("/")[2] for name in found.getnames()}
    for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt",
                 "configs/quickstart.py", "tests/test_losses.py", "bench/impact.py",
                 "launch/tpu_pod.sh", "docs/methods.md"):  # fmt: skip
        assert name in names


def test_an_installed_wheel_finds_the_configs_anywhere(built, tmp_path):
    site = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site),
         str(_wheel(built)), cwd=tmp_path)  # fmt: skip
    printed = _run(
        sys.executable, "-m", "trace_jax.launch", "--config=configs/gemma9b.py:smoke", "--plan",
        "--json", cwd=tmp_path, PYTHONPATH=str(site), JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert json.loads(printed)["fits"] is True
    where = _run(sys.executable, "-c", "import trace_jax; print(trace_jax.__file__)",
                 cwd=tmp_path, PYTHONPATH=str(site))  # fmt: skip
    assert Path(where.strip()).is_relative_to(site)
    assert not list(tmp_path.glob("runs"))


def test_every_place_names_the_same_version():
    for name, text in (("CHANGELOG.md", "## {}"), ("CITATION.cff", "\nversion: {}\n")):
        assert text.format(trace_jax.__version__) in (ROOT / name).read_text()
