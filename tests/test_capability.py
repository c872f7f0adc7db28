"""The harness over our model against its own Hugging Face backend; tasks from a user's files."""

import csv
import io
import json
import zipfile
from pathlib import Path

import pytest

from trace_jax import models
from trace_jax.errors import InputError
from trace_jax.evaluate import capability_tasks, statistics

QUESTIONS = [(f"What is {n} + {n}?", *(str(2 * n + k) for k in range(4)), "ABCD"[n % 4])
             for n in range(8)]  # fmt: skip


def _csv(rows) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """A few documents of each data set in its own format."""
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        archive.writestr("data/dev/sums_dev.csv", _csv(QUESTIONS[:2]))
        archive.writestr("data/test/sums_test.csv", _csv(QUESTIONS[2:]))
    hella = [
        {"ind": n, "activity_label": "Cats", "ctx": f"A cat sees {n} dogs. It [title]",
         "endings": [f"runs to {c}." for c in "abcd"], "label": str(n % 4)}
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "hella.jsonl").write_text("\n".join(map(json.dumps, hella)))
    gsm = [{"question": f"{n} cats and a dog?", "answer": f"{n} + 1\n#### 1,00{n}"}
           for n in range(9)]  # fmt: skip
    (tmp_path / "gsm.jsonl").write_text("\n".join(map(json.dumps, gsm)))
    heads = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    rows = [(f"Which is {n}?", f"{n}", "x", "y", "z") for n in range(12)]
    (tmp_path / "gpqa.csv").write_text(_csv([heads, *rows]))
    names = {"mmlu": "mmlu.zip", "hellaswag": "hella.jsonl", "gsm8k": "gsm.jsonl"}
    return {k: tmp_path / v for k, v in (names | {"gpqa": "gpqa.csv"}).items()}


def _documents(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_documents_of_files(files, tmp_path):
    made = capability_tasks.tasks(files, tmp_path / "out")
    assert [t["task"] for t in made] == [f"{n}_file" for n in capability_tasks.NAMES]
    mmlu = _documents(tmp_path / "out", "mmlu")
    assert len(mmlu) == 6 and mmlu[0]["gold"] == "ABCD".index(QUESTIONS[2][5])
    assert mmlu[0]["query"].count("Answer:") == 3 and mmlu[0]["query"].endswith("Answer:")
    assert "Answer: B\n\n" in mmlu[0]["query"] and "(with answers) about sums." in mmlu[0]["query"]
    hella = _documents(tmp_path / "out", "hellaswag")
    assert hella[1]["query"].startswith("Cats: A cat sees 1 dogs.") and hella[1]["gold"] == 1
    gsm = _documents(tmp_path / "out", "gsm8k")
    assert len(gsm) == 4 and gsm[0]["answer"] == "1005" and gsm[0]["query"].count("####") == 5
    gpqa = _documents(tmp_path / "out", "gpqa")
    assert len({d["gold"] for d in gpqa}) > 1, "the right answer is always at one place"
    for n, doc in enumerate(gpqa):
        assert f"{'ABCD'[doc['gold']]}. {n}\n" in doc["query"]


def test_a_limit_draws_evenly(files, tmp_path):
    capability_tasks.tasks({"gpqa": files["gpqa"]}, tmp_path / "out", limit=4)
    queries = [d["query"] for d in _documents(tmp_path / "out", "gpqa")]
    assert [q.split("?")[0] for q in queries] == [f"Which is {n}" for n in (0, 4, 7, 11)]


@pytest.mark.parametrize(
    ("say", "share"),
    [
        (lambda answer: answer, 1.0),
        (lambda answer: answer + ".", 1.0),
        (lambda answer: answer.replace(",", ""), 1.0),
        (lambda answer: answer.replace(",", "") + ".\n", 1.0),
        (lambda answer: answer + " dollars.\n\nAnd so on, 7.", 1.0),
        (lambda answer: answer + "1", 0.0),
        (lambda answer: answer.replace("####", "It is"), 0.0),
    ],
    ids=["as written", "full stop", "no commas", "both", "goes on", "wrong", "unmarked"],
)
def test_right_answers_of_gsm8k_are_right_to_the_harness(tmp_path, say, share):
    """The data set's own answers through the harness's filters and metric; 14 have commas."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM

    answers = ["18", "1,005", "70,000", "-3", "2.50", "1,000,000", "0"]
    gold = {f"Case {n}?": f"As 1 + 2 = 3, it is {a}.\n#### {a}"
            for n, a in enumerate(["0"] * capability_tasks.SHOTS + answers)}  # fmt: skip

    class Gold(LM):
        """Answers a question as the data set does, said in some way."""

        def generate_until(self, requests, disable_tqdm=False):
            asked = [r.args[0].split("Question: ")[-1].split("\n")[0] for r in requests]
            return [" " + say(gold[question]) for question in asked]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    rows = [json.dumps({"question": q, "answer": a}) for q, a in gold.items()]
    (tmp_path / "gsm.jsonl").write_text("\n".join(rows))
    tasks = capability_tasks.tasks({"gsm8k": tmp_path / "gsm.jsonl"}, tmp_path / "out")
    found = lm_eval.simple_evaluate(model=Gold(), tasks=tasks, bootstrap_iters=0)
    assert len(found["samples"]["gsm8k_file"]) == len(answers)
    assert found["results"]["gsm8k_file"]["exact_match,strict-match"] == share


def test_differences_that_do_not_vary_have_newcombes_interval():
    """Of rates alone; what varies is a bootstrap over documents."""
    pytest.importorskip("lm_eval")
    from trace_jax.evaluate import capability

    def of(a: list[float], b: list[float]) -> tuple[float, float, float]:
        rows = [[{"doc_id": n, "m": v} for n, v in enumerate(values)] for values in (a, b)]
        found = capability.paired(*rows, "m")
        return found["difference"], found["low"], found["high"]

    assert of([1, 1, 1], [0, 0, 0]) == (1, *statistics.newcombe(1, 0, 3))
    assert of([1, 0, 1], [1, 0, 1]) == (0, *statistics.newcombe(2 / 3, 2 / 3, 3))
    assert of([9.0, 7.0], [7.0, 5.0]) == (2, 2, 2)  # no rate
    assert of([1, 1, 0, 1], [0, 0, 0, 0]) == (0.75, 0.25, 1)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mmlu", "not a zip", "not a zip file"),
        ("gsm8k", '{"q": 1}', "need question and answer"),
        ("hellaswag", '{"ctx": "a"}', "not a line of HellaSwag"),
        ("gpqa", '{"Question": "a"}', "a row of GPQA has Question, Correct Answer"),
    ],
)
def test_files_that_are_something_else_are_one_line(tmp_path, name, text, said):
    path = tmp_path / ("x.zip" if name == "mmlu" else "x.jsonl")
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        capability_tasks.tasks({name: path}, tmp_path / "out")
    with pytest.raises(InputError, match="no such file"):
        capability_tasks.tasks({name: tmp_path / "gone"}, tmp_path / "out")


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory, shared) -> Path:
    """A random model of Qwen2.5's shape with a real tokenizer of 512 entries."""
    path = tmp_path_factory.mktemp("models") / "qwen"
    config = models.ModelConfig.from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 640,
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2,
        }
    )  # fmt: skip
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    models.save(models.init(config, seed=0), path, tokenizer=tokenizer)
    return path


