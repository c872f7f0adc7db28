"""The coefficient table: every method, action and supplement, written out."""

import dataclasses

import pytest

from trace_jax import config, methods, records
from trace_jax.errors import InputError

COMPLIANT = {"INVERT": (False, True), "PUNISH": (False, False), "RETAIN": (True, False)}
ACTIONS = ("INVERT", "PUNISH", "RETAIN", "UNRESOLVED")


def verdict(compliant: bool | None) -> records.Verdict:
    status = {True: "compliant", False: "violating", None: "abstain"}[compliant]
    return records.Verdict(status, None, {})


def triaged(action: str) -> records.TriagedRecord:
    """A record named after its action: prompt x, responses yw (chosen) and yl (rejected)."""
    record = records.PreferenceRecord(action, "x", "yw", "yl")
    chosen, rejected = COMPLIANT.get(action, (None, True))
    return records.TriagedRecord(record, verdict(chosen), verdict(rejected), action)


RECORDS = [triaged(action) for action in ACTIONS]
CORRECTIONS = {"PUNISH": "yc"}
WEIGHTS = {"INVERT": 2.0, "PUNISH": 3.0}


def table(method, corrections=None, weights=None, punish="correction", **options) -> dict:
    """Record id -> its examples as (y0, y1, coefficients that are not 0)."""
    made = methods.examples(
        method,
        RECORDS,
        corrections=corrections or {},
        weights=weights and {(i, i): w for i, w in weights.items()},
        alpha_kl=0.5,
        punish=punish,
        **options,
    )
    rows = {}
    for e in made:
        assert e.prompt == "x" and e.action == e.record_id
        names = ("pref", "npo0", "npo1", "kl", "nll")
        values = {n: getattr(e, n) for n in names if getattr(e, n)}
        rows.setdefault(e.record_id, []).append((e.y0, e.y1, values))
    return rows


RETAIN = {"RETAIN": [("yw", None, {"kl": 0.5})]}


def dual_npo(w: float) -> list:
    return [("yw", "yl", {"npo0": w, "npo1": w})]


@pytest.mark.parametrize(
    ("method", "weights", "w_invert", "w_punish"),
    [
        ("trace", None, 1.0, 1.0),
        ("trace", WEIGHTS, 2.0, 3.0),
        ("trace_no_impact", WEIGHTS, 1.0, 1.0),
        ("trace_no_kl", None, 1.0, 1.0),
        ("trace_no_kl", WEIGHTS, 2.0, 3.0),
    ],
)
@pytest.mark.parametrize(
    ("corrections", "punish"),
    [({}, "correction"), (CORRECTIONS, "correction"), (CORRECTIONS, "dual_npo")],
)
def test_trace_and_its_ablations(method, weights, w_invert, w_punish, corrections, punish):
    expected = {"INVERT": [("yl", "yw", {"pref": w_invert})]}
    corrected = bool(corrections) and punish == "correction"
    expected["PUNISH"] = [("yc", "yw", {"pref": w_punish})] if corrected else dual_npo(w_punish)
    expected |= {} if method == "trace_no_kl" else RETAIN
    assert table(method, corrections, weights, punish) == expected


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_trace_without_triage_pushes_every_chosen_response_down(weights):
    w = weights or {"INVERT": 1.0, "PUNISH": 1.0}
    assert table("trace_no_triage", CORRECTIONS, weights) == {
        "INVERT": [("yw", None, {"npo0": w["INVERT"]})],
        "PUNISH": [("yw", None, {"npo0": w["PUNISH"]})],
        "RETAIN": [("yw", None, {"npo0": 1.0})],  # a record without a weight counts 1
    }


def test_dpo_keeps_the_order_of_the_data_for_every_record():
    expected = {action: [("yw", "yl", {"pref": 1.0})] for action in ACTIONS}
    assert table("dpo", CORRECTIONS, WEIGHTS) == expected


PAIR = {"pref": 1.0}


def test_dpo_gold_trains_on_the_relabelled_pairs():
    expected = {"INVERT": [("yl", "yw", PAIR)], "RETAIN": [("yw", "yl", PAIR)]}
    assert table("dpo_gold", {}, WEIGHTS) == expected
    corrected = expected | {"PUNISH": [("yc", "yw", PAIR)]}
    assert table("dpo_gold", CORRECTIONS, WEIGHTS, "dual_npo") == corrected


def test_gold_without_corrections_leaves_punish_out():
    expected = {"INVERT": [("yl", "yw", PAIR)], "RETAIN": [("yw", "yl", PAIR)]}
    assert table("dpo_gold_uncorrected", CORRECTIONS, WEIGHTS) == expected


