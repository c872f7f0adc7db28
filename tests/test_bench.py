"""What the scripts of bench/ compute before they run anything."""

import numpy as np
import pytest

from bench import against_gold, collectives, frontier, headlines, packing, realign, studies
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


def test_a_table_of_studies_says_every_point_and_the_gap():
    rate = {"rate": 0.5, "low": 0.25, "high": 0.75}
    point = {"study": "gold", "line": "trace", "x": 0.1, "perplexity": 1.5}
    point |= {"compliance_guarded": rate, "compliance": rate | {"rate": 0.6}}
    found = {"points": [point], "split": "test", "seeds": [0, 1], "commit": "abc"}
    told = studies.table(found | {"gap_closed": {"0.1": rate}})
    assert "| gold | trace | 10% | 50.0 [25.0, 75.0] | 60.0 [25.0, 75.0] | 1.50 |" in told
    assert "errs on 10%: 50 % [25, 75]." in told and "seeds 0, 1; commit abc." in told


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


PROGRAM = """HloModule jit_step
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = f32[4,8]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %s = bf16[1,8]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (q: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = f32[10]{0} all-reduce(%z), replica_groups={{0,1},{2,3}}, to_apply=%add
  %one = f32[10]{0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
}
"""  # noqa: E501


def test_received_bytes_of_a_program_by_hand():
    """Three trips: 3 of 4 parts of 128 bytes gathered and of 64 scattered; then half of 2 x 40."""
    assert collectives.received(PROGRAM) == {
        "all-gather": 3 * 96.0,
        "reduce-scatter": 3 * 48.0,
        "all-reduce": 40.0,
    }


ON_TPU = """HloModule jit_step
%limit (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%pieces (a: f32[4,8]) -> f32[4,8] {
  %g.1 = f32[4,8]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1}}, frontend_attributes={chain_id="1"}
}
%all-reduce-scatter.2 (a: f32[8]) -> f32[4] {
  %r = f32[8]{0} all-reduce(%a), channel_id=9, replica_groups={{0,1}}, to_apply=%add
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%pieces
  %g.2 = f32[4,8]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1}}, frontend_attributes={chain_id="1"}
  %f.2 = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %p = f32[8]{0} collective-permute(%x), channel_id=11, source_target_pairs={{0,1}}
}
ENTRY %main (q: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%limit, body=%body
}
"""  # noqa: E501


def test_received_bytes_of_a_program_for_tpu_by_hand():
    """Five trips: half of 128 bytes in pieces of one gather, half of 32 scattered, 32 permuted."""
    whole = {"all-gather": 5 * 64.0, "all-reduce": 5 * 16.0, "collective-permute": 5 * 32.0}
    assert collectives.received(ON_TPU) == whole
    waited_for = {k: v for k, v in whole.items() if k != "all-gather"}
    assert collectives.received(ON_TPU, waited_for=True) == waited_for
    with pytest.raises(ValueError, match="a loop of unknown length"):
        collectives.received(ON_TPU.replace("constant(5)", "parameter(0)"))


def test_packing_counts_what_each_way_computes():
    alone = np.array([[10, 30], [20, 20]] * 200)
    rows = {row["how"]: row for row in packing.measure(alone, np.full(400, 36))}
    assert rows["padded"]["real_token_share"] == pytest.approx(40 / 60, rel=1e-3)
    for how, computed in (("packed", 40), ("shared", 36), ("ours", 36)):
        positions = rows[how]["computed_per_token"] * 40  # of a pair, in rows that have some room
        assert computed <= positions < 1.2 * computed
        assert rows[how]["real_token_share"] == pytest.approx(computed / positions)


def test_the_readme_has_the_headlines_that_were_measured():
    readme = headlines.README.read_text()
    assert headlines.BEGIN in readme and headlines.written(readme) == readme
