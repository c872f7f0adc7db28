"""What the scripts of bench/ compute before they run anything."""

import pytest

from bench import against_gold, frontier, realign, studies
from trace_jax import compare
from trace_jax.errors import InputError

POINT = {"learning_rate": 1e-4, "beta": 0.1, "steps": 9, "perplexity": 1.0}


def _tuned(*names: str, **changes) -> dict:
    of = {"best": POINT, "points": [POINT]} | changes
    return {"methods": dict.fromkeys(names, of)}


def test_points_of_studies_differ_in_what_they_say():
    """A frontier with one point a method; equal points are one run, others are not."""
    tuned = _tuned("trace", "u2a", "dpo_gold", "naive_oracle_dpo")
    found = {p["study"] + str(i): studies.variant(p, tuned) for i, p in enumerate(studies.points())}
    by_name = {v.name: v for v in found.values()}
    assert by_name["trace+triage.error=0.1+triage.soft=True"].overrides["triage.soft"] is True
    assert by_name["trace"].overrides["train.learning_rate"] == 1e-4
    assert {v.name for v in found.values() if v.name.startswith("naive")} == {
        f"naive_oracle_dpo{s}" for s in ("+train.data_share=0.25", "+train.data_share=0.5", "")
    }
    assert len(by_name) == 20 and all(compare.own_stages(v) for v in by_name.values())


def test_a_method_has_points_of_its_own_or_the_common_ones():
    grid = ["1e-4:0.1:150", "npo@1e-5:0.1:50", "2e-4:0.1:150", "npo@3e-6:0.5:50"]
    rates = {m: [v.overrides["train.learning_rate"] for v in frontier.points(grid, m)]
             for m in ("npo", "trace")}  # fmt: skip
    assert rates == {"npo": ["1e-5", "3e-6"], "trace": ["1e-4", "2e-4"]}
    with pytest.raises(InputError, match="reads learning_rate:beta:steps"):
        frontier.points(["npo@1e-5"], "npo")
    with pytest.raises(InputError, match="as many points each: trace 2, npo 1"):
        frontier.frontier(None, None, ["trace", "npo"], grid[:3], 1)


def test_methods_of_the_table_take_their_operating_points():
    tuned = _tuned("trace_full_weights", "trace_paper")
    shuffled, paper = realign.variants(["trace_shuffled", "trace_paper"], tuned)
    assert shuffled.overrides["impact.weights"] == "shuffled"
    assert shuffled.overrides["train.beta"] == 0.1 and shuffled.overrides["train.total_steps"] == 9
    assert paper.overrides["train.beta"] == 0.3  # the paper's, whatever was tuned
    assert paper.overrides["train.learning_rate"] == 1e-4
    with pytest.raises(InputError, match="no points of npo"):
        realign.variants(["npo"], tuned)
    with pytest.raises(InputError, match="an older bench.frontier"):
        realign.variants(["trace"], {"points": []})
    far = [POINT | {"perplexity": 3.0}, POINT | {"perplexity": 2.0, "beta": 0.7}]
    (npo,) = realign.variants(["npo"], _tuned("npo", best=None, points=far))
    assert npo.overrides["train.beta"] == 0.7


def test_every_method_of_the_table_is_one_that_compares():
    for text, tuned_as in realign.METHODS.values():
        (variant,) = compare.parse_methods(text)
        assert compare.own_stages(variant) and tuned_as in realign.METHODS


def test_the_best_point_keeps_the_limit():
    rows = [
        {"compliance_guarded": 0.9, "perplexity": 3.0, "way": []},
        {"compliance_guarded": 0.5, "perplexity": 1.5,
         "way": [{"step": 1, "compliance_guarded": 0.6, "perplexity": 1.4}]},
    ]  # fmt: skip
    found = frontier._method(rows, 2.0)
    assert found["best"] == {"compliance_guarded": 0.5, "perplexity": 1.5}
    assert found["within_limit"] == 0.6
    assert frontier._method(rows[:1], 2.0)["best"] is None


def test_trace_meets_dpo_gold_at_no_more_perplexity():
    """The better point of trace is beyond what dpo_gold needs, so the other one is taken."""
    far = POINT | {"perplexity": 1.2, "compliance_guarded": 0.9}
    near = POINT | {"perplexity": 0.9, "compliance_guarded": 0.6, "beta": 0.7}
    methods = {"trace": {"points": [far, near]}, "dpo_gold": {"points": [POINT], "best": POINT}}
    trace, gold = against_gold.variants({"methods": methods})
    assert trace.overrides["train.beta"] == 0.7 and gold.overrides["train.beta"] == 0.1
    with pytest.raises(InputError, match="no point of trace"):
        against_gold.variants({"methods": methods | {"trace": {"points": [far]}}})
