"""What a method is: a table of coefficients over the examples a triaged record gives.

| method | INVERT | PUNISH | RETAIN |
|---|---|---|---|
| trace | (y_l, y_w) pref = w | (y_c, y_w) pref = w, or (y_w, y_l) npo0 = npo1 = w | (y_w) kl |
| trace_no_kl, trace_no_impact, trace_invert_only | the same without kl; w = 1; without PUNISH |
| with retain_pairs | | | beside: (y_w, y_l) pref = 1 where y_l violates |
| with alpha_nll | every pair of trace also has nll = alpha_nll * pref, of its better response |
| trace_no_triage | (y_w) npo0 = w | the same | the same |
| dpo, which makes M_ref | (y_w, y_l) pref = 1 | the same | the same |
| dpo_gold | (y_l, y_w) pref = 1 | (y_c, y_w) pref = 1, else left out | (y_w, y_l) pref = 1 |
| dpo_gold_uncorrected | the same | left out | the same |
| dpo_gold_nll | dpo_gold, and every pair also has nll = alpha_nll, of its better response |
| naive_oracle_dpo | pref = 1, the response that alone complies first; else the data's order |
| npo | (y_w) npo0 = 1 | the same | left out |
| u2a | (y_w) npo0 = omega, or nll = -omega (ga, graddiff) | the same | left out; kl for graddiff |
| sft | nll = 1 on every response that complies, and on y_c |

An example is a prompt, a response y0, optionally a second response y1, and five coefficients:

    loss = pref * L_pref(r0 - r1) + npo0 * L_npo(r0) + npo1 * L_npo(r1)
           + kl * KL(ref || theta on y0) + nll * NLL(y0)

This is the only place where chosen and rejected change places.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import replace

from trace_jax import records
from trace_jax.errors import InputError

METHODS = (
    "trace",
    "trace_no_triage",
    "trace_no_kl",
    "trace_no_impact",
    "trace_invert_only",
    "dpo",
    "dpo_gold",
    "dpo_gold_uncorrected",
    "dpo_gold_nll",
    "naive_oracle_dpo",
    "npo",
    "u2a",
    "sft",
)
# Names for a method with settings of its own, which win over those of a config file.
_PAPER = {
    "train.method": "trace",
    "train.beta": 0.3,
    "train.alpha_kl": 0.1,
    "train.alpha_nll": 0.0,
    "train.retain_pairs": False,
    "train.punish": "dual_npo",
    "impact.gold_beta": 0.3,
    "impact.gold_size": 100,
    "impact.normalisation": "sum_to_one",
    "impact.strength": 1.0,
}
PRESETS: dict[str, dict[str, object]] = {
    "trace_paper": _PAPER,
    "trace_paper_rescaled": _PAPER | {"train.alpha_scale": "per_conflict"},
    "trace_dual_npo": {"train.method": "trace", "train.punish": "dual_npo"},
    "trace_full_weights": {"train.method": "trace", "impact.strength": 1.0},
    "trace_shuffled": {
        "train.method": "trace",
        "impact.weights": "shuffled",
        "impact.strength": 1.0,
    },
}
CONFLICTS = ("INVERT", "PUNISH")
WEIGHTED = ("trace", "trace_no_kl", "trace_no_triage", "trace_invert_only", "u2a")  # by impact
TRACE = ("trace", "trace_no_kl", "trace_no_impact", "trace_invert_only")
_NLL = (*TRACE, "dpo_gold_nll")  # take alpha_nll
INNER = ("npo", "ga", "graddiff")  # inner losses of u2a
SOFT = (
    "trace",
    "trace_no_kl",
    "trace_no_impact",
    "trace_invert_only",
    "dpo_gold",
    "dpo_gold_nll",
    "npo",
)  # by mass
UNTRIAGED = ("dpo", "sft")  # they use UNRESOLVED records as well


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One row of the loss. `y1` is None where the loss has one response."""

    record_id: str
    action: str
    prompt: records.Text
    y0: records.Text
    y1: records.Text | None = None
    pref: float = 0.0
    npo0: float = 0.0
    npo1: float = 0.0
    kl: float = 0.0
    nll: float = 0.0


