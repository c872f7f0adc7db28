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
    """Run `python -m bench.pages` after a measurement."""
    assert (ROOT / page).read_text() == written[Path(page)]


def test_every_block_of_a_page_is_written(written):
    found = [(page, name) for page in written for name, _ in BLOCK.findall(written[page])]
    assert len(found) == len(set(found)) > 10
    assert {name for page, name in found if page == replication.PAGE} > {"ablation", "cost"}


def test_what_is_around_a_block_stays():
    page = "a\n<!-- x: python -m bench.pages -->\nold\n<!-- end of x -->\nb\n"
    new = pages.filled(page, {"x": "new\n"})
    assert new == page.replace("\nold\n", "\n\nnew\n\n") and pages.filled(new, {"x": "new"}) == new
    with pytest.raises(InputError, match="has no <!-- y: "):
        pages.filled(page, {"y": ""})


def test_prose_names_no_figure_that_no_table_has(written):
    """Of docs/results.md: a table that is made anew leaves no old figure behind in the text."""
    page = written[Path("docs/results.md")]
    tables = " ".join(block for text in written.values() for _, block in BLOCK.findall(text))
    prose = BLOCK.sub("", page)
    figures = set(re.findall(r"(?<![\d.])[-+]?\d+\.\d+", re.sub(r"`[^`]*`", "", prose)))
    shown = set(re.findall(r"\d+\.\d+", tables))
    assert len(figures) > 10
    assert {f for f in figures if f.lstrip("+-") not in shown} <= FROM_THE_DESIGN
