"""What the scripts of bench/ compute before they run anything."""

import numpy as np
import pytest

from bench import collectives, headlines, packing

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