def test_gold_with_nll_has_it_on_every_pair():
    gold = table("dpo_gold", CORRECTIONS, WEIGHTS)
    found = table("dpo_gold_nll", CORRECTIONS, WEIGHTS, alpha_nll=0.5, retain_pairs=True)
    assert found == {
        action: [(y0, y1, of | {"nll": 0.5}) for y0, y1, of in rows]
        for action, rows in gold.items()
    }


@pytest.mark.parametrize(
    ("inner", "loss", "retain"),
    [
        ("npo", lambda w: {"npo0": w}, {}),
        ("ga", lambda w: {"nll": -w}, {}),
        ("graddiff", lambda w: {"nll": -w}, RETAIN),
    ],
)
def test_u2a_unlearns_the_chosen_responses_of_conflicts(inner, loss, retain):
    found = table("u2a", CORRECTIONS, WEIGHTS, inner=inner)
    expected = {a: [("yw", None, loss(w))] for a, w in WEIGHTS.items()}
    assert found == expected | retain
    with pytest.raises(InputError, match="u2a.inner='sgd'"):
        table("u2a", inner="sgd")


@pytest.mark.parametrize("method", methods.TRACE)
def test_retain_pairs_and_nll_are_beside_what_trace_has(method):
    plain = table(method, CORRECTIONS, WEIGHTS)
    found = table(method, CORRECTIONS, WEIGHTS, retain_pairs=True, alpha_nll=0.5)
    for action, rows in plain.items():
        for row, with_nll in zip(rows, found[action], strict=False):
            nll = {"nll": 0.5 * row[2]["pref"]} if "pref" in row[2] else {}
            assert with_nll == (*row[:2], row[2] | nll)
    assert found["RETAIN"][-1] == ("yw", "yl", {"pref": 1.0, "nll": 0.5})
    assert table("dpo_gold", CORRECTIONS, retain_pairs=True, alpha_nll=0.5) == table(
        "dpo_gold", CORRECTIONS
    )


def test_a_retain_record_whose_rejected_complies_makes_no_pair():
    record = records.PreferenceRecord("r", "x", "yw", "yl")
    both = records.TriagedRecord(record, verdict(True), verdict(True), "RETAIN")
    options = dict(corrections={}, weights=None, alpha_kl=0.5, retain_pairs=True)
    (only,) = methods.examples("trace", [both], **options)
    assert only.kl == 0.5 and not only.pref


def test_examples_without_a_coefficient_are_kept_where_weights_may_come_back():
    weights = {("INVERT", "INVERT"): 0.0}
    options = dict(corrections={}, weights=weights, alpha_kl=0.0, punish="correction")
    made = [methods.examples("trace", RECORDS, **options, with_zeros=z) for z in (False, True)]
    assert [e.action for e in made[0]] == ["PUNISH"]
    assert [e.action for e in made[1]] == ["INVERT", "PUNISH"]


@pytest.mark.parametrize("n", [1, 4])
def test_what_the_conflicts_weigh_together_is_the_same_without_those_of_weight_0(n):
    """A step draws as many conflicts from few as from all: else KL would weigh less beside them."""
    actions = ["INVERT"] * 5 + ["RETAIN"] * 2
    items = [dataclasses.replace(t, record=dataclasses.replace(t.record, id=f"{i}"))
             for i, t in enumerate(map(triaged, actions))]  # fmt: skip
    weights = {(f"{i}", "INVERT"): 5 / n if i < n else 0.0 for i in range(5)}
    options = dict(corrections={}, weights=weights, alpha_kl=0.5, retain_pairs=True, alpha_nll=0.1)
    few, whole = (methods.examples("trace", items, with_zeros=z, **options) for z in (False, True))
    assert len(whole) - len(few) == 5 - n
    for name in ("pref", "nll"):
        mean = [
            sum(getattr(e, name) for e in of) / sum(not e.kl for e in of) for of in (few, whole)
        ]
        assert mean[0] == pytest.approx(mean[1])
    assert [e.kl for e in few if e.kl] == [0.5, 0.5]


def test_without_kl_no_record_is_there_for_it():
    options = dict(corrections={}, weights=None, alpha_kl=0.0, with_zeros=True)
    (pair,) = methods.examples("trace", [triaged("RETAIN")], retain_pairs=True, **options)
    assert pair.y1 == "yl" and methods.examples("trace", [triaged("RETAIN")], **options) == []


