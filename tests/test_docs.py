"""Every command and code block of the documentation runs, and the site has no broken link.

In place of the quickstart's config stands one that takes seconds. A comment right before a block
says what it needs, <!-- with ... --> (`NEEDS`), or why it cannot run, <!-- not run: ... -->.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import children
import pytest

from trace_jax import policy, records
from trace_jax.judges import store

ROOT = Path(__file__).resolve().parents[1]
# In the order in which a newcomer reads them; what one makes the next may use.
PAGES = ("docs/getting_started.md", "docs/data.md", "docs/policies.md", "docs/judges.md",
         "docs/own_model.md", "README.md", "docs/running.md", "docs/evaluation.md",
         "docs/development.md")  # fmt: skip
ALL = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
_COMMENT = re.compile(r"<!-- (with|not run)[: ]?(.*) -->")
_COMMAND = re.compile(r"^\s*(\$ |python3? |pip |make |bash |export |git |\./)", re.MULTILINE)


class _Block(NamedTuple):
    """A fenced block: its kind (what follows the fence), its text, and the comment before it."""

    kind: str
    code: str
    why: tuple[str, str] | None  # ("with", what) or ("not run", reason)


def _parts(text: str) -> tuple[list[_Block], str]:
    """The fenced blocks of a page, and the page without them."""
    blocks, rest, inside = [], [], None
    for line in text.splitlines():
        if line.startswith("```") and inside is None:
            found = _COMMENT.fullmatch(rest[-1]) if rest else None
            inside = (line[3:].strip(), [], found and (found[1], found[2].strip()))
        elif line.startswith("```"):
            blocks.append(_Block(inside[0], "\n".join(inside[1]), inside[2]))
            inside = None
        else:
            (rest if inside is None else inside[1]).append(line)
    assert inside is None, "a fence that is not closed"
    return blocks, "\n".join(rest)


def _to_run(path: Path) -> list[_Block]:
    found = [b for b in _parts(path.read_text())[0] if b.kind in ("bash", "python")]
    return [b for b in found if b.why is None or b.why[0] == "with"]


def _unfenced(text: str) -> list[str]:
    """Code that is indented instead of fenced, and commands in a fence that says no kind."""
    blocks, rest = _parts(text)
    found = [b.code for b in blocks if b.kind not in ("bash", "python", "yaml", "text", "")]
    found += [b.code for b in blocks if b.kind in ("text", "") and _COMMAND.search(b.code)]
    lines = ["", *rest.splitlines()]
    for before, line in zip(lines, lines[1:], strict=False):
        if not before.strip() and re.match(r"(\t| {4,})\S", line):
            found.append(line)
    return found


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


def _judgement_store(checkout: Path) -> None:
    """What a run with a judge that is paid would leave."""
    path = checkout / "runs" / "gemini" / "judgements.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    yes = records.ClauseVerdict("compliant", 0.9)
    verdicts = dict.fromkeys(policy.load("synth_old").clauses, yes)
    kept = store.Store(path)
    call = store.Call("ok", 100, 40, 10, 0.5, "because", "{}")
    kept.add(store.Reader("gemini", "m", "{}", "t"), "a prompt", "a response", call, verdicts)
    kept.close()


def _votes(checkout: Path) -> None:
    key = records.read_json(checkout / "study.key.json")
    for n, rater in enumerate(("ann", "bob")):
        votes = {item["id"]: (i + n) % 2 for i, item in enumerate(key["items"])}
        found = {"study": key["study"], "rater": rater, "votes": votes}
        records.write_json(checkout / f"votes-{rater}.json", found)


NEEDS = {"a judgement store": _judgement_store, "votes of people": _votes}
LIBRARIES = ("torch", "lm_eval")  # a block that needs one is left out where it is not installed


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_run_runs(checkout, page):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    blocks = _to_run(ROOT / page)
    assert blocks
    for kind, code, why in blocks:
        if why and why[1] in LIBRARIES:
            if importlib.util.find_spec(why[1]) is None:
                continue
        elif why:
            NEEDS[why[1]](checkout)
        command = ["bash", "-euo", "pipefail", "-c"] if kind == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, code], cwd=checkout, env=environment, capture_output=True, text=True,
            check=False, timeout=children.PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def test_every_page_with_commands_is_run():
    with_blocks = {str(path.relative_to(ROOT)) for path in ALL if _to_run(path)}
    assert with_blocks == set(PAGES)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_code_hides_from_being_run(path):
    assert _unfenced(path.read_text()) == []
    for block in _parts(path.read_text())[0]:
        if block.kind not in ("bash", "python"):
            continue
        for what, why in [block.why] if block.why else []:
            assert why and (what == "not run" or why in (*NEEDS, *LIBRARIES)), (why, block.code)


@pytest.mark.parametrize(
    "text",
    [
        "Text\n\n    python -m trace_jax.status X\n", "Text\n\n\tid: x\n", "```sh\nls\n```",
        "```\npip install x\n```", "```text\n$ make test\n```",
    ],
)  # fmt: skip
def test_hidden_code_is_found(text):
    assert _unfenced(text)


def test_policies_of_the_pages_are_policies():
    found = [(p.name, b.code) for p in ALL for b in _parts(p.read_text())[0] if b.kind == "yaml"]
    assert {name for name, _ in found} >= {"README.md", "policies.md"}
    for name, text in found:
        assert policy.parse(text, where=name).clauses


def test_every_program_that_is_named_is_there():
    named = {
        (path.name, module)
        for path in ALL
        for module in re.findall(r"python -m ((?:trace_jax|bench)[\w.]*\w)", path.read_text())
    }
    assert len(named) > 20
    gone = {(page, m) for page, m in named if importlib.util.find_spec(m) is None}
    assert gone == set()


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
