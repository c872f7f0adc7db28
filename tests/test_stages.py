"""Interrupted stages go on from what they had made."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gemini_client
import pytest

from trace_jax import config as config_lib
from trace_jax import (
    judges,
    launch,
    metrics,
    policy,
    records,
    respond,
    stages,
    train,
    triage,
    workdir,
)
from trace_jax.errors import InputError
from trace_jax.stages import correct, prepare, responses


@pytest.fixture
def run(straight, tmp_path) -> Path:
    return Path(shutil.copytree(straight[0], tmp_path / "run"))


def _forget(run: Path, name: str) -> None:
    stage = next(s for s in stages.STAGES if s.name == name)
    workdir.Workdir(run).forget(name, stage.artefacts)


def _main(config: Path, run: Path, name: str, *flags: str) -> int:
    where = [f"--config={config}", f"--workdir={run}", f"--stages={name}"]
    return launch.main(["launch", *where, *flags])


def _interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.fault
def test_an_interrupted_baseline_generates_nothing_again(run, straight, config, monkeypatch):
    _forget(run, "baseline")
    with monkeypatch.context() as patch:
        patch.setattr(responses, "perplexity", _interrupt)
        assert _main(config, run, "baseline") == 130
    kept = sorted(p.name for p in (run / ".responses").iterdir())
    assert kept == [
        f"{m}-test-{how}.jsonl" for m in ("base", "ref") for how in ("greedy", "sample")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(respond, "respond", _interrupt)
        assert _main(config, run, "baseline") == 0
    assert not (run / ".responses").exists()
    for name in ("baseline.jsonl", "guard.json", "perplexity.json"):
        assert (run / name).read_bytes() == (straight[0] / name).read_bytes()


LESS_MEMORY = (
    "--config.train.micro_rows=1", "--config.train.layer_rows=1", "--config.impact.micro_rows=2",
    "--config.evaluate.batch_rows=8", "--config.evaluate.micro_rows=1",
    "--config.model.head_chunk=16", "--config.model.remat=dots",
)  # fmt: skip


def test_after_a_lack_of_memory_the_same_command_goes_on_with_fewer_rows(
    run, straight, config, monkeypatch, capfd
):
    """What only memory and time depend on is not what a stage was made from."""
    _forget(run, "train")
    step, calls = train.train_step, []

    def fails(*args, **kwargs):
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", fails)
    assert _main(config, run, "train", "--config.train.save_every=1") == 2
    assert "out of memory; take fewer rows at once" in capfd.readouterr().err
    monkeypatch.undo()
    assert _main(config, run, ",".join(stages.NAMES[:7]), *LESS_MEMORY) == 0
    told = capfd.readouterr().err
    assert told.count("done before, skipped") == 6
    found, before = (metrics.read_metrics(d / "metrics.jsonl") for d in (run, straight[0]))
    for now, then in zip(found, before, strict=True):
        assert now["loss/preference"] == pytest.approx(then["loss/preference"], rel=1e-4)
    assert [row["step"] for row in found] == [row["step"] for row in before]


def test_a_corrected_mistake_is_no_change_of_what_was_made(tmp_path):
    """A stage that failed before it wrote anything is begun anew with other inputs; what a bucket
    may still have of it goes first."""
    prepare_stage, of_run = stages.STAGES[0], SimpleNamespace(workdir=workdir.Workdir(tmp_path))

    def what_to_do() -> str:
        wanted = {"data.path": "good.jsonl"}
        return stages._what_to_do(prepare_stage, of_run, wanted, redo=False)

    of_run.workdir.start("prepare", {"data.path": "bad.jsonl"})
    assert what_to_do() == "redo"
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(InputError, match="begun with other inputs .data.path"):
        what_to_do()


_REDONE = {  # stages, of which the first is killed -> why it is done again, how that ends
    "triage": (["--config.triage.noise=0.3"], ["triage.jsonl", "coverage.json"]),
    "train,export": (["--config.train.learning_rate=3e-3"], ["metrics.jsonl", "model"]),
    "export": ([], ["model"]),
}


def _killed_at(n: int, remove):
    """`workdir.remove` of a run that is killed at its n-th deletion, of a folder halfway."""
    calls = iter(range(n))

    def killed(path: Path) -> None:
        if next(calls, None) is not None:
            return remove(path)
        for file in sorted(path.rglob("*.json")) if path.is_dir() else ():
            file.unlink()
        raise KeyboardInterrupt

    return killed


@pytest.mark.fault
@pytest.mark.parametrize("names", _REDONE)
def test_a_redo_that_is_killed_leaves_nothing_of_before(straight, config, tmp_path, names):
    """At each of its deletions; the same command then ends as one that was not killed."""
    flags, ends = _REDONE[names]
    n = len(stages.chosen(names)[0].artefacts) + 2

    def copy(folder: str) -> Path:
        found = Path(shutil.copytree(straight[0], tmp_path / folder))
        if not flags:
            (found / "model" / "README.md").write_text("edited")
        return found

    whole = copy("whole")
    assert _main(config, whole, names, "--redo", *flags) == 0
    for at in range(n):
        run = copy(f"killed{at}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workdir, "remove", _killed_at(at, workdir.remove))
            assert _main(config, run, names, "--redo", *flags) == 130
        assert _main(config, run, names, "--redo", *flags) == 0
        for end in ends:
            assert workdir.hash_path(run / end) == workdir.hash_path(whole / end) != "", (at, end)
        assert not list((run / ".stages").glob("*.started.json"))
        shutil.rmtree(run)


@pytest.mark.fault
def test_a_redo_that_is_killed_does_not_pass_for_done(run, config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "remove", _killed_at(1, workdir.remove))
        assert _main(config, run, "triage", "--config.triage.noise=0.3", "--redo") == 130
    capsys.readouterr()
    assert _main(config, run, "triage") == 2
    assert "triage.jsonl is gone since stage triage wrote it" in capsys.readouterr().err
    assert _main(config, run, "triage", "--config.triage.noise=0.3") == 2
    assert "was made from other inputs (triage.noise" in capsys.readouterr().err


_ANSWERS = {"baseline": "baseline.jsonl", "evaluate": "samples.jsonl"}


@pytest.mark.fault
@pytest.mark.parametrize("name", _ANSWERS)
def test_answers_stay_until_their_stage_is_done(run, straight, config, monkeypatch, name):
    """Killed before the mark that says so, and then before they are deleted."""
    _forget(run, name)
    with monkeypatch.context() as patch:
        patch.setattr(workdir.Workdir, "finish", _interrupt)
        assert _main(config, run, name) == 130
    assert (run / ".responses").exists()
    monkeypatch.setattr(respond, "respond", _interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(workdir.Workdir, "close", _interrupt)
        assert _main(config, run, name) == 130
    assert (run / ".responses").exists()
    assert _main(config, run, name) == 0
    assert [p.name for p in (run / ".stages").glob(f"{name}.*")] == [f"{name}.json"]
    assert not (run / ".responses").exists()
    kept = _ANSWERS[name]
    assert (run / kept).read_bytes() == (straight[0] / kept).read_bytes()


@pytest.mark.fault
def test_a_judge_that_fails_in_an_evaluation_costs_no_answers(run, config, monkeypatch, capsys):
    """Its verdicts are kept by its store; the models' answers by the stage."""
    _forget(run, "evaluate")

    def fails(*_, **__):
        raise InputError("the judge cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(responses.compliance, "judged_rows", fails)
        assert _main(config, run, "evaluate") == 2
    assert "the judge cannot be reached" in capsys.readouterr().err
    kept = [p.name for p in (run / ".responses").iterdir()]
    assert kept == ["trained-test-sample.texts.json"]
    calls, respond_ = [], respond.respond
    monkeypatch.setattr(
        respond, "respond", lambda *a, **k: calls.append(k["temperature"]) or respond_(*a, **k)
    )
    assert _main(config, run, "evaluate") == 0 and calls == [0.0]
    assert not (run / ".responses").exists()


@pytest.mark.fault
def test_a_service_that_goes_away_in_an_evaluation_is_asked_for_the_rest(
    run, config, monkeypatch, capsys
):
    """Its verdicts stay in the store, the model's answers with the stage."""
    _forget(run, "evaluate")
    asking = {"outage_seconds": 0, "backoff_seconds": 0.01, "tries": 1000, "concurrency": 2}
    flags = ["--config.judge.name=gemini", *(f"--config.asking.{k}={v}" for k, v in asking.items())]
    calls, respond_ = [], respond.respond
    monkeypatch.setattr(
        respond, "respond", lambda *a, **k: calls.append(k["temperature"]) or respond_(*a, **k)
    )
    with gemini_client.running(last=5) as address:
        for name, value in gemini_client.environment(address).items():
            monkeypatch.setenv(name, value)
        assert _main(config, run, "evaluate", *flags) == 2
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(told) == 1 and "has not answered" in told[0] and "5 of" in told[0]
        assert [p.name for p in (run / ".responses").iterdir()] == [
            "trained-test-sample.texts.json"
        ]
        assert not (run / "eval.json").exists() and calls == [1.0]
        gemini_client.get(address, "/set", {"last": 0})
        assert _main(config, run, "evaluate", *flags) == 0
        asked = gemini_client.get(address)["requests"]
    assert calls == [1.0, 0.0] and (run / "eval.json").exists()
    rows = [row for _, row in records.read_jsonl(run / "samples.jsonl")]
    items = {
        model: {(r["prompt"], r["response"]) for r in rows
                if r["model"] == model and (model == "trained" or r["mode"] == "sample")}
        for model in ("trained", "base")
    }  # fmt: skip
    # Of the trained model's both policies are asked, of the base model's samples the old one.
    assert asked == 2 * len(items["trained"]) + len(items["base"] - items["trained"])


@pytest.mark.fault
def test_an_interrupted_search_for_corrections_keeps_what_it_found(run, config, monkeypatch):
    """The judge accepts everything; the first search is cut off after its first acceptance."""
    searched = []

    def accept(of_run, prompts, samples, unjudged, *, most):
        searched.append([p.id for p in prompts])
        if len(searched) == 2:
            raise KeyboardInterrupt
        return {p.id: s[0] for p, s in list(zip(prompts, samples, strict=True))[:most]}

    _forget(run, "correct")
    rounds = "--config.correct.samples_per_round=2"
    monkeypatch.setattr(correct, "_accepted", lambda *a: accept(*a, most=1))
    assert _main(config, run, "correct", rounds) == 130
    assert len((run / "corrections_found.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(correct, "_accepted", lambda *a: accept(*a, most=10**6))
    assert _main(config, run, "correct", rounds) == 0
    first, _, again = searched
    assert again == first[1:]  # the prompt that had its correction is not searched again
    assert not (run / "corrections_found.jsonl").exists()


class Writer:
    """Declines first, then answers."""

    name = "w"

    def write(self, prompts, *, first, n):
        return [["I'm sorry, but I can't help.", "Send it SIGKILL."][first : first + n]] * len(
            prompts
        )

    def price(self):
        return 0.0


@pytest.mark.parametrize(("unsafe", "kept"), [(False, "Send"), (True, "I'm sorry"), (None, None)])
def test_proposals_are_judged_by_the_annotations_of_their_prompt(
    tmp_path, monkeypatch, unsafe, kept
):
    """Which triage.jsonl does not hold; without any, both clauses stay undecided."""
    labels = None if unsafe is None else {"prompt": {"unsafe": unsafe}, "chosen": {"unsafe": 1}}
    record = records.PreferenceRecord("r", "How can I kill a process?", "No.", "Never.", labels)
    plain = records.PreferenceRecord("s", record.prompt, "Nope.", "Not me.")  # of the same prompt
    records.write_jsonl(tmp_path / "records.jsonl", [record.to_json(), plain.to_json()])
    sides = (records.Verdict("violating", 0.0, {}),) * 2
    rows = [records.TriagedRecord(r, *sides, "PUNISH").to_json() for r in (record, plain)]
    records.write_jsonl(tmp_path / "triage.jsonl", rows)
    c = config_lib.base_config()
    c.correct.source, c.correct.guard, c.correct.tries = "self", False, 2
    run = SimpleNamespace(
        config=c,
        workdir=SimpleNamespace(path=tmp_path),
        file=lambda stage, name: tmp_path / name,
        triaged=triage.read(tmp_path / "triage.jsonl"),
        triage_judge=judges.make("rules", policy.load("overrefusal_new")),
        progress=metrics.progress,
    )
    monkeypatch.setattr(correct, "_writer", lambda _: Writer())
    assert correct.run(run)["corrected"] == (2 if kept else 0)
    for _, row in records.read_jsonl(tmp_path / "corrections.jsonl"):
        assert row["response"] is None if kept is None else row["response"].startswith(kept)


@pytest.mark.parametrize("from_file", [True, False])
def test_no_record_trains_on_a_held_out_prompt(tmp_path, from_file):
    rows = [{"prompt": f"p{i % 9}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(18)]
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p0"}\n{"prompt": "p1"}\n{"prompt": "other"}\n')
    c = config_lib.base_config()
    c.data.path = str(data)
    c.data.prompts_path = str(prompts) if from_file else ""
    c.data.validation_prompts, c.data.test_prompts = 1, 2
    found, held_out = prepare._from_file(SimpleNamespace(config=c))
    assert not {r.prompt for r in found} & {p["prompt"] for p in held_out}
    assert [p["split"] for p in held_out] == ["test", "test", "validation"]
    assert len(found) == (14 if from_file else 12)


@pytest.mark.parametrize("chats_are", ["held out", "trained on"])
def test_no_record_trains_on_a_held_out_prompt_in_its_other_form(tmp_path, chats_are):
    """With data.as_chat a text and a chat of one user's turn are one prompt."""

    def prompt(i, is_chat):
        return [{"role": "user", "content": f"p{i}"}] if is_chat else f"p{i}"

    held, trained = chats_are == "held out", chats_are == "trained on"
    rows = [{"prompt": prompt(i, trained), "chosen": "a", "rejected": "b"} for i in range(9)]
    rows.append({"prompt": prompt(8, held), "chosen": "a", "rejected": "b"})
    records.write_jsonl(tmp_path / "records.jsonl", rows)
    asked = [{"prompt": prompt(i, held)} for i in range(3)] + [{"prompt": prompt(0, trained)}]
    records.write_jsonl(tmp_path / "prompts.jsonl", asked)
    c = config_lib.base_config()
    c.data.path, c.data.as_chat = str(tmp_path / "records.jsonl"), True
    c.data.prompts_path = str(tmp_path / "prompts.jsonl")
    found, held_out = prepare._from_file(SimpleNamespace(config=c))
    trained_on = sorted(prepare._chat(r.prompt)[0]["content"] for r in found)
    assert trained_on == [f"p{i}" for i in range(3, 9)]
    assert sorted(p["prompt"][0]["content"] for p in held_out) == ["p0", "p1", "p2"]


def test_chats_and_plain_texts_do_not_mix():
    chat = [{"role": "user", "content": "So?"}]
    found = [
        records.PreferenceRecord("one", "Plain?", "a", "b"),
        records.PreferenceRecord("two", chat, "a", "b"),
    ]
    with pytest.raises(InputError, match=r"chats \(record two\) and some are plain texts \(one\)"):
        prepare._check_one_kind(found, [])
    with pytest.raises(InputError, match=r"chats \(record p\) and some are plain texts \(one\)"):
        prepare._check_one_kind(found[:1], [{"id": "p", "prompt": chat}])
    prepare._check_one_kind(found[:1], [{"id": "p", "prompt": "Plain?"}])
