"""Every command and code block of the documentation runs, and the site has no broken link.

In place of the quickstart's config stands one that takes seconds. A block that cannot run says why
in a comment right before it: <!-- not run: ... -->.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[1]
# In the order in which a newcomer reads them; what one makes the next may use.
PAGES = ("docs/getting_started.md", "docs/own_model.md", "README.md", "docs/running.md",
         "docs/evaluation.md", "docs/development.md")  # fmt: skip
_BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<kind>bash|python)\n(?P<code>.*?)\n```", re.DOTALL)


def _blocks(page: Path) -> list[tuple[str, str]]:
    """(bash or python, code) of what is to be run."""
    found = _BLOCK.finditer(page.read_text())
    return [(m["kind"], m["code"]) for m in found if not m["before"].startswith("<!-- not run")]


@pytest.fixture(scope="module")
def checkout(config, tmp_path_factory) -> Path:
    """The checkout, with the quick config as configs/quickstart.py."""
    path = tmp_path_factory.mktemp("checkout")
    for item in ROOT.iterdir():
        if item.name not in ("configs", "runs", "build") and not item.name.startswith("."):
            (path / item.name).symlink_to(item)
    shutil.copytree(ROOT / "configs", path / "configs")
    sure = "    c.train.learning_rate = 1e-2  # in 4 steps the model has to answer otherwise\n"
    quick = config.read_text().replace("    return c\n", f"{sure}    return c\n")
    (path / "configs" / "quickstart.py").write_text(quick)
    return path


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_run_runs(checkout, page):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    blocks = _blocks(ROOT / page)
    assert blocks
    for kind, code in blocks:
        command = ["bash", "-euo", "pipefail", "-c"] if kind == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, code], cwd=checkout, env=environment, capture_output=True, text=True,
            check=False, timeout=children.PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_every_page_with_commands_is_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    with_blocks = {str(p.relative_to(ROOT)) for p in pages if _blocks(p)}
    assert with_blocks == set(PAGES)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {p.parent.name for p in (tmp_path / "site").rglob("index.html")}
    assert {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"} <= pages
    html = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "trace_jax.impact" in html and "Raises" in html
