"""docs/faults.md lists every test that is marked `fault`, and at least 20 faults beside kills."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text()
OTHER_FAULTS = 20


def _listed() -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", PAGE)


def _marked(path: Path) -> set[str]:
    """Tests with the decorator; in tests/faults all are (its conftest.py marks them)."""
    tests = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    if path.parent.name != "faults":
        tests = [t for t in tests if "pytest.mark.fault" in map(ast.unparse, t.decorator_list)]
    return {f"{path.relative_to(ROOT)}::{test.name}" for test in tests}


def test_the_page_lists_the_marked_tests():
    marked = set().union(*map(_marked, (ROOT / "tests").rglob("test_*.py")))
    assert set(_listed()) - marked == set(), "on the page, and not marked `fault`"
    assert marked - set(_listed()) == set(), "marked `fault`, and not in docs/faults.md"
    assert len(_listed()) == len(marked), "a test is listed twice"


def test_the_faults_are_counted():
    rows = PAGE.partition("## Other faults")[2].partition("\n## ")[0].splitlines()
    numbers = [int(found[1]) for row in rows if (found := re.match(r"\| (\d+) \|", row))]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= OTHER_FAULTS


def test_every_row_says_how_it_ends():
    rows = [line for line in PAGE.splitlines() if "`tests/" in line]
    assert len(rows) == len(_listed())
    assert all(cell.strip() for row in rows for cell in row.split("|")[2:-1])


def test_the_soak_runs_them_all():
    command = ("TRACE_SOAK_KILLS=50", "TRACE_SOAK_INPUTS=100000", "TRACE_SOAK=1", "fault or soak")
    soak = (ROOT / "Makefile").read_text().partition("\nsoak:")[2].partition("\n\n")[0]
    assert all(part in soak for part in command)
