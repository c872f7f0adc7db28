"""--plan: what it counts, what it says, and that it writes nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trace_jax import config as config_lib
from trace_jax import hardware, launch, models, plan, plan_text, records, workdir, workload
from trace_jax.errors import InputError
from trace_jax.judges import gemini, gemini_job, reading, store
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
    assert set(found["programs"]) == {"train", "impact", "prefill", "sample"}
    a_model = 4 * found["parameters"]["total"]  # and two gradients of its size
    assert found["programs"]["impact"]["argument_bytes"] > 3 * a_model
    assert found["records"] == {"total": 60, "by_action": None, "assumed": ""}
    assert found["tokens"]["estimated"] and 0 < found["judge"]["calls"] <= 120
    # 8 prompts, a sample and a greedy answer, two policies; of two models and of one; 8 tries.
    later = {who: asked["calls"] for who, asked in found["judge_later"].items()}
    assert later == {"judge, baseline": 64, "judge, evaluate": 32, "judge, correct": None}
    assert found["judge_later"]["judge, correct"]["each"]["calls"] == 8
    assert found["device_memory_bytes"] > 2**30
    assert found["parameters"]["total"] == found["parameters"]["trainable"]


def test_adapters_train_less(planned):
    full, lora = (json.loads(planned(*more)[1]) for more in ((), ("--config.train.adapters=lora",)))
    assert lora["parameters"]["trainable"] < 0.5 * full["parameters"]["total"]
    assert lora["programs"]["train"]["flops"] < full["programs"]["train"]["flops"]


@pytest.mark.parametrize("inner", ["ga", "graddiff", "npo"])
def test_every_inner_loss_of_u2a_can_be_planned(planned, inner):
    code, out, _ = planned("--config.train.method=u2a", f"--config.u2a.inner={inner}")
    assert code == 0 and json.loads(out)["programs"]["train"]["peak_bytes"] > 0


def test_a_model_that_no_step_takes_is_counted_all_the_same(planned):
    """M_ref stays in memory where no KL term asks it: 4 bytes a parameter."""
    found = {}
    for method in ("npo", "trace"):
        programs = json.loads(planned(f"--config.train.method={method}")[1])["programs"]
        found[method] = programs["train"]["argument_bytes"]
    assert abs(found["npo"] - found["trace"]) < 0.2 * found["trace"]


def test_an_adapter_of_a_model_on_the_hub_needs_its_shape(planned, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    code, _, err = planned(f"--config.model.path={folder}", "--config.align.enabled=False")
    assert code == 2 and "is an adapter of 'org/base', which is not here; put the content" in err


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


def test_a_missing_tpu_compiler_is_one_line(planned, monkeypatch):
    def missing(topology: str):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.\nSee ...")

    monkeypatch.setattr(plan, "_of_slice", missing)
    code, out, err = planned("--topology=v5e:4x4")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "JAX TPU support not installed" in err
    assert "is it installed (pip install -e '.[tpu]' in the checkout) and the slice one" in err


def test_a_mesh_that_does_not_divide_is_one_line(planned):
    code, out, err = planned("--config.mesh.fsdp=3")
    assert code == 2 and out == "" and "does not divide the 8 devices" in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "name, chips",
    [
        ("gemma9b", "2x2"),
        ("gemma2b", "1x1"),
        *(pytest.param(n, "2x2", marks=pytest.mark.soak) for n in ("llama8b", "qwen7b")),
    ],
)
def test_the_tpu_compiler_plans_for_a_slice(name, chips, tmp_path):
    command = [
        sys.executable, "-m", "trace_jax.launch", f"--config={ROOT}/configs/{name}.py:smoke",
        "--plan", "--json", f"--topology=v5e:{chips}", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "E0000" not in done.stderr and "WARNING" not in done.stderr
    found = json.loads(done.stdout)
    count = {"2x2": 4, "1x1": 1}[chips]
    assert found["fits"] and found["device"]["count"] == count and found["device"]["kind"] == "v5e"
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


@pytest.mark.parametrize(
    "path", ["typo.jsonl", "data/typo.jsonl", "data/typo.CSV.gz", "/no/such", "a/b/c", "no*.csv"]
)
def test_a_plan_refuses_data_that_can_only_be_a_file_and_is_not_here(tmp_path, path):
    run = run_of(tmp_path, PAIRS)
    workload.check(run)
    run.config.data.path = path
    with pytest.raises(InputError, match="no such file; give one, or a data set of the hub"):
        workload.check(run)
    (tmp_path / "run").mkdir()
    records.write_jsonl(tmp_path / "run" / "records.jsonl", PAIRS)  # what was read before is enough
    workload.check(run)


def test_a_misspelt_file_stops_a_plan_by_one_line(planned):
    code, out, err = planned("--config.data.source=file", "--config.data.path=typo.jsonl")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "data.path=typo.jsonl: no such file" in err


@pytest.mark.parametrize(
    "path, why",
    [
        ("organisation/name", "data.path was not read"),
        ("gs://bucket/pairs.jsonl", "data.path was not read"),
        ("", "data.path is not given"),
    ],
)
def test_what_was_not_read_is_assumed_and_said(planned, path, why):
    flags = ("--config.data.source=file", f"--config.data.path={path}", "--config.data.pairs=70")
    code, out, err = planned(*flags)
    assert code == 0, err
    found = json.loads(out)
    assert found["records"] == {"total": 70, "by_action": None, "assumed": why}


def test_the_plan_for_people_says_what_was_assumed_and_what_is_asked(planned, tmp_path, capsys):
    found = json.loads(planned("--config.data.source=file")[1])
    found |= {"device_memory_share": 0.92, "device_memory_bytes": int(0.92 * 79 * 2**30)}
    found["judge_later"]["judge, baseline"] = {"calls": 3600, "tokens": 10**6, "price": 1.5}
    plan_text.show(found)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    text = "\n".join(lines)
    assert "60 (assumed (data.pairs); data.path is not given; not triaged yet" in text
    assert "72.68 GiB, 92% of a GPU's (XLA_CLIENT_MEM_FRACTION)" in text
    assert "judge, baseline │ at most 3,600 calls, 1,000,000 tokens, 1.50 USD" in text
    assert "not known before triage; a prompt of PUNISH records at most 8 calls" in text


def test_a_plan_needs_no_key_and_writes_no_store(planned, tmp_path, monkeypatch):
    for name in gemini_job.KEYS:
        monkeypatch.delenv(name, raising=False)
    code, out, err = planned("--config.judge.name=gemini", "--config.correct.source=gemini")
    assert code == 0, err
    found = json.loads(out)
    assert found["judge"]["price"] > 0 and list(tmp_path.iterdir()) == []
    later = found["judge_later"]
    assert later["judge, baseline"]["price"] == pytest.approx(2 * later["judge, evaluate"]["price"])
    assert later["writer, correct"]["each"]["price"] > 0
    code, _, err = planned("--config.judge.name=local")
    assert code == 2 and "judge local needs a model" in err  # as before a run


def test_of_a_gpu_the_share_that_jax_takes_is_planned_with(monkeypatch):
    for name in hardware.SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    whole = hardware.CHIPS["h100"].memory
    assert hardware.of_topology("h100:1")[0].memory == int(0.75 * whole)  # jax by itself
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.92")
    chip, is_tpu = hardware.of_topology("h100:1")
    assert not is_tpu and chip.memory == int(0.92 * whole) and chip.share == 0.92
    assert hardware.of_topology("v5e:4x4")[0] == hardware.CHIPS["v5e"]
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "much")
    with pytest.raises(InputError, match="XLA_CLIENT_MEM_FRACTION='much' is no share"):
        hardware.of_topology("h100:1")


def _judged(*statuses: str) -> dict[str, dict]:
    sides = ("chosen_verdict", "rejected_verdict")
    verdicts = (dict(status=s, probability=None, clauses={}) for s in statuses)
    return dict(zip(sides, verdicts, strict=True))


def test_stages_after_triage_are_counted_at_most(tmp_path):
    run = run_of(tmp_path, PAIRS)
    c = run.config
    c.data.validation_prompts, c.data.test_prompts = 5, 7
    c.evaluate.splits, c.evaluate.samples = ("test", "validation"), 2
    c.train.evaluate_every, c.train.total_steps, c.train.keep_best = 10, 30, True
    c.correct.tries = 4

    def calls() -> dict[str, int | None]:
        work = workload.of(run)
        return {who: asked["calls"] for who, asked in workload.judging_later(run, work).items()}

    both = 2 * 12 * 3  # policies, prompts, samples and a greedy answer
    expected = {"judge, baseline": 2 * both, "judge, evaluate": both}  # of base and M_ref
    expected["judge, train"] = 3 * 5 * 2 * 2  # steps 10, 20 and 30; samples alone
    assert calls() == expected | {"judge, correct": None}
    c.align.enabled = False
    c.evaluate.splits, c.train.evaluate_every = ("test",), 0
    half = 2 * 7 * 3
    assert calls() == {"judge, baseline": half, "judge, evaluate": half, "judge, correct": None}
    c.correct.source = "none"
    assert "judge, correct" not in calls()
    c.correct.source, c.judge.name = "gemini", "gemini"
    c.judge.gemini.clauses_per_call = 1
    n, old = (len(p.clauses) for p in (run.new_policy, run.old_policy))
    by_clause = workload.judging_later(run, workload.of(run))
    assert by_clause["judge, evaluate"]["calls"] == 7 * 3 * (n + old)
    assert by_clause["judge, correct"]["each"]["calls"] == 4 * n
    assert by_clause["writer, correct"]["each"]["calls"] == 4
    triaged = [
        row | _judged("violating", "violating") | {"action": "PUNISH"} for row in PAIRS
    ]  # of two prompts
    run.workdir.start("triage", {})
    records.write_jsonl(tmp_path / "run" / "triage.jsonl", triaged)
    run.workdir.finish("triage", {}, ("triage.jsonl",), seconds=1.0, summary={})
    found = workload.judging_later(run, workload.of(run))
    assert found["judge, correct"]["calls"] == 2 * 4 * n
    each = by_clause["writer, correct"]["each"]
    assert found["writer, correct"]["calls"] == 8
    assert found["writer, correct"]["price"] == pytest.approx(2 * each["price"])


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


def test_a_plan_reckons_replies_as_the_budget_does(tmp_path, monkeypatch):
    """pku_new: a reply on all 23 clauses takes about 605 tokens in truth."""
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    c = (run := run_of(tmp_path, PAIRS)).config
    c.policy.new, c.judge.name, c.asking.price_input = "pku_new", "gemini", 0.0
    asking = gemini_job.Asking.of(c.asking)
    for thinking, tokens in ((0, 635), (512, 1147), (-1, 2048)):
        c.judge.gemini.thinking_tokens = c.correct.gemini_thinking_tokens = thinking
        settings = gemini_job.Settings(**c.judge.gemini)
        reader = gemini.GeminiReader(settings, asking, store.Store(":memory:"))
        question = reading.Question("p", "a", run.new_policy.clauses)
        expected = reader.expected_price(reader.job(question, lambda *_: None))
        assert expected == pytest.approx(tokens * c.asking.price_output / 1e6)
        assert workload.judging(run)["price"] == pytest.approx(5 * expected)
        c.correct.source, c.correct.tries = "gemini", 1
        later = workload.judging_later(run, workload.of(run))
        assert later["judge, correct"]["each"]["price"] == pytest.approx(expected)
        longest = 80 + (thinking if thinking >= 0 else 8192)
        assert later["writer, correct"]["each"]["price"] * 1e6 == pytest.approx(longest * 2.5)


def test_a_plan_warns_of_prices_of_another_model(planned, capsys):
    gemini_job.check_prices.cache_clear()
    code, _, err = planned("--config.judge.name=gemini", "--config.judge.gemini.model=gemini-3")
    assert code == 0 and err.count("asking.price_* are those of gemini-2.5-flash") == 1


def test_actions_are_assumed_before_triage(tmp_path):
    work = workload.of(run_of(tmp_path, PAIRS))
    assert work.records == 3 and work.by_action is None and work.estimated
    assert len(work.conflict) == 3 and len(work.retain) == 1  # which is a pair as well


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


@pytest.mark.parametrize(
    ("method", "pairs", "anchors"),
    [
        ("dpo", 30, 0),
        ("dpo_gold", 30, 0),
        ("dpo_gold_uncorrected", 20, 0),
        ("sft", 30, 0),
        ("trace", 30, 10),
    ],
)
def test_assumed_records_are_the_examples_of_every_method(tmp_path, method, pairs, anchors):
    """30 records in thirds; trace has a RETAIN record as a pair and as an anchor."""
    rows = [{"prompt": f"{i} x", "chosen": "a b", "rejected": "c d"} for i in range(30)]
    run = run_of(tmp_path, rows)
    run.config.train.method = method
    work = workload.of(run)
    assert (len(work.conflict), len(work.retain)) == (pairs, anchors)