def examples(
    method: str,
    triaged: Iterable[records.TriagedRecord],
    *,
    corrections: Mapping[str, records.Text],
    weights: Mapping[tuple[str, str], float] | None,
    alpha_kl: float,
    punish: str = "correction",
    inner: str = "npo",
    retain_pairs: bool = False,
    alpha_nll: float = 0.0,
    with_masses: bool = True,
    with_zeros: bool = False,
) -> list[Example]:
    """Examples of `method`, in record order; UNRESOLVED records give none but for dpo and sft.

    A record with masses (soft triage) gives examples of every action that has one, times the mass
    unless with_masses is off. Conflicts of weight 0 are left out unless with_zeros is on; a step,
    which draws as many of those left, then counts each by as much less, so that the loss is the
    same in expectation.

    corrections: record id -> y_c. weights: (record id, action) -> impact weight; None means 1.
    punish: "correction" is (y_c, y_w) where a correction exists and dual NPO elsewhere; "dual_npo"
    is always dual NPO. inner: the loss of u2a, one of INNER. retain_pairs: of trace and its
    ablations; alpha_nll: of these and dpo_gold_nll, see the table.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if punish not in ("correction", "dual_npo"):
        raise InputError(f"train.punish={punish!r} is unknown; use 'correction' or 'dual_npo'")
    if inner not in INNER:
        raise InputError(f"u2a.inner={inner!r} is unknown; use one of {', '.join(INNER)}")
    use_weights = weights is not None and method in WEIGHTED
    out = []
    for item in triaged:
        for action, mass in _masses(method, item).items():
            key = (item.record.id, action)
            weight = weights[key] if use_weights and key in weights else 1.0
            if method == "u2a":
                found = _unlearned(item, action, weight, alpha_kl, inner)
            else:
                found = _of_record(method, item, action, weight, corrections, alpha_kl, punish)
            if method in TRACE and retain_pairs:
                found = _with_retained_pair(item, action, found)
            if method in _NLL:
                found = [replace(e, nll=alpha_nll * e.pref) if e.pref else e for e in found]
            out += [_times(e, mass) for e in found] if with_masses else found
    if with_zeros:
        return out
    kept = [e for e in out if e.pref or e.npo0 or e.npo1 or e.kl or e.nll]
    if not use_weights or method == "u2a" or len(kept) == len(out):  # u2a selects what it unlearns
        return kept
    n_kl = sum(bool(e.kl) for e in kept)
    share = (len(kept) - n_kl) / (len(out) - n_kl)
    return [e if e.kl else _times(e, share) for e in kept]


def _masses(method: str, item: records.TriagedRecord) -> dict[str, float]:
    """Actions a record is used for, each with its share of it."""
    if method in UNTRIAGED:
        return {item.action: 1.0}
    soft = item.masses is not None and method in SOFT
    masses = item.masses if soft else {item.action: 1.0}
    return {action: m for action, m in masses.items() if m > 0 and action != "UNRESOLVED"}


def _times(e: Example, mass: float) -> Example:
    if mass == 1.0:
        return e
    names = ("pref", "npo0", "npo1", "kl", "nll")
    return replace(e, **{name: mass * getattr(e, name) for name in names})


def _of_record(
    method: str,
    item: records.TriagedRecord,
    action: str,
    weight: float,
    corrections: Mapping[str, records.Text],
    alpha_kl: float,
    punish: str,
) -> list[Example]:
    record = item.record
    y_w, y_l = record.chosen, record.rejected

    def example(y0: records.Text, y1: records.Text | None = None, **coefficients: float) -> Example:
        return Example(record.id, action, record.prompt, y0, y1, **coefficients)

    def pair(better: records.Text, worse: records.Text, weight: float = 1.0) -> list[Example]:
        return [example(better, worse, pref=weight)]

    corrected = record.id in corrections
    match method, action:
        case "dpo", _:
            return pair(y_w, y_l)
        case "sft", _:
            return _compliant_text(item, corrections, example)
        case "naive_oracle_dpo", _:
            turned = judged_better(item) == "rejected"
            return pair(y_l, y_w) if turned else pair(y_w, y_l)
        case (("dpo_gold" | "dpo_gold_nll"), "PUNISH"):
            return pair(corrections[record.id], y_w) if corrected else []
        case "dpo_gold_uncorrected", "PUNISH":
            return []
        case (("dpo_gold" | "dpo_gold_nll" | "dpo_gold_uncorrected"), _):
            return pair(y_l, y_w) if action == "INVERT" else pair(y_w, y_l)
        case "npo", _:
            return [example(y_w, npo0=1.0)] if action in CONFLICTS else []
        case "trace_no_triage", _:
            return [example(y_w, npo0=weight)]
        case _, "INVERT":
            return pair(y_l, y_w, weight)
        case ("trace_invert_only", "PUNISH") | ("trace_no_kl", "RETAIN"):
            return []
        case _, "PUNISH" if corrected and punish == "correction":
            return pair(corrections[record.id], y_w, weight)
        case _, "PUNISH":
            return [example(y_w, y_l, npo0=weight, npo1=weight)]
    return [example(y_w, kl=alpha_kl)] if alpha_kl else []


def _with_retained_pair(
    item: records.TriagedRecord, action: str, found: list[Example]
) -> list[Example]:
    """Beside the KL example of a RETAIN record its pair, where y_l violates."""
    if action != "RETAIN" or item.rejected_verdict.compliant is not False:
        return found
    r = item.record
    return [*found, Example(r.id, action, r.prompt, r.chosen, r.rejected, pref=1.0)]


def _unlearned(
    item: records.TriagedRecord, action: str, omega: float, alpha_kl: float, inner: str
) -> list[Example]:
    """u2a: y_w of a conflict is unlearned with weight omega; graddiff anchors RETAIN by KL."""
    record = item.record
    if action in CONFLICTS:
        loss = {"npo0": omega} if inner == "npo" else {"nll": -omega}
        return [Example(record.id, action, record.prompt, record.chosen, **loss)]
    if inner != "graddiff" or not alpha_kl:
        return []
    return [Example(record.id, action, record.prompt, record.chosen, kl=alpha_kl)]


def judged_better(item: records.TriagedRecord) -> str | None:
    """ "chosen" or "rejected", whichever alone complies; None where the verdicts agree."""
    sides = {"chosen": item.chosen_verdict, "rejected": item.rejected_verdict}
    compliant = [side for side, verdict in sides.items() if verdict.compliant]
    return compliant[0] if len(compliant) == 1 else None


def _compliant_text(
    item: records.TriagedRecord, corrections: Mapping[str, records.Text], example
) -> list:
    """sft: NLL on every response of the record that is known to comply, and on its correction."""
    found = []
    if item.chosen_verdict.compliant:
        found.append(item.record.chosen)
    if item.rejected_verdict.compliant:
        found.append(item.record.rejected)
    if item.record.id in corrections:
        found.append(corrections[item.record.id])
    return [example(y, nll=1.0) for y in found]
