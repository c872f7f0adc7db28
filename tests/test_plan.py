"""--plan: what it counts, what it says, and that it writes nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trace_jax import config as config_lib
from trace_jax import hardware, launch, models, plan, records, workdir, workload
from trace_jax.errors import InputError
from trace_jax.judges import gemini, gemini_job, store
from trace_jax.stages import context

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def planned(config, tmp_path, capsys, monkeypatch):
    """(exit code, stdout, stderr) of --plan --json in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> tuple[int, str, str]:
        code = launch.main(["launch", f"--config={config}", "--plan", "--json", *more])
        return code, *capsys.readouterr()

    return run


def test_json_alone_on_stdout_and_nothing_written(planned, tmp_path):
    code, out, _ = planned()
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert found["fits"] is True and found["verdict"].startswith("fits: ")
    for program in found["programs"].values():
        assert program["peak_bytes"] == (
            program["argument_bytes"]
            + program["output_bytes"]
            - program["alias_bytes"]
            + program["temp_bytes"]
        )
        assert program["flops"] > 0 and program["temp_bytes"] > 0
    assert set(found["programs"]) == {"train", "impact", "sample"}
    a_model = 4 * found["parameters"]["total"]  # and two gradients of its size
    assert found["programs"]["impact"]["argument_bytes"] > 3 * a_model
    assert found["records"] == {"total": 60, "by_action": None}
    assert found["tokens"]["estimated"] and 0 < found["judge"]["calls"] <= 120
    assert found["device_memory_bytes"] > 2**30
    assert found["parameters"]["total"] == found["parameters"]["trainable"]


def test_adapters_train_less(planned):
    full, lora = (json.loads(planned(*more)[1]) for more in ((), ("--config.train.adapters=lora",)))
    assert lora["parameters"]["trainable"] < 0.5 * full["parameters"]["total"]
    assert lora["programs"]["train"]["flops"] < full["programs"]["train"]["flops"]


def test_what_does_not_fit_says_by_how_much_and_what_to_try(planned, monkeypatch):
    small = hardware.Chip("toy", 2**20, 1e12)
    monkeypatch.setattr(hardware, "of_device", lambda device: small)
    code, out, _ = planned()
    found = json.loads(out)
    assert code == 0 and found["fits"] is False
    assert found["verdict"].startswith("does not fit by 0.0")
    assert "train.micro_rows=2" in found["verdict"] and "train.adapters=lora" in found["verdict"]
    assert found["hours"] > 0


@pytest.mark.parametrize(
    "topology, said",
    [
        ("v5e", "--topology='v5e' is unknown"),
        ("tpu9:2x2", "--topology='tpu9:2x2' is unknown"),
        ("h100:8", "run --plan on the machine"),
    ],
)
def test_unknown_topologies_are_one_line(planned, topology, said):
    code, out, err = planned(f"--topology={topology}")
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