@pytest.mark.parametrize(
    "which", ["stories260k", pytest.param("tiny_qwen", marks=pytest.mark.soak)]
)
def test_numbers_are_those_of_the_hugging_face_backend(which, shared, request, files, tmp_path):
    """Multiple choice, generation and rolling log-likelihood, longer than the context too."""
    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from trace_jax.evaluate import capability, subject

    path = shared / "models" / which if which == "stories260k" else request.getfixturevalue(which)
    one = subject.load(str(path), "float32", (1, 2))
    ours = capability.HarnessModel(one.module, one.tokenizer, stop_ids=one.stop_ids)
    theirs = huggingface.HFLM(
        pretrained=str(path),
        device="cpu",
        dtype="float32",
        batch_size=3,
        max_length=ours.max_length,
    )
    tasks = capability_tasks.tasks(files, tmp_path / "out")
    stories = [{"text": "Once upon a time there was a cat. " * n} for n in (1, 5, 60)]
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, stories)))
    data = {"data_files": {"test": str(tmp_path / "stories.jsonl")}}
    shared_keys = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    tasks += [
        shared_keys | {"task": "rolling", "output_type": "loglikelihood_rolling",
                       "doc_to_text": "", "doc_to_target": "{{text}}",
                       "metric_list": [{"metric": "word_perplexity"}]},
        shared_keys | {"task": "generation", "output_type": "generate_until",
                       "doc_to_text": "{{text[:60]}}", "doc_to_target": "x",
                       "generation_kwargs": {"until": ["."], "max_gen_toks": 30,
                                             "do_sample": False}},
    ]  # fmt: skip
    with one.devices():
        found = lm_eval.simple_evaluate(model=ours, tasks=tasks, bootstrap_iters=0)
    expected = lm_eval.simple_evaluate(model=theirs, tasks=tasks, bootstrap_iters=0)
    for task, rows in expected["samples"].items():
        for a, b in zip(found["samples"][task], rows, strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if isinstance(x, str):
                    assert x == y
                else:
                    x, y = (v if isinstance(v, tuple | list) else (v, None) for v in (x, y))
                    text = a["doc"]["text"] if task == "rolling" else ""
                    n = len(one.tokenizer(text)["input_ids"])  # whose float32 sum it is
                    assert abs(x[0] - y[0]) < max(1e-3, 2e-6 * n) and x[1] == y[1]
        for key, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][key] == pytest.approx(value, rel=1e-4)


