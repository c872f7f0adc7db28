"""The program as a user runs it: one tiny run of every stage, and what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
import pytest

import trace_jax
from trace_jax import config as config_lib
from trace_jax import hardware, launch, locks, metrics, models, stages, train, workdir
from trace_jax.errors import InputError
from trace_jax.models import lora

ROOT = Path(__file__).resolve().parents[1]
RATES = ("compliance_guarded", "compliance", "compliance_greedy")


def _program(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trace_jax.launch", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(straight[0], tmp_path / "run"))


def _main(*arguments: object) -> int:
    return launch.main(["launch", *map(str, arguments)])


def _error(capsys, *arguments: object) -> str:
    """The one line that the program ends with."""
    capsys.readouterr()
    assert _main(*arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    errors = [line for line in said if line.startswith("error: ")]
    assert errors and said[-1] == errors[0] and len(errors) == 1, said
    assert "Traceback" not in "".join(said)
    return errors[0]


def _ran(capsys) -> list[str]:
    """The stages that ran, not those that were skipped."""
    return re.findall(r"^\[(\w+)\]$", capsys.readouterr().err, re.MULTILINE)


def _json(path: Path):
    return json.loads(path.read_text())


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _files(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): workdir.hash_path(p) for p in path.rglob("*") if p.is_file()}


def test_a_run_writes_every_artefact(straight):
    path, done = straight
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "versions.json", "policy.yaml", "records.jsonl", "ref", "model",
                 "triage.jsonl", "corrections.jsonl", "gold.json", "impact.jsonl", "checkpoints",
                 "metrics.jsonl", "samples.jsonl", "eval.json", "report.html"):  # fmt: skip
        assert (path / name).exists(), name
    assert not list(path.rglob("*.tmp"))
    marks = {stage.name: _json(path / ".stages" / f"{stage.name}.json") for stage in stages.STAGES}
    outputs = [item for mark in marks.values() for item in mark["outputs"].items()]
    not_there = [name for name, digest in outputs if not digest]
    assert not_there == ["pauses.jsonl", "adapter"]  # where asked for, and of LoRA


def test_the_closing_tables_are_on_stdout(straight):
    path, done = straight
    for text in ("Triage and weights", "Compliance with the new policy", "re-aligned", "Stages"):
        assert text in done.stdout
    assert f"report: {path / 'report.html'}" in done.stdout
    assert f"model: {path / 'model'}" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


def test_records_triage_and_impact_have_their_form(straight):
    path, _ = straight
    found, triaged = _rows(path / "records.jsonl"), _rows(path / "triage.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in triaged]
    actions = {}
    for record, row in zip(found, triaged, strict=True):
        assert row.keys() == {
            "id", "prompt", "chosen", "rejected", "chosen_verdict", "rejected_verdict", "action",
        }  # fmt: skip
        assert all(row[key] == record[key] for key in ("prompt", "chosen", "rejected"))
        verdict = row["chosen_verdict"]
        assert verdict.keys() == row["rejected_verdict"].keys() == {
            "status", "probability", "clauses",
        }  # fmt: skip
        assert all(c.keys() == {"status", "probability"} for c in verdict["clauses"].values())
        actions[row["id"]] = row["action"]
    assert set(actions.values()) >= {"INVERT", "PUNISH", "RETAIN"}
    weighed = _rows(path / "impact.jsonl")
    assert all(row.keys() >= {"id", "action", "score", "weight"} for row in weighed)
    assert [row["id"] for row in weighed] == [
        i for i, action in actions.items() if action in ("INVERT", "PUNISH")
    ]
    assert all(row["action"] == actions[row["id"]] for row in weighed)
    scored = [row for row in weighed if not row["gold"]]
    positive = np.array([max(row["score"], 0) for row in scored])
    weights = np.array([row["weight"] for row in scored])
    of_scores = len(scored) * positive / positive.sum()
    np.testing.assert_allclose(weights, 0.75 + 0.25 * of_scores, rtol=1e-6)


def test_gold_corrections_and_metrics_have_their_form(straight):
    path, _ = straight
    gold = _json(path / "gold.json")
    assert gold["seed"] == 0 and 2 <= len(gold["pairs"]) <= 12
    triaged = {row["id"]: row["action"] for row in _rows(path / "triage.jsonl")}
    assert all(triaged[row["id"]] == row["action"] for row in gold["pairs"])
    corrections = _rows(path / "corrections.jsonl")
    assert [row["id"] for row in corrections] == [i for i, a in triaged.items() if a == "PUNISH"]
    assert all(row.keys() == {"id", "response", "tries"} for row in corrections)
    values = _rows(path / "metrics.jsonl")
    assert [row["step"] for row in values] == [1, 2, 3, 4]
    names = values[0].keys() - {"step"}
    assert {"loss/total", "train/grad_norm", "train/kl"} <= names
    assert all(re.fullmatch(r"\w+/\w+", name) for name in names)


def test_eval_has_its_form(straight):
    found = _json(straight[0] / "eval.json")
    for figures in (found, found["base"], found["ref"]):
        assert figures["perplexity"] > 1
        assert 0 <= figures["choice_accuracy"]["rate"] <= 1
        for name in RATES:
            rate = figures[name]
            assert rate.keys() == {"rate", "low", "high", "n", "by_action", "by_clause"}
            assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
            assert rate["n"] == 8 and rate["by_clause"]
            parts = (*rate["by_action"].values(), *rate["by_clause"].values())
            assert all(part.keys() == {"rate", "low", "high", "n"} for part in parts)
    assert found["guard"] and found["split"] == "test"
    rows = _rows(straight[0] / "samples.jsonl")
    assert {(r["model"], r["mode"]) for r in rows} == {
        (model, mode) for model in ("base", "ref", "trained") for mode in ("sample", "greedy")
    }
    guarded = [r["guarded"] for r in rows if (r["model"], r["mode"]) == ("trained", "sample")]
    assert found["compliance_guarded"]["rate"] == pytest.approx(np.mean(guarded))


def test_the_run_describes_itself(straight, config):
    path, _ = straight
    versions = _json(path / "versions.json")
    command = f"python -m trace_jax.launch --config={config} --workdir={path}"
    assert versions["command"] == command and versions["jax"] and versions["python"]
    assert versions["trace_jax"] == trace_jax.__version__  # also where it is not installed
    assert _json(path / "config.json")["train"]["total_steps"] == 4
    page = (path / "report.html").read_text()
    assert command in page and "M_ref" in page and "<script" not in page
    assert (path / "policy.yaml").read_text().strip()


def test_the_exported_model_is_the_trained_one_in_transformers_too(straight):
    torch = pytest.importorskip("torch")
    import transformers

    from trace_jax import models

    path = straight[0] / "model"
    module = models.load(path)
    tokens_BL = np.arange(3, 43, dtype=np.int32).reshape(2, 20)
    ours_BLV = np.asarray(module(tokens_BL))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        theirs_BLV = theirs(torch.tensor(tokens_BL)).logits.numpy()
    np.testing.assert_allclose(ours_BLV, theirs_BLV, atol=2e-4)
    ref_BLV = np.asarray(models.load(straight[0] / "ref")(tokens_BL))
    assert np.abs(ours_BLV - ref_BLV).max() > 1e-3, "the export is M_ref"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token_id is not None


def test_a_second_run_skips_everything_and_changes_no_file(straight, config, capsys):
    path, _ = straight
    files = [p for p in path.rglob("*") if p.is_file() and p.name != locks.NAME]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert _main(f"--config={config}", f"--workdir={path}", "--redo") == 0
    captured = capsys.readouterr()
    skipped = re.findall(r"^\[(\w+)\] done before, skipped$", captured.err, re.MULTILINE)
    assert skipped == list(stages.NAMES)
    assert "Compliance with the new policy" in captured.out
    after = {p for p in path.rglob("*") if p.is_file() and p.name != locks.NAME}
    assert {p: p.stat().st_mtime_ns for p in after} == before


def test_a_changed_config_is_refused_with_the_difference(run, config, capsys):
    before = _files(run)
    flags = (f"--config={config}", f"--workdir={run}", "--config.train.beta=0.2")
    said = _error(capsys, *flags)
    assert "stage impact was made from other inputs (train.beta: 0.1 -> 0.2)" in said
    assert "--redo" in said and "--workdir" in said
    assert _files(run) == before


def test_a_run_made_before_a_key_was_there_stays_done_at_what_the_key_meant_then(
    run, config, capsys, monkeypatch
):
    marks = [run / ".stages" / f"{stage}.json" for stage in ("impact", "train")]
    for mark in marks:
        found = json.loads(mark.read_text())
        found["inputs"] = {k: v for k, v in found["inputs"].items() if k != "train.layer_rows"}
        found["inputs"].pop("impact.strength", None)
        mark.write_text(json.dumps(found))
    flags = (f"--config={config}", f"--workdir={run}")
    said = _error(capsys, *flags)
    assert "stage impact was made from other inputs (impact.strength: 1.0 -> 0.25)" in said
    monkeypatch.setitem(config_lib.BEFORE, "impact.strength", 0.25)
    assert _main(*flags) == 0
    assert capsys.readouterr().err.count("done before, skipped") == len(stages.NAMES)


def test_redo_does_that_stage_and_what_depends_on_it(run, config, capsys):
    before = _files(run)
    flags = (
        f"--config={config}",
        f"--workdir={run}",
        "--redo",
        "--config.evaluate.temperature=0.9",
    )
    assert _main(*flags) == 0
    ran = _ran(capsys)
    # correct reads guard.json, which baseline rewrites; its text does not depend on anything else.
    assert ran[0] == "baseline" and "evaluate" in ran and ran[-1] == "report"
    assert not {"prepare", "align", "triage"} & set(ran)
    after = _files(run)
    assert before["ref/model.safetensors"] == after["ref/model.safetensors"]
    assert before["eval.json"] != after["eval.json"]
    assert _json(run / "config.json")["evaluate"]["temperature"] == 0.9


def test_redo_leaves_downstream_alone_where_nothing_came_out_different(run, config, capsys):
    report = run / "report.html"
    report.write_text("edited")
    assert _main(f"--config={config}", f"--workdir={run}", "--redo") == 0
    assert _ran(capsys) == ["report"]
    assert report.read_text() != "edited"


@pytest.mark.fault
def test_a_partial_triage_is_continued(run, config, capsys):
    path, started = run / "triage.jsonl", run / ".stages" / "triage.started.json"
    whole, mark = path.read_text(), _json(run / ".stages" / "triage.json")
    lines = whole.splitlines(keepends=True)
    first = json.loads(lines[0])
    first["rejected_verdict"]["probability"] = 0.25  # a mark that judging anew would wipe out
    path.write_text(json.dumps(first, ensure_ascii=False) + "\n" + lines[1] + lines[2][:40])
    (run / ".stages" / "triage.json").unlink()
    started.write_text(json.dumps({"stage": "triage", "inputs": mark["inputs"]}))
    assert _main(f"--config={config}", f"--workdir={run}", "--stages=triage") == 0
    assert _ran(capsys) == ["triage"]
    again = path.read_text().splitlines(keepends=True)
    assert json.loads(again[0]) == first and again[1:] == lines[1:]
    assert not started.exists()


@pytest.mark.fault
def test_a_killed_training_goes_on_to_the_same_end(straight, run, config, monkeypatch, capsys):
    for name in ("checkpoints", "metrics.jsonl", "eval.json", "samples.jsonl"):
        target = run / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    for mark in (run / ".stages").glob("*"):
        if mark.name.split(".")[0] in ("train", "evaluate", "export", "report"):
            mark.unlink()
    straight_loop = train.loop

    def killed(*arguments, on_metrics, **others):
        def stop_after_3(step, values):
            if step == 4:
                raise KeyboardInterrupt
            return on_metrics(step, values)

        return straight_loop(*arguments, on_metrics=stop_after_3, **others)

    flags = (f"--config={config}", f"--workdir={run}", "--stages=train,evaluate")
    with monkeypatch.context() as patch:
        patch.setattr(train, "loop", killed)
        assert _main(*flags) == 130
    assert [row["step"] for row in _rows(run / "metrics.jsonl")] == [1, 2, 3]
    assert "the same command goes on from here" in capsys.readouterr().err
    bars = []
    plain = metrics.progress
    monkeypatch.setattr(metrics, "progress", lambda *given: (bars.append(given), plain(*given))[1])
    assert _main(*flags) == 0
    assert (4, "train checkpoints", 2) in bars  # from the checkpoint, not from the start
    assert _ran(capsys) == ["train", "evaluate"]
    for name in ("metrics.jsonl", "eval.json", "samples.jsonl"):
        assert (run / name).read_text() == (straight[0] / name).read_text(), name


@pytest.mark.fault
@pytest.mark.parametrize("name", ["triage.jsonl", "impact.jsonl", "ref/model.safetensors"])
@pytest.mark.parametrize("how", ["edited", "gone"])
def test_an_artefact_that_changed_since_is_named(run, config, capsys, name, how):
    path, artefact = run / name, run / name.split("/")[0]
    if how == "edited":
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        path.unlink()
    said = _error(capsys, f"--config={config}", f"--workdir={run}")
    assert f"{artefact} {'was edited' if artefact.exists() else 'is gone'} since stage" in said
    assert "--redo" in said
    stage = {"triage.jsonl": "correct", "impact.jsonl": "train", "ref": "baseline"}[artefact.name]
    said = _error(capsys, f"--config={config}", f"--workdir={run}", f"--stages={stage}", "--redo")
    assert str(artefact) in said and "put it back" in said


_ARTEFACTS = [
    (stage.name, name)
    for stage in stages.STAGES
    for name in stage.outputs
    if name not in ("pauses.jsonl", "adapter")  # where asked for, and of LoRA
]


def _largest(path: Path) -> Path:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("how", ["a flipped bit", "cut off"])
@pytest.mark.parametrize(("stage", "name"), _ARTEFACTS)
def test_a_damaged_artefact_is_found_by_its_checksum(run, config, capsys, stage, name, how):
    path = _largest(run / name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data if how == "a flipped bit" else data[: len(data) // 2])
    before = _files(run)
    said = _error(capsys, f"--config={config}", f"--workdir={run}")
    assert f"{run / name} was edited since stage {stage} wrote it; put it back, or" in said
    assert "--redo" in said
    assert _files(run) == before  # nothing else lost


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_stage_mark_that_was_cut_off_is_one_line(run, config, capsys, size):
    mark = run / ".stages" / "align.json"
    mark.write_bytes(mark.read_bytes().rstrip()[:size])
    before = _files(run)
    said = _error(capsys, f"--config={config}", f"--workdir={run}")
    assert f"{mark}: not readable" in said and "delete it and the stage is done again" in said
    assert _files(run) == before


@pytest.mark.parametrize("text", ["[]", "3", "{}", '"mark"', '{"inputs": 1, "outputs": 2}'])
def test_a_stage_mark_of_another_form_is_one_line(run, config, capsys, text):
    mark = run / ".stages" / "align.json"
    mark.write_text(text)
    said = _error(capsys, f"--config={config}", f"--workdir={run}")
    assert f"{mark}: not readable" in said and "delete it and the stage is done again" in said


@pytest.mark.parametrize("name", ["inputs", "outputs", "ref", "seconds", "summary"])
def test_a_flipped_bit_in_a_stage_mark_never_passes_for_another_run(run, config, capsys, name):
    """The name of a field or file is changed; its checksums, too, would be others."""
    mark, other = run / ".stages" / "align.json", chr(ord(name[0]) ^ 4) + name[1:]
    mark.write_text(mark.read_text().replace(f'"{name}"', f'"{other}"', 1))
    said = _error(capsys, f"--config={config}", f"--workdir={run}")
    assert "align" in said and ("delete it" in said or "--redo" in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.train.no_such_key=1"], "unknown config key train.no_such_key; the nearest are"),
        (["--config.train.lr=1"], "key train.lr; the nearest are train.layer_rows, train.learning"),
        (["--config.trian.beta", "1"], "key trian.beta; the nearest are train.beta, "),
        (["--config.train.beta.x=1"], "key train.beta.x; the nearest are train.beta, "),
        (["--noconfig.train.keepbest"], "key train.keepbest; the nearest are train.keep_best, "),
        (["--config.train.beta=much"], "beta"),
        (["--config.train.method=magic"], "train.method='magic' is unknown; use one of trace, "),
        (["--config.train.method=magic"], "sft, or a preset: trace_paper, trace_paper_rescaled, "),
        (["--config.judge.name=oracle"], "judge.name='oracle' is unknown"),
        (["--config.policy.new=no_such"], "no policy 'no_such'"),
        (["--config.policy.old=no/such.yaml"], "no/such.yaml: cannot be read"),
        (["--config.model.path=/no/such"], "model.path=/no/such: no config.json there"),
        (["--config.evaluate.max_new_tokens=64"], "leaves no room"),
        (["--config.data.test_prompts=0"], "the test split has no prompts"),
        (["--stages=triage,magic"], "unknown stage 'magic'; choose from prepare, align"),
        (["--plan", "--stages=trian"], "unknown stage 'trian'; choose from prepare, align"),
        (["--config.data.path=mine.jsonl"], "data.source='synth' reads none: add --config.data."),
        (["--stages=impact"], "stage impact needs stage prepare, which has not finished"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["stray"], "unexpected argument 'stray'"),
        (["--workdir=s3://bucket/x"], "workdir s3://bucket/x: a run works in a local folder or in"),
        (["--workdir=https://x/y", "--plan"], "workdir https://x/y: a run works in a local"),
        (["--coordinator=localhost", "--processes=2", "--process=0"], "give HOST:PORT"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(config, tmp_path, capsys, monkeypatch, flags, said):
    if "test_prompts" in flags[0]:
        monkeypatch.setattr("trace_jax.stages.prepare._train_from_scratch", lambda run: None)
    assert said in _error(capsys, f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "no_such_module"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("from trace_jax import config\n\n\ndef get_config():\n"
         "    c = config.base_config()\n    c.trian.beta = 1\n    return c\n", "trian"),
        ("x = 1\n", "the config file defines no get_config()"),
        ("def get_config():\n    return 1\n", "is not a config"),
        ("def get_config():\n    int('x')\n", "could not be read (ValueError: invalid literal for"),
        ("def get_config():\n    None.x = 1\n", "could not be read (AttributeError: 'NoneType'"),
        ("def get_config(variant):\n    return 1\n", "this config has variants; name one, as FIL"),
        ("from trace_jax import config\n\n\ndef get_config():\n"
         "    c = config.base_config()\n    c.train.bta = 1\n    return c\n",
         "unknown config key bta; the nearest are align.beta, train.beta"),
    ],
    ids=["syntax", "import", "exception", "key", "no get_config", "no config", "value",
         "attribute", "variants", "nearest"],
)  # fmt: skip
def test_bad_config_files_are_one_line(tmp_path, capsys, monkeypatch, text, said):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # another test's config
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert said in _error(capsys, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_variant_of_a_config_without_any_is_one_line(config, capsys):
    assert _error(capsys, f"--config={config}:smoke") == (
        f"error: --config={config}:smoke: this config has no variants; leave out :smoke"
    )


def test_a_notebook_too_is_told_that_a_bucket_is_no_path(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("s3://bucket/x", Path("gs://bucket/x")):
        with pytest.raises(InputError, match="a run works in a local folder or in gs://BUCKET"):
            launch.realign(config_lib.base_config(), place)
    assert not list(tmp_path.iterdir())


def test_a_config_that_is_not_there_is_one_line(tmp_path, capsys):
    assert "--config=FILE is missing" in _error(capsys)
    assert "nowhere.py: no such file" in _error(capsys, f"--config={tmp_path / 'nowhere.py'}")
    assert str(tmp_path) in _error(capsys, f"--config={tmp_path}")


def test_flags_of_one_call_do_not_reach_the_next(config, tmp_path, capsys):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert "magic" in _error(capsys, *flags, "--config.train.method=magic", "--stages=impact")
    assert "needs stage prepare" in _error(capsys, *flags, "--stages=impact")


@pytest.mark.fault
def test_an_unwritable_workdir_is_one_line(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = _error(capsys, f"--config={config}", f"--workdir={tmp_path / 'file' / 'run'}")
    assert "cannot be written" in said and "--workdir" in said
    said = _error(capsys, f"--config={config}", f"--workdir={tmp_path / 'file'}")
    assert "cannot be written" in said


def test_the_workdir_of_another_run_is_one_line(run, config, capsys):
    before = _files(run)
    flags = (f"--config={config}", f"--workdir={run}", "--config.seed=7", "--config.data.pairs=30")
    said = _error(capsys, *flags)
    assert "stage prepare was made from other inputs" in said
    assert "data.pairs: 60 -> 30; seed: 0 -> 7" in said
    assert _files(run) == before


def test_a_policy_with_an_unknown_predicate_is_one_line(config, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nclauses:\n  - id: a\n    requirement: Be kind.\n    rules: {kindness: 3}\n"
    )
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.policy.new={path}")
    said = _error(capsys, *flags)
    assert "mine.yaml" in said and "kindness" in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def jsonl(straight, config, tmp_path) -> tuple[Path, list[dict], tuple[str, ...]]:
    """A JSONL file of the finished run's records, its rows, and flags that read it."""
    keys = ("prompt", "chosen", "rejected")
    rows = [{k: row[k] for k in keys} for row in _rows(straight[0] / "records.jsonl")]
    path = _write_rows(tmp_path / "mine.jsonl", rows)
    values = {"config": config, "workdir": tmp_path / "run", "config.data.source": "jsonl"}
    values |= {"config.data.path": path, "config.model.path": straight[0] / "base"}
    flags = tuple(f"--{name}={value}" for name, value in values.items())
    return path, rows, flags


