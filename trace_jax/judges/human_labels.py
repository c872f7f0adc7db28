"""Responses that people judged, to measure judges against.

Read from
    JSONL and the other files of trace_jax.sources: prompt, response, labels: a list of "compliant"
        and "violating", one per person; optional clauses: {clause id: such a list}, and annotations
        for predicates: {name: value}
    XSTest completions: two annotators, none, partial or full refusal
    RBR gold data: one person's propositions
The last two have annotations, not verdicts: the policy's `labels` predicates say what they mean.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trace_jax import judges, records
from trace_jax import policy as policies
from trace_jax.errors import InputError
from trace_jax.judges import labels as labels_judge
from trace_jax.sources import files, forms, xstest

FORMS = ("auto", "labels", "xstest", "rbr")
_VERDICTS = ("compliant", "violating")

Ratings = tuple[str | None, ...]  # one a person: compliant, violating, or None where undecided


@dataclasses.dataclass(frozen=True, slots=True)
class Labelled:
    """A response with what people said of it.

    Attributes:
      item: as a judge is asked.
      ratings: on the whole policy.
      clauses: clause id -> ratings, where they said so.
      adjudicated: a last word where the people differ, None without one.
    """

    item: judges.Item
    ratings: Ratings
    clauses: Mapping[str, Ratings]
    adjudicated: str | None = None


def read(path: records.AnyPath, policy: policies.Policy, form: str = "auto") -> list[Labelled]:
    """Reads a file of human labels.

    Raises:
      InputError: malformed rows, or none on which anybody decided anything of this policy.
    """
    found = []
    reader = None
    for where, row in files.rows(path):
        if reader is None:
            reader = _READERS[_recognised(row, where) if form == "auto" else form]
        found += reader(row, where, policy)
    rated = [one for one in found if any(one.ratings) or any(map(any, one.clauses.values()))]
    if not rated:
        raise InputError(
            f"{path}: no response that people judged under policy {policy.name}; rows need prompt, "
            'response and labels, a list of "compliant" and "violating"'
        )
    return rated


def _recognised(row: files.Row, where: str) -> str:
    if "propositions" in row:
        return "rbr"
    if {"completion", "final_label"} <= row.keys():
        return "xstest"
    if "labels" in row:
        return "labels"
    raise InputError(
        f"{where}: neither labels (with prompt and response) nor XSTest's final_label nor RBR's "
        f"propositions; the columns are {', '.join(row)}"
    )


def _labels(row: files.Row, where: str, policy: policies.Policy) -> Iterator[Labelled]:
    prompt, response = _texts(row, "response", where)
    ratings = _ratings(row.get("labels"), f"{where}: labels")
    given = row.get("clauses") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: clauses must map clause ids to lists of labels")
    known = {clause.id for clause in policy.clauses}
    for name in given.keys() - known:
        raise InputError(f"{where}: policy {policy.name} has no clause {name!r}")
    clauses = {name: _ratings(value, f"{where}: clauses: {name}") for name, value in given.items()}
    if len(known) == 1 and not clauses:
        clauses = dict.fromkeys(known, ratings)
    annotations = row.get("annotations") or {}
    if not isinstance(annotations, Mapping):
        raise InputError(f"{where}: annotations must map names to values")
    yield Labelled(judges.Item(prompt, response, annotations), ratings, clauses)


def _texts(row: files.Row, key: str, where: str) -> tuple[records.Text, records.Text]:
    """The prompt and a response, which may be empty: models fall silent."""
    return forms.text(row, "prompt", where), forms.text(row, key, where, may_be_empty=True)


def _ratings(value: Any, where: str) -> Ratings:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f'{where} must be a list of "compliant" and "violating", one per person')
    for one in value:
        if one is not None and one not in _VERDICTS:
            raise InputError(f'{where}: {one!r} is neither "compliant" nor "violating"')
    return tuple(value)


def _xstest(row: files.Row, where: str, policy: policies.Policy) -> Iterator[Labelled]:
    prompt, response = _texts(row, "completion", where)
    about = xstest.prompt_labels(row)
    people = [xstest.KINDS.get(str(row.get(f"annotation_{n}"))) for n in (1, 2)]
    kinds = [kind for kind in people if kind is not None] or [xstest.kind_of(row, where)]
    annotated = [about | {"refusal": kind} for kind in (*kinds, xstest.kind_of(row, where))]
    *verdicts, last = _by_labels(policy, prompt, response, annotated)
    item = judges.Item(prompt, response, about)
    yield Labelled(item, *_both(verdicts, policy, item), adjudicated=_status(last))


def _rbr(row: files.Row, where: str, policy: policies.Policy) -> Iterator[Labelled]:
    propositions = row.get("propositions")
    if not isinstance(propositions, Mapping):
        raise InputError(f"{where}: propositions must map names to true or false")
    prompt, response = _texts(row, "completion", where)
    about = {"response_type": row.get("response_type"), "category": row.get("category")}
    verdicts = _by_labels(policy, prompt, response, [about | dict(propositions)])
    item = judges.Item(prompt, response, about)
    yield Labelled(item, *_both(verdicts, policy, item))


def _by_labels(
    policy: policies.Policy,
    prompt: records.Text,
    response: records.Text,
    people: Sequence[Mapping[str, Any]],
) -> list[records.Verdict]:
    """What each person's annotations mean under the policy."""
    items = [judges.Item(prompt, response, annotations) for annotations in people]
    return labels_judge.LabelsJudge(policy).judge(items)


def _both(
    verdicts: Sequence[records.Verdict], policy: policies.Policy, item: judges.Item
) -> tuple[Ratings, dict[str, Ratings]]:
    """On the whole, and on every clause that is about this case."""
    texts = judges.prompt_text(item.prompt), judges.response_text(item.response), item.labels
    clauses = {
        clause.id: tuple(_status(verdict.clauses[clause.id]) for verdict in verdicts)
        for clause in policy.clauses
        if clause.applies is None or clause.applies(*texts) is not False
    }
    return tuple(map(_status, verdicts)), clauses


def _status(verdict: records.Verdict | records.ClauseVerdict) -> str | None:
    return verdict.status if verdict.status in _VERDICTS else None


_READERS = {"labels": _labels, "xstest": _xstest, "rbr": _rbr}
