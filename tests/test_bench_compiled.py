"""What the scripts of bench/ read from compiled programs: FLOPs of products, bytes received."""

import jax
import jax.numpy as jnp
import pytest

from bench import collectives, products, scaling
from trace_jax import config, models, sharding

PROGRAM = """HloModule jit_step
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = f32[4,8]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %o = f32[4,8]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, dimensions={0}
  %s = bf16[1,8]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (q: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = f32[10]{0} all-reduce(%z), replica_groups={{0,1},{2,3}}, to_apply=%add
  %one = f32[10]{0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
}
"""  # noqa: E501


def test_received_bytes_of_a_program_by_hand():
    """Three trips: of 128 bytes 3/4 and half gathered, of 64 3/4 scattered; then half of 2 x 40."""
    assert collectives.received(PROGRAM) == {
        "all-gather": 3 * (96.0 + 64.0),
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


CHOICE = """HloModule jit_step
%little (p: f32[10]) -> f32[10] {
  %r.1 = f32[5]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
%much (q: f32[8,4]) -> f32[8,2] {
  %q = f32[8,4]{1,0} parameter(0)
  %k = f32[4,2]{1,0} parameter(1)
  %d.1 = f32[8,2]{1,0} dot(%q, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r.2 = f32[10]{0} all-reduce(%d.1), channel_id=2, replica_groups={{0,1}}, to_apply=%add
}
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %c = f32[10]{0} conditional(%which, %a, %b), branch_computations={%little, %much}
}
ENTRY %main (q: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%n, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %e = f32[10]{0} conditional(%which, %a, %b), true_computation=%much, false_computation=%little
}
"""  # noqa: E501


def test_of_a_choice_the_dearer_branch_counts():
    """4 times 40 bytes of the sum over two, and 4 products of 8 x 4 by 4 x 2."""
    assert collectives.received(CHOICE.replace("channel_id", "c")) == {"all-reduce": 4 * 40.0}
    assert products.flops(CHOICE) == 4 * 2 * 8 * 4 * 2


def _compiled(f, *shapes):
    of = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*of).compile()


def _convolution(images, filters):
    return jax.lax.conv_general_dilated(
        images, filters, (2, 1), ((1, 2), (0, 3)), lhs_dilation=(1, 3), rhs_dilation=(2, 1)
    )


@pytest.mark.parametrize(
    ("f", "shapes", "by_hand"),
    [
        (jnp.matmul, [(6, 4), (4, 10)], 2 * 6 * 4 * 10),
        (lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [(2, 7, 3, 5), (2, 9, 3, 5)],
         2 * 2 * 3 * 7 * 9 * 5),
        (_convolution, [(2, 3, 9, 5), (4, 3, 2, 2)], None),
    ],
)  # fmt: skip
def test_flops_are_the_compilers_where_nothing_is_a_loop(f, shapes, by_hand):
    found = _compiled(f, *shapes)
    assert products.flops(found.as_text()) == found.cost_analysis()["flops"]
    assert by_hand in (None, products.flops(found.as_text()))


def test_flops_of_a_loop_are_those_of_its_trips():
    """Seven layers: forward, and twice as much backward; the compiler's own count has one."""

    def loss(x, w):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0].sum()

    found = _compiled(jax.grad(loss, argnums=(0, 1)), (16, 8), (7, 8, 8))
    assert products.flops(found.as_text()) == 3 * 7 * 2 * 16 * 8 * 8
    assert found.cost_analysis()["flops"] < products.flops(found.as_text())


def test_a_pass_cut_over_two_devices_computes_half_of_it_and_receives_something():
    values = {"family": "llama", "hidden_size": 32, "intermediate_size": 64, "layers": 1}
    shape = models.scratch(values | {"heads": 2, "kv_heads": 2, "context": 64}, 256)
    one, two = (
        scaling.compiled(
            "impact", config.base_config(), shape,
            sharding.make_mesh(1, n, 1, devices=jax.devices("cpu")[:n]), n, 64,
        )
        for n in (1, 2)
    )  # fmt: skip
    assert 0.99 < two["tflops"] / one["tflops"] < 1.05
    assert one["gib"] == 0 < two["gib"]


def test_headlines_of_scaling_are_of_neighbours_that_double():
    row = {"what": "CPU", "program": "train", "scaling": "weak", "devices": 4}
    row |= {"tflops": 1.0, "gib": 2.0, "waited_gib": 2.0}
    far = {**row, "what": "v5p:2x2x1"}
    last = {**far, "what": "v5p:2x2x2", "devices": 8, "gib": 3.0, "waited_gib": 1.0}
    more = {**row, "devices": 8, "tflops": 1.5}
    assert scaling.headline([row, more, far, last, {**last, "scaling": "weak, overlap"}]) == {
        "host_train_weak_flops_8_over_4": 1.5, "host_train_weak_bytes_8_over_4": 1.0,
        "train_weak_flops_8_over_4": 1.0, "train_weak_bytes_8_over_4": 1.5,
        "waited_share_with_overlap": 1 / 3,
    }  # fmt: skip
