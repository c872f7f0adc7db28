"""What bench.trl, bench.impact and bench.profile compute, and that their ways agree."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from bench import impact, impact_ours, profile_parts, profile_startup, real_pairs, training, trl
from trace_jax import losses, models

PAIRS = [
    {"prompt": "a b", "chosen": "c d e", "rejected": "f"},
    {"prompt": "a b", "chosen": "c d e", "rejected": "g h"},
    {"prompt": "x y z", "chosen": "ab ab", "rejected": "l m n"},
    {"prompt": "k", "chosen": "o", "rejected": "p q"},
]


def test_rounds_alternate_and_losses_are_compared_once():
    assert trl.order(0) == list(trl.KINDS)
    assert trl.order(1) == [k for k in reversed(trl.KINDS) if k != "ours_in_order"]
    assert trl.order(2) == trl.order(1)[::-1]


def _run(seconds: float, steady: float, peak: float, loss: float, computed: int) -> dict:
    return {"seconds": seconds, "steady": steady, "peak_gib": peak, "losses": [0.7, loss],
            "tokens_computed": computed, "tokens_real": 100, "starved": 0}  # fmt: skip


def test_ratios_of_training_are_medians_over_rounds():
    """Rounds with ratios 2, 3 and 10: a ratio of medians would say 4."""
    mine = [_run(s, 1.0, 1.0, 0.6, 80) for s in (1.0, 2.0, 1.0)]
    theirs = [_run(s, 4.0, p, 0.5, 150) for s, p in ((2.0, 4.0), (6.0, 2.0), (10.0, 4.0))]
    found = {"ours": mine, "ours_again": mine, "ours_in_order": mine[:1], "trl_default": theirs,
             "trl_best": [run | {"peak_gib": 9.0} for run in theirs]}  # fmt: skip
    rows = trl.table(found, batch=8)
    ratios, ranges = trl.headline(rows)
    assert ratios["speedup_vs_trl_default"] == 3.0
    assert ranges["speedup_vs_trl_default"] == [2.0, 10.0]
    assert ratios["speedup_vs_trl_best_steady"] == 4.0
    assert ratios["memory_vs_trl"] == 0.25 and ranges["memory_vs_trl"] == [0.25, 0.5]
    assert ratios["loss_difference"] == pytest.approx(0.1)
    assert (ratios["computed_per_real"], ratios["computed_per_real_trl"]) == (0.8, 1.5)
    assert rows[0]["seconds"] == [1.0, 1.0, 2.0] and rows[0]["pairs_per_second"] == 16.0
    assert [run["seconds"] for run in rows[0]["runs"]] == [1.0, 2.0, 1.0]


def test_a_step_is_starved_if_the_one_before_has_ended(monkeypatch):
    done = jax.block_until_ready(jnp.float32(1.0))
    monkeypatch.setattr(training.train, "train_step", lambda: (None, {"loss/total": done}))
    loop = training.Loop(lambda state, step: ((), {}))
    for _ in range(3):
        loop.step_fn(None, {"a": np.zeros((1, 2, 3))})
    assert loop.starved == 2 and len(loop.dispatched) == 3


def test_a_small_model_has_a_device_a_core(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    assert real_pairs.cpu_devices(tmp_path) >= 1
    with weights.open("wb") as file:
        file.truncate(real_pairs.SMALL)
    assert real_pairs.cpu_devices(tmp_path) == 1


def _row(path: str, vocabulary: int, rate: float, **values) -> dict:
    one = {"length": 128, "adapters": "none", "vocabulary": vocabulary, "path": path}
    one |= {"pairs_per_second": rate, "temp_bytes": None, "max_error_over_rms": 1e-6}
    return one | {"gold_seconds": None, "gold_pairs": None} | values


def test_headlines_of_impact_by_hand():
    rows = []
    for vocabulary in (512, 32_768):
        gold = {"gold_seconds": [1.0, 2.0, 3.0], "gold_pairs": 10}
        rows += [
            _row("torch_loop", vocabulary, 10.0, **gold),
            _row("vmap_grad@8", vocabulary, 20.0, temp_bytes=1000),
            _row("jvp@8", vocabulary, 40.0, temp_bytes=100, max_error_over_rms=3e-5),
            _row("stage", vocabulary, 50.0, gold_seconds=[0.1, 0.5, 0.6], gold_pairs=10),
            _row("stage_each", vocabulary, 30.0),
        ]
    rows.append(_row("stage", 512, 9.0, length=1024, adapters="lora", max_error_over_rms=None))
    found = impact.headline(rows)
    assert found["speedup_vs_torch_loop"] == 5.0 and found["speedup_vs_torch_loop_each_16m"] == 3.0
    assert found["speedup_vs_vmap_grad"] == 2.0 and found["temp_vs_vmap_grad"] == 0.1
    assert found["speedup_of_gold"] == 4.0 and found["max_relative_error"] == 3e-5
    whole = (300 * 0.2 + 10_000 / 10.0) / (300 * 0.05 + 10_512 / 50.0)
    assert found["speedup_vs_torch_loop_whole"] == pytest.approx(whole)


def test_the_matrix_of_impact_is_whole():
    """Full and LoRA, three vocabularies, four lengths, batches 1 to 16; PyTorch everywhere."""
    assert {(c.vocabulary, c.adapters) for c in impact.CASES} == {
        (v, a) for v in (512, 32_768, 131_072) for a in ("none", "lora")
    }
    assert {c.length for c in impact.CASES} == {128, 256, 512, 1024}
    assert all(c.paths[0] == "torch_loop" and "stage" in c.paths for c in impact.CASES)
    for path in ("vmap_grad", "jvp"):
        assert {f"{path}@{n}" for n in (1, 4, 8, 16)} < set(impact.CASES[0].paths)
    for case in impact.CASES:
        sizes = [int(p.partition("@")[2]) for p in case.paths if "@" in p]
        assert all(max(case.slow, n) % n == 0 and n <= case.stage for n in sizes)


@pytest.mark.parametrize("adapters", ["none", "lora"])
def test_ways_to_score_agree(adapters, tmp_path):
    """PyTorch, the stage and forward mode, each with a g_J of its own: 1e-4 of the rms."""
    pytest.importorskip("torch")
    from bench import impact_torch

    models.save(tiny.module(), tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    problem = impact_ours.Problem(str(tmp_path), 24, adapters, PAIRS, len(PAIRS))
    expected = impact_torch.way(problem).score()
    scale = np.sqrt(np.mean(np.square(expected)))
    assert scale > 0
    names = ["stage"] if adapters == "lora" else ["stage", "jvp@2", "vmap_grad@4"]
    for name in names:
        way = impact_ours.way(name, problem)
        np.testing.assert_allclose(way.score(), expected, atol=1e-4 * scale, err_msg=name)
        assert (way.temp_bytes is None) == (name == "stage")


PROGRAM = """HloModule jit_step