@pytest.mark.fault
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "a line must be a JSON object, this is a list"),
        ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "'chosen' must be a text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same"),
    ],
)
def test_a_malformed_record_is_one_line_with_file_and_line(jsonl, capsys, line, said):
    path, _, flags = jsonl
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[5:]]) + "\n")
    found = _error(capsys, *flags)
    assert f"{path}:5" in found and said in found


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"architectures": ["OtherForCausalLM"]}, "OtherForCausalLM"),
        (
            "config.json",
            {"num_hidden_layers": 9},
            "input_layernorm.weight is missing",
        ),
        ("model.safetensors", 1000, "is damaged"),
    ],
)
def test_a_wrong_checkpoint_is_refused_before_anything_else(
    jsonl, straight, capsys, tmp_path, file, change, said
):
    model = shutil.copytree(straight[0] / "base", tmp_path / "model")
    if isinstance(change, int):
        os.truncate(model / file, change)
    else:
        changed = _json(model / file) | change
        (model / file).write_text(json.dumps(changed))
    found = _error(capsys, *jsonl[2], f"--config.model.path={model}", "--stages=prepare")
    assert said in found
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_an_adapter_is_a_model_and_the_one_that_comes_out_holds_both(jsonl, straight, tmp_path):
    base = straight[0] / "base"
    module = lora.add(models.load(base), rank=2, alpha=4.0, targets=("q", "up"), seed=0)
    for linear in (module.layers.q, module.layers.up):
        linear.lora_b[...] = linear.lora_b[...] + 0.05
    models.save_adapter(module, tmp_path / "deployed", base=str(base))
    path, rows, flags = jsonl
    _write_rows(path, rows[:60])
    changes = (
        f"--config.model.path={tmp_path / 'deployed'}", "--config.align.enabled=False",
        "--config.train.adapters=lora", "--config.train.lora.rank=3",
        "--config.train.total_steps=2",
    )  # fmt: skip
    assert _main(*flags, *changes) == 0
    run = tmp_path / "run"
    assert _json(run / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(base)
    made, one = (models.load(run / name) for name in ("adapter", "model"))
    before = models.load(tmp_path / "deployed")
    for name in ("q", "up", "down"):
        kernels = (getattr(m.layers, name).kernel[...] for m in (made, one, before))
        ours, theirs, old = map(np.asarray, kernels)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert np.abs(theirs - old).max() > 1e-5


def test_data_that_a_policy_has_nothing_against_is_one_line(jsonl, capsys, tmp_path):
    path, rows, flags = jsonl
    _write_rows(path, rows[:30])
    says = "    rules: {length: {in: response, unit: words, min: 1}}\n"
    (tmp_path / "mild.yaml").write_text(
        "name: mild\nclauses:\n  - id: words\n    requirement: It says something.\n" + says
    )
    found = _error(capsys, *flags, f"--config.policy.new={tmp_path / 'mild.yaml'}")
    assert "trace has no conflict to train on (triage: INVERT 0, PUNISH 0, RETAIN 20" in found


def test_chats_without_a_template_are_refused_before_anything_else(jsonl, capsys):
    _, _, flags = jsonl
    said = _error(capsys, *flags, "--config.data.as_chat=true", "--stages=prepare")
    assert "no chat template" in said


def test_a_response_that_is_too_long_is_an_error_or_dropped(jsonl, capsys, tmp_path):
    path, rows, flags = jsonl
    for i in range(0, 40, 4):  # so many that some would be in the gold batch
        rows[i] |= {"chosen": " ".join([rows[i]["chosen"]] * 12), "id": f"long-{i}"}
    prompts = _write_rows(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows[40:]])
    _write_rows(path, rows[:40])
    flags = (*flags, f"--config.data.prompts_path={prompts}")
    said = _error(capsys, *flags, "--stages=prepare,align")
    assert "record long-0: a response has" in said and "data.max_length=64" in said
    flags = (*flags, "--config.data.too_long=drop", "--redo")
    assert _main(*flags, "--stages=prepare,align,triage,baseline,correct,impact,train") == 0
    captured = capsys.readouterr()
    assert "10 records too long, dropped: long-0, long-4, " in captured.err
    assert "dropped=10" in captured.out
    for name in ("impact.jsonl", "gold.json"):
        assert "long-" not in (tmp_path / "run" / name).read_text()