def test_a_mesh_that_does_not_divide_is_one_line(planned):
    code, out, err = planned("--config.mesh.fsdp=3")
    assert code == 2 and out == "" and "does not divide the 8 devices" in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "name", ["gemma9b", *(pytest.param(n, marks=pytest.mark.soak) for n in ("llama8b", "qwen7b"))]
)
def test_the_tpu_compiler_plans_for_a_slice(name, tmp_path):
    command = [
        sys.executable, "-m", "trace_jax.launch", f"--config={ROOT}/configs/{name}.py:smoke",
        "--plan", "--json", "--topology=v5e:2x2", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["device"]["count"] == 4 and found["device"]["kind"] == "v5e"
    assert found["device_memory_bytes"] == int(15.75 * 2**30)
    assert not (tmp_path / "run").exists()


def test_flops_are_two_for_every_weight_and_the_attention():
    shape = models.ModelConfig(61, 24, 40, 3, 4, 2, 6, 64)
    matrices = 3 * (24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 40) + 24 * 61
    attention = 3 * 2 * 24 * 16 / 2  # scores and sums of 4 heads of 6 channels over half of 16
    assert shape.forward_flops(16) == 2 * (matrices + attention)


def run_of(tmp_path, rows: list[dict]) -> context.Context:
    """A run on these records, nothing done yet."""
    records.write_jsonl(tmp_path / "pairs.jsonl", rows)
    c = config_of(tmp_path)
    return context.Context(c, workdir.Workdir(tmp_path / "run"))


def config_of(tmp_path):
    c = config_lib.base_config()
    c.data.path = str(tmp_path / "pairs.jsonl")
    return c


PAIRS = [
    {"prompt": "p", "chosen": "a", "rejected": "b", "id": "1"},
    {"prompt": "p", "chosen": "a", "rejected": "c", "id": "2"},
    {"prompt": "q", "chosen": "a", "rejected": "b", "id": "3"},
]


def test_equal_responses_are_judged_once_and_done_records_not_again(tmp_path):
    run = run_of(tmp_path, PAIRS)
    assert workload.judging(run)["calls"] == 5  # p: a, b, c; q: a, b
    (tmp_path / "run").mkdir()
    records.write_jsonl(tmp_path / "run" / "triage.jsonl", [{"id": "1"}])
    assert workload.judging(run)["calls"] == 4  # record 2 still needs p: a, c


def test_calls_of_gemini_are_counted_and_priced_without_a_key(tmp_path, monkeypatch):
    for name in gemini_job.KEYS:
        monkeypatch.delenv(name, raising=False)
    run = run_of(tmp_path, PAIRS)
    assert workload.judging(run)["price"] == 0  # rules
    run.config.judge.name = "gemini"
    first = workload.judging(run)
    assert first["calls"] == 5 and first["tokens"] > 5 * 150
    asking = run.config.asking
    low, high = (
        first["tokens"] * price / 1e6 for price in (asking.price_input, asking.price_output)
    )
    assert low < first["price"] < high
    asking.batch = True
    assert workload.judging(run)["price"] == first["price"] / 2
    asking.batch = False
    run.store_path.parent.mkdir(exist_ok=True)
    kept = store.Store(run.store_path)
    settings = gemini_job.Settings(**run.config.judge.gemini.to_dict())
    verdicts = dict.fromkeys(run.new_policy.clauses, records.ClauseVerdict("compliant", None))
    kept.add(gemini.identity(settings), "p", "a", store.Call("ok"), verdicts)
    assert workload.judging(run)["calls"] == 4
    one = next(iter(verdicts))
    kept.add(gemini.identity(settings), "q", "a", store.Call("ok"), {one: verdicts[one]})
    again = workload.judging(run)
    assert again["calls"] == 4 and again["tokens"] < first["tokens"] * 0.8  # fewer clauses to ask


def test_actions_are_assumed_before_triage(tmp_path):
    work = workload.of(run_of(tmp_path, PAIRS))
    assert work.records == 3 and work.by_action is None and work.estimated
    assert len(work.conflict) == 2 and len(work.retain) == 1


def test_a_shape_that_nobody_gave_is_one_line(tmp_path):
    run = run_of(tmp_path, PAIRS)
    run.config.model.path = "org/model"
    with pytest.raises(InputError, match="model.hf_config does not give its shape"):
        plan.model_shape(run)


def test_a_model_from_scratch_has_the_vocabulary_of_its_tokenizer(tmp_path, shared):
    run = run_of(tmp_path, PAIRS)
    small = plan.model_shape(run).vocab_size
    run.config.model.scratch.tokenizer = str(shared / "tokenizers" / "smollm_tokenizer.json")
    assert plan.model_shape(run).vocab_size == 49152 > small


def test_records_of_a_pattern_are_counted(tmp_path):
    run = run_of(tmp_path, PAIRS)
    run.config.data.path = str(tmp_path / "p*.jsonl")
    assert workload.judging(run)["calls"] == 5


def test_weights_that_are_not_what_was_planned_are_refused():
    shape = models.ModelConfig(61, 24, 40, 3, 4, 2, 6, 64)
    other = models.ModelConfig(61, 24, 40, 2, 4, 2, 6, 128)
    shape.check_shape(models.ModelConfig(61, 24, 40, 3, 4, 2, 6, 128), "here")
    with pytest.raises(InputError, match="here: num_hidden_layers is 3, model.hf_config .* says 2"):
        shape.check_shape(other, "here")