def test_the_command_compares_models_on_the_same_documents(shared, files, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    from trace_jax.evaluate.__main__ import main

    path, out = shared / "models" / "stories260k", tmp_path / "found.json"
    arguments = ["capability", f"--model=a={path}", f"--model=b={path}", "--stop-ids=1,2",
                 f"--mmlu={files['mmlu']}", f"--gpqa={files['gpqa']}", f"--out={out}"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["first"] == "a" and "to_first" not in found["models"]["a"]["mmlu_file"]["acc"]
    b = found["models"]["b"]["mmlu_file"]["acc"]
    assert (
        b["n"] == 6 and b["to_first"]["difference"] == 0 and b["by_group"] == {"sums": b["value"]}
    )
    assert "| gpqa_file | acc |" in capsys.readouterr().out
    assert main([*arguments[:2], f"--model=a={path}", *arguments[3:]]) == 2
    assert "two models are called" in capsys.readouterr().err
    assert main(["capability", f"--model={path}", f"--out={out}"]) == 2
    assert "nothing to ask" in capsys.readouterr().err


TWO_FILTERS = """
task: two_filters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "[invalid]"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
- {name: strict, filter: [{function: regex, regex_pattern: "#### (.*)"}, {function: take_first}]}
- {name: none, filter: [{function: take_first}]}
"""


def test_filters_are_metrics_of_their_own(shared, files, tmp_path, capsys):
    """A story has no ####: what the strict filter finds is "[invalid]", the answer of all."""
    pytest.importorskip("lm_eval")
    from trace_jax.evaluate.__main__ import main

    path, out = shared / "models" / "stories260k", tmp_path / "found.json"
    (tmp_path / "tasks").mkdir()
    task = TWO_FILTERS.replace("DATA", str(files["gsm8k"]))
    (tmp_path / "tasks" / "two.yaml").write_text(task)
    arguments = ["capability", f"--model=a={path}", f"--model=b={path}", "--stop-ids=1,2",
                 f"--include={tmp_path / 'tasks'}", "--tasks=two_filters", "--limit=3",
                 f"--out={out}"]  # fmt: skip
    assert main(arguments) == 0
    models = json.loads(out.read_text())["models"]
    low, high = statistics.newcombe(1, 1, 3)  # and of 0 and 0
    same = {"difference": 0, "low": pytest.approx(low), "high": pytest.approx(high), "n": 3}
    expected = {"exact_match,strict": {"value": 1, "n": 3}, "exact_match": {"value": 0, "n": 3}}
    assert models["a"]["two_filters"] == expected
    assert models["b"]["two_filters"] == {k: v | {"to_first": same} for k, v in expected.items()}
    said = capsys.readouterr().out
    assert "| two_filters | exact_match,strict | 100.0 | 100.0 (+0.0 [-56.1, +56.1]) |" in said
    assert "| two_filters | exact_match | 0.0 | 0.0 (+0.0 [-56.1, +56.1]) |" in said


def test_a_task_that_nobody_knows_is_told_before_a_model_is_loaded(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    from trace_jax.evaluate.__main__ import main

    arguments = ["capability", f"--model={tmp_path / 'none'}", f"--out={tmp_path / 'found.json'}"]
    assert main([*arguments, "--tasks=hellaswag,arc_esay"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "--tasks=arc_esay: neither a task of the harness" in said[0]
    assert "the nearest are arc_easy" in said[0]


def test_a_context_too_short_for_a_task_is_told_before_any_other(straight, files, tmp_path, capsys):
    """The tiny run's model takes 64 tokens in all."""
    pytest.importorskip("lm_eval")
    from trace_jax.evaluate.__main__ import main

    arguments = ["capability", f"--model={straight[0] / 'base'}", f"--mmlu={files['mmlu']}",
                 f"--gsm8k={files['gsm8k']}", f"--out={tmp_path / 'found.json'}"]  # fmt: skip
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "gsm8k_file wants 256 new tokens, the model takes 64 in all" in said
    assert "log-likelihoods" not in said
