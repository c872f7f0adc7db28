"""Tables of README and docs/ are what the result files say, and prose has no other figures."""

import re
from pathlib import Path

import pytest

from bench import pages, replication
from trace_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FROM_THE_DESIGN = {"37.5"}  # three of eight prompts of synth
BLOCK = re.compile(r"<!-- (\w+): python -m bench.pages -->(.*?)<!-- end of \1 -->", re.DOTALL)


@pytest.fixture(scope="module")
def written() -> dict[Path, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return pages.written(replication.PRICES)


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_says_what_the_result_files_say(page, written):
    """Run `python -m bench.pages` after a measurement or a change of trace_jax/config.py."""
    assert (ROOT / page).read_text() == written[Path(page)]


def test_every_block_of_a_page_is_written(written):
    found = [(page, name) for page in written for name, _ in BLOCK.findall(written[page])]
    assert len(found) == len(set(found)) > 10
    assert {name for page, name in found if page == replication.PAGE} > {"ablation", "cost"}


def test_statements_of_the_readme_are_of_rows_that_it_has(written):
    blocks = dict(BLOCK.findall(written[Path("README.md")]))
    cells = {name: _first_cells(blocks[name]) for name in ("methods", "statements")}
    rows = {first for first, _ in cells["methods"]}
    sides = [second.split(" - ") for _, second in cells["statements"] if " - " in second][1:]
    assert len(sides) > 5 and {side for pair in sides for side in pair} <= rows


def _first_cells(table: str) -> list[tuple[str, str]]:
    lines = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    return [(cells[1].strip(), cells[2].strip()) for cells in lines]


def test_what_is_around_a_block_stays():
    page = "a\n<!-- x: python -m bench.pages -->\nold\n<!-- end of x -->\nb\n"
    new = pages.filled(page, {"x": "new\n"})
    assert new == page.replace("\nold\n", "\n\nnew\n\n") and pages.filled(new, {"x": "new"}) == new
    with pytest.raises(InputError, match="has no <!-- y: "):
        pages.filled(page, {"y": ""})


def test_prose_names_no_figure_that_no_table_has(written):
    """Of docs/results.md: a table that is made anew leaves no old figure behind in the text."""
    page = written[Path("docs/results.md")]
    measured = [text for path, text in written.items() if path != Path("docs/config.md")]
    tables = " ".join(block for text in measured for _, block in BLOCK.findall(text))
    prose = BLOCK.sub("", page)
    figures = set(re.findall(r"(?<![\d.])[-+]?\d+\.\d+", re.sub(r"`[^`]*`", "", prose)))
    shown = set(re.findall(r"\d+\.\d+", tables))
    assert len(figures) > 10
    assert {f for f in figures if f.lstrip("+-") not in shown} <= FROM_THE_DESIGN