FileNames
1 "/x/trace_jax/train.py"
2 "/x/trace_jax/models/decoder.py"

FunctionNames
1 "train_step"
2 "gradient"
3 "Layer.finish"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=37 end_column=61}
2 {file_name_id=1 function_name_id=2 line=3 end_line=3 column=20 end_column=30}
3 {file_name_id=2 function_name_id=3 line=3 end_line=3 column=20 end_column=30}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=3 parent_frame_id=2}

ENTRY %main (q: f32[8]) -> f32[8] {
  %dot.1 = f32[8]{0} dot(%x, %y), metadata={op_name="jit(step)/dot" stack_frame_id=3}
  %while.2 = (s32[], f32[8]) while(%t), body=%b, metadata={op_name="w" stack_frame_id=2}
  %add.3 = f32[8]{0} add(%x, %y), metadata={op_name="jit(step)/add" stack_frame_id=2}
  %copy.4 = f32[8]{0} copy(%x)
  ROOT %multiply.5 = f32[8]{0} multiply(%x, %y), metadata={op_name="m" stack_frame_id=1}
}
"""


def test_operations_belong_to_functions_on_their_stack():
    assert profile_parts.owners(PROGRAM) == {
        "dot.1": "MLP, attention's output",
        "add.3": "losses and sums of gradients",
        "copy.4": "copies and loops",
        "multiply.5": "optimizer",
    }


def test_operations_belong_to_what_asked_for_them():
    """A program of ours and its real trace: most of its time is in the head and the loss."""

    def loss(hidden_RLD, head_DV):
        target_RL = jnp.zeros(hidden_RLD.shape[:2], jnp.int32)
        counted_RL = jnp.ones(target_RL.shape, bool)
        return losses.token_logprobs(
            lambda h: h @ head_DV, hidden_RLD, target_RL, counted_RL, 64
        ).sum()

    compiled = jax.jit(loss).lower(jnp.ones((2, 128, 64)), jnp.ones((64, 512))).compile()
    text = compiled.as_text()
    belongs = profile_parts.owners(text)
    assert "head and loss" in belongs.values()
    loops = re.findall(r"%([\w.-]+) = .*? while\(", text)
    assert loops and not set(loops) & set(belongs)
    found: dict[str, float] = {}
    with profile_parts.traced(found, "jit_loss", text):
        jax.block_until_ready(compiled(jnp.ones((2, 128, 64)), jnp.ones((64, 512))))
    assert found and max(found, key=found.get) == "head and loss"


def test_start_up_is_put_down_to_the_function_of_ours():
    def at(path: str, function: str, inner: str) -> str:
        made = {"look": lambda: profile_startup.owner(sys._getframe())}
        exec(compile(f"def {function}():\n return look()", path, "exec"), made)
        exec(compile(f"def outer():\n return {function}()", inner, "exec"), made)
        return made["outer"]()

    ours = "/somewhere/trace_jax/scratch.py"
    assert at(ours, "train_tokenizer", "/x/launch.py") == "scratch.train_tokenizer"
    assert at("/x/jax/_src/compiler.py", "backend_compile_and_load", ours) == "compile"
    assert at("<frozen importlib._bootstrap>", "_load", ours) == "imports"
    assert Path(profile_parts.__file__).exists() and at("/x/a.py", "f", "/x/b.py") == "other"