def test_triage_and_help_never_import_jax(run, config, tmp_path):
    """A poisoned jax in front of the real one: whoever imports it stops."""
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    poison = {"PYTHONPATH": str(tmp_path / "poison")}
    (run / ".stages" / "triage.json").unlink()
    (run / "triage.jsonl").unlink()
    done = _program(f"--config={config}", f"--workdir={run}", "--stages=triage", **poison)
    assert done.returncode == 0, done.stderr
    assert "[triage]" in done.stderr and (run / "triage.jsonl").exists()
    done = _program("--help", **poison)
    assert done.returncode == 0 and "--workdir" in done.stdout and not done.stderr
    done = _program(f"--config={config}", f"--workdir={tmp_path / 'new'}", **poison)
    assert "jax was imported" in done.stderr, "the poison does not work"


def test_help_takes_less_than_a_second():
    code = "from trace_jax import launch, workdir\ntry:\n    launch.main(['launch', '--help'])\n"
    code += "except SystemExit:\n    pass"
    assert children.cpu_seconds(code, below=1.0) < 1.0


@pytest.mark.parametrize(
    "given, pinned, expected",
    [({}, False, None), ({}, True, 1), ({"JAX_NUM_CPU_DEVICES": "3"}, False, 3)],
)
def test_with_cpu_devices_0_every_core_is_a_device(given, pinned, expected):
    cores = sorted(os.sched_getaffinity(0))
    expected = expected or min(len(cores), 4)
    program = f"import os; os.sched_setaffinity(0, {cores[:1] if pinned else cores}); "
    program += "from trace_jax import launch; launch.set_environment(0); import jax; "
    program += "print(jax.device_count())"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.92"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "0"}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "0"}),
    ],
)
def test_gpus_are_taken_but_for_a_twelfth_unless_the_user_says_otherwise(
    monkeypatch, given, expected
):
    """And under the name that this jaxlib reads."""
    from jaxlib import xla_client

    for name in hardware.SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    launch.set_environment()
    found = {name: os.environ[name] for name in hardware.SHARE_VARIABLES if name in os.environ}
    assert found == expected
    options = xla_client.generate_pjrt_gpu_plugin_options()
    assert options.get("memory_fraction", 0.75) == hardware.gpu_share()
