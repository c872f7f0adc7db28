"""CITATION.cff against the Citation File Format, version 1.2.0."""

import datetime
from pathlib import Path

import pytest
import yaml

import trace_jax

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"authors", "cff-version", "message", "title"}
OPTIONAL = {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license",
    "license-url", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "type", "url", "version",
}  # fmt: skip
PERSON = {
    "address", "affiliation", "alias", "city", "country", "email", "family-names", "fax",
    "given-names", "name-particle", "name-suffix", "orcid", "post-code", "region", "tel", "website",
}  # fmt: skip
ENTITY = PERSON - {"affiliation", "family-names", "given-names", "name-particle", "name-suffix"}
ENTITY |= {"date-end", "date-start", "location", "name"}
KINDS = ("article", "conference-paper", "generic", "software")  # of a reference, the ones of use


def faults(found: dict) -> list[str]:
    """What the format does not allow in `found`."""
    wrong = [f"{key} is missing" for key in NEEDED - found.keys()]
    wrong += [f"{key} is unknown" for key in found.keys() - NEEDED - OPTIONAL]
    if found.get("cff-version") != "1.2.0":
        wrong.append("cff-version is not 1.2.0")
    if found.get("type", "software") not in ("software", "dataset"):
        wrong.append("type is neither software nor dataset")
    if not isinstance(found.get("date-released", datetime.date.today()), datetime.date):
        wrong.append("date-released is no date")
    wrong += _faults_of_authors(found.get("authors"))
    if "preferred-citation" in found:
        paper = found["preferred-citation"]
        wrong += [f"{key} of the paper is missing" for key in {"title", "type"} - paper.keys()]
        if paper.get("type") not in KINDS:
            wrong.append("type of the paper is unknown")
        if not isinstance(paper.get("year", 0), int):
            wrong.append("year of the paper is no number")
        wrong += _faults_of_authors(paper.get("authors"))
    return wrong


def _faults_of_authors(authors) -> list[str]:
    if not isinstance(authors, list) or not authors:
        return ["authors are missing"]
    allowed = [ENTITY if "name" in author else PERSON for author in authors]
    return [
        f"{a} is no author" for a, keys in zip(authors, allowed, strict=True) if a.keys() - keys
    ]


@pytest.fixture
def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_is_one(citation):
    assert faults(citation) == []
    assert all(isinstance(citation[key], str) for key in ("title", "message", "abstract"))


def test_it_is_of_this_version_and_licence(citation):
    assert citation["version"] == trace_jax.__version__ and citation["license"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("key", "value"),
    [("title", None), ("licence", "x"), ("cff-version", "1.1.0"), ("type", "program"),
     ("authors", []), ("authors", [{"name": "x", "given-names": "y"}]), ("date-released", "soon"),
     ("preferred-citation", {"type": "talk", "title": "x", "authors": [{"name": "y"}]})],
)  # fmt: skip
def test_what_is_none_is_found(citation, key, value):
    changed = citation | {key: value}
    if value is None:
        del changed[key]
    assert len(faults(changed)) == 1
