"""docs/config.md has every key of the configuration, and what config.py says of it."""

import re
from pathlib import Path

import pytest

from bench import config_keys
from trace_jax import config as config_lib

ROOT = Path(__file__).resolve().parents[1]
# decisions.md names functions in the same way.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "decisions.md")
EXAMPLE = """
def base_config():
    c = ml.ConfigDict()
    c.seed = 0  # of everything
    c.long = (
        "text"  # one line
    )
    # and another
    c.part = _part()  # a section
    c.part.more = 1  # not from its function
    return c


def _part():
    c = ml.ConfigDict()  # of two words
    c.inner = i = ml.ConfigDict()
    i.bare = 3
    return c
"""


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, str]]:
    """Key -> default and what is said of it, as the page has them."""
    page = (ROOT / "docs" / "config.md").read_text()
    found = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.*) \|$", page, re.MULTILINE)
    assert len({key for key, *_ in found}) == len(found)
    return {key: (default, said) for key, default, said in found}


def test_every_key_is_there_with_its_default(rows):
    c = config_lib.base_config()
    for key, value in config_keys.leaves(c):
        for section in config_keys.TRAINING[1:]:  # these refer to the first
            if key not in rows and key.startswith(f"{section}."):
                key = key.replace(section, config_keys.TRAINING[0])
        assert rows[key][0] == repr(value), key
    assert len(rows) > 150


def test_what_is_said_is_the_comment(rows):
    assert rows["seed"][1].startswith("gold batch, data order, sampling")
    assert rows["cpu_devices"][1].endswith("of up to a few million parameters")
    assert rows["train.alpha_kl"][1] == "weight of the KL anchor of one RETAIN example"
    assert rows["train.retain_pairs"][1].startswith("trace: RETAIN records whose y_l violates")
    assert r"file \| synth" in rows["data.source"][1]


def test_comments_go_to_their_keys():
    assert config_keys.comments(EXAMPLE) == {
        "": "",
        "seed": "of everything",
        "long": "one line and another",
        "part": "a section of two words",
        "part.inner": "",
        "part.inner.bare": "",
        "part.more": "not from its function",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_key_that_a_page_names_exists(page):
    keys = [key for key, _ in config_keys.leaves(config_lib.base_config())]
    known = set(keys) | {key.rpartition(".")[0] for key in keys}
    tops = "|".join(sorted({key.split(".")[0] for key in keys if "." in key}))
    named = re.findall(
        rf"(?:--config\.|`)((?:{tops})(?:\.[a-z_0-9]+)+)(?![\w(/])", page.read_text()
    )
    assert {name for name in named if not name.endswith((".py", ".jsonl"))} <= known