@pytest.mark.parametrize("name", methods.PRESETS)
def test_a_preset_names_a_method_and_keys_of_the_config(name):
    c = config.base_config()
    c.train.method = name
    found = config.flatten(config.resolved(c))
    assert found["train.method"] in methods.METHODS
    assert {key: found[key] for key in methods.PRESETS[name]} == methods.PRESETS[name]
    assert c.train.method == name


def test_naive_oracle_dpo_turns_a_pair_only_where_the_verdicts_say_so():
    expected = {a: [("yw", "yl", PAIR)] for a in ("PUNISH", "RETAIN")}
    assert table("naive_oracle_dpo", CORRECTIONS, WEIGHTS) == expected | {
        "INVERT": [("yl", "yw", PAIR)]
    }
    both = records.TriagedRecord(RECORDS[2].record, verdict(True), verdict(True), "RETAIN")
    assert methods.judged_better(both) is None
    assert methods.judged_better(RECORDS[0]) == "rejected"


def test_npo_pushes_the_chosen_responses_that_violate_down():
    expected = {a: [("yw", None, {"npo0": 1.0})] for a in ("INVERT", "PUNISH")}
    assert table("npo", CORRECTIONS, WEIGHTS) == expected


def test_invert_only_leaves_punish_out():
    expected = {"INVERT": [("yl", "yw", {"pref": 2.0})]} | RETAIN
    assert table("trace_invert_only", CORRECTIONS, WEIGHTS) == expected


def test_sft_takes_every_response_known_to_comply():
    nll = {"nll": 1.0}
    expected = {a: [("yl", None, nll)] for a in ("INVERT", "UNRESOLVED")}
    expected["RETAIN"] = [("yw", None, nll)]
    assert table("sft", {}, WEIGHTS) == expected
    assert table("sft", CORRECTIONS) == expected | {"PUNISH": [("yc", None, nll)]}


def test_examples_keep_the_order_of_the_records():
    ids = [
        e.record_id
        for e in methods.examples(
            "trace", RECORDS[::-1], corrections={}, weights=None, alpha_kl=0.5
        )
    ]
    assert ids == ["RETAIN", "PUNISH", "INVERT"]


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in ("dpo", "sft")])
def test_unresolved_records_train_nothing(method):
    assert "UNRESOLVED" not in table(method, {"UNRESOLVED": "yc"}, {"UNRESOLVED": 9.0})


def soft(**masses: float) -> records.TriagedRecord:
    full = {name: masses.get(name, 0.0) for name in ACTIONS}
    record = records.PreferenceRecord("soft", "x", "yw", "yl")
    return records.TriagedRecord(record, verdict(False), verdict(True), "INVERT", masses=full)


def soft_examples(item, weights=None, **more):
    return methods.examples(
        "trace", [item], corrections={}, weights=weights, alpha_kl=0.5, **more
    )  # fmt: skip


def test_soft_triage_gives_every_action_its_share():
    item = soft(INVERT=0.5, PUNISH=0.25, RETAIN=0.125, UNRESOLVED=0.125)
    weights = {("soft", "INVERT"): 2.0, ("soft", "PUNISH"): 3.0}
    found = soft_examples(item, weights)
    assert [(e.action, e.y0, e.y1) for e in found] == [
        ("INVERT", "yl", "yw"), ("PUNISH", "yw", "yl"), ("RETAIN", "yw", None)
    ]  # fmt: skip
    assert [(e.pref, e.npo0, e.npo1, e.kl) for e in found] == [
        (1.0, 0, 0, 0), (0, 0.75, 0.75, 0), (0, 0, 0, 0.0625)
    ]  # fmt: skip
    scored = soft_examples(item, with_masses=False)
    assert [(e.pref, e.npo0, e.kl) for e in scored] == [(1, 0, 0), (0, 1, 0), (0, 0, 0.5)]


def test_soft_triage_of_certain_verdicts_is_hard_triage():
    hard = methods.examples(
        "trace", [triaged("INVERT")], corrections={}, weights=None, alpha_kl=0.5
    )
    (found,) = soft_examples(soft(INVERT=1.0))
    assert dataclasses.replace(found, record_id="INVERT") == hard[0]


def test_an_example_whose_coefficients_are_all_zero_is_left_out():
    assert table("trace", {}, {"INVERT": 0.0, "PUNISH": 0.0}) == RETAIN


def test_an_unknown_method_or_punishment_is_refused():
    with pytest.raises(InputError, match="unknown method 'ppo'.*trace_no_kl"):
        table("ppo")
    with pytest.raises(InputError, match="'kto'.*dual_npo"):
        table("trace", punish="kto")
