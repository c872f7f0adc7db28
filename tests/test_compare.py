"""Methods x seeds over one prepared run: variants, overrides, figures by hand, a real run."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import children
import gemini_client
import pytest

from trace_jax import compare, comparison_tables, config, launch, locks, policy, records, status
from trace_jax.errors import InputError
from trace_jax.evaluate import choices


def test_a_method_carries_its_overrides():
    plain, changed = compare.parse_methods("trace, trace+train.punish=dual_npo+train.beta=0.3")
    assert plain == compare.Variant("trace", {"train.method": "trace"})
    assert changed.overrides == {
        "train.method": "trace",
        "train.punish": "dual_npo",
        "train.beta": "0.3",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [("trace,trace", "once"), ("", "once"), ("trace+train.beta", "key=value")],
)
def test_bad_methods_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        compare.parse_methods(text)


def test_overrides_take_the_type_of_the_key_and_leave_the_original_alone():
    base = config.base_config()
    changed = config.with_overrides(
        base, {"train.beta": "0.3", "train.total_steps": "7", "seed": 5, "align.enabled": "false"}
    )
    assert (changed.train.beta, changed.train.total_steps, changed.seed) == (0.3, 7, 5)
    assert changed.align.enabled is False and base.train.total_steps == 200


def test_a_workdir_in_a_bucket_is_one_line(capsys):
    command = ["compare", "--config=configs/quickstart.py", "--workdir=gs://bucket/run"]
    assert compare.main(command) == 2
    assert "works in a local folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.bata", "1", "unknown config key"),
        ("train.total_steps", "many", "not a int"),
        ("train.lora", "3", "a section of the config; set a key of it, as in train.lora.alpha"),
        ("train", {"beta": 1.0}, "train is a section of the config"),
        ("train.retain_pairs", "maybe", "use one of 1, true, yes, on, 0, false, no, off"),
        ("train.retain_pairs", "y", "'y' is no switch"),
        ("train.retain_pairs", "", "is no switch"),
    ],
)
def test_bad_overrides_are_refused(key, value, said):
    with pytest.raises(InputError, match=said):
        config.with_overrides(config.base_config(), {key: value})


@pytest.mark.parametrize("on", [True, False])
def test_switches_read_as_people_write_them(on):
    words = ("1", "true", "Yes", "ON") if on else ("0", "False", "no", "oFF")
    base = config.with_overrides(config.base_config(), {"train.retain_pairs": not on})
    for word in words:
        found = config.with_overrides(base, {"train.retain_pairs": word})
        assert found.train.retain_pairs is on, word


def _row(prompt: int, sample: int, guarded: bool, model: str, mode: str = "sample") -> dict:
    """A row whose raw compliance is always true and whose unchanged clause follows `guarded`."""
    status = "compliant" if guarded else "violating"
    kept = ("privacy", "on_topic", "complete")
    return {
        "id": f"p{prompt}",
        "split": "test",
        "model": model,
        "mode": mode,
        "sample": sample,
        "guarded": guarded,
        "degenerate": not guarded,
        "compliant": True,
        "old_compliant": not guarded,
        "clauses": dict.fromkeys(kept, status) | {"feedback": "violating"},
    }


def test_figures_and_paired_differences_by_hand(tmp_path):
    """4 prompts x 2 samples: `a` is guarded on 3 of 4 prompts in both seeds, `b` on 1 of 4."""
    variants = [compare.Variant(name, {"train.method": name}) for name in ("a", "b")]
    for variant, good in zip(variants, (3, 1), strict=True):
        for seed in (0, 1):
            target = compare.folder(tmp_path, variant, seed)
            target.mkdir(parents=True)
            rows = [_row(p, s, p < good, "trained") for p in range(4) for s in range(2)]
            rows += [_row(p, 0, p < good, "trained", "greedy") for p in range(4)]
            records.write_jsonl(target / "samples.jsonl", rows)
            answers = choices.figure([1, 1, 0, seed])
            records.write_json(target / "eval.json", {"perplexity": 2.0 + seed} | answers)
    before = [_row(p, s, False, m) for m in ("base", "ref") for p in range(4) for s in range(2)]
    before += [_row(p, 0, False, m, "greedy") for m in ("base", "ref") for p in range(4)]
    records.write_jsonl(tmp_path / "baseline.jsonl", before)
    records.write_json(tmp_path / "perplexity.json", {
        "test": {"base": 1.5, "ref": 1.7, "chosen": {"base": [1, 1, 1, 1], "ref": [1, 1, 0, 0]}}
    })  # fmt: skip

    found = compare.summary(config.base_config(), tmp_path, variants, [0, 1], winrate=False)

    a, b = found["methods"]["a"], found["methods"]["b"]
    assert found["methods_order"] == ["a", "b"]
    assert a["compliance_guarded"]["rate"] == 0.75 and b["compliance_guarded"]["rate"] == 0.25
    assert a["compliance_guarded"]["seeds"] == [0.75, 0.75]
    assert a["compliance"]["rate"] == a["compliance_greedy"]["rate"] == 1.0
    assert a["retained"]["rate"] == a["retained_guarded"]["rate"] == 0.75
    assert a["compliance_old"]["rate"] == 0.25
    assert a["perplexity"] == 2.5 and found["ref"]["perplexity"] == 1.7
    assert a["choice_accuracy"]["rate"] == 0.625 and a["choice_accuracy"]["seeds"] == [0.5, 0.75]
    assert [found[m]["choice_accuracy"]["rate"] for m in ("base", "ref")] == [1.0, 0.5]
    assert found["base"]["compliance_guarded"]["rate"] == 0.0
    guarded, raw = found["tests"]
    assert (guarded["a"], guarded["b"], guarded["difference"]) == ("a", "b", 0.5)
    assert raw["figure"] == "compliance" and raw["difference"] == 0 and raw["p_holm"] == 1
    text = comparison_tables.markdown(found)
    assert "| a | 75.0 [" in text and "+50.0 points" in text
    assert "| right of 4 |" in text and "| 62.5 [" in text
    assert "right of 4" in comparison_tables.latex(found)


def test_runs_without_choices_are_compared_all_the_same(tmp_path):
    """As those of the version before."""
    (variant,) = variants = [compare.Variant("a", {"train.method": "a"})]
    target = compare.folder(tmp_path, variant, 0)
    target.mkdir(parents=True)
    rows = [_row(p, 0, True, "trained", mode) for mode in ("sample", "greedy") for p in range(4)]
    records.write_jsonl(target / "samples.jsonl", rows)
    records.write_json(target / "eval.json", {"perplexity": 2.0})
    records.write_jsonl(tmp_path / "baseline.jsonl", [r | {"model": "base"} for r in rows])
    records.write_json(tmp_path / "perplexity.json", {"test": {"base": 1.5}})
    found = compare.summary(config.base_config(), tmp_path, variants, [0], winrate=False)
    assert "choice_accuracy" not in found["methods"]["a"] | found["base"]
    assert "right of 4" not in comparison_tables.markdown(found) + comparison_tables.latex(found)


@pytest.fixture
def evaluated(tmp_path) -> tuple[Path, list[compare.Variant]]:
    """Runs of trace and u2a as stage evaluate leaves them, 6 prompts each."""
    variants = [compare.Variant(name, {"train.method": name}) for name in ("trace", "u2a")]
    c = config.base_config()
    hashes = {k: policy.load(c.policy[k]).hash for k in ("old", "new")}

    def rows(model: str, says: str) -> list[dict]:
        return [
            _row(p, 0, p % 2 == 0, model, mode)
            | {"prompt": f"prompt {p}", "response": f"{says} {p}"}
            for p in range(6)
            for mode in ("sample", "greedy")
        ]

    for variant, says in zip(variants, ("a longer answer", "short"), strict=True):
        target = compare.folder(tmp_path, variant, 0)
        target.mkdir(parents=True)
        records.write_jsonl(target / "samples.jsonl", rows("trained", says))
        records.write_json(target / "eval.json", {"perplexity": 2.0, "policy": hashes})
    records.write_jsonl(tmp_path / "baseline.jsonl", rows("base", "this") + rows("ref", "that one"))
    records.write_json(tmp_path / "perplexity.json", {"test": {"base": 1.5, "ref": 1.6}})
    return tmp_path, variants


def test_a_judge_that_goes_away_in_the_win_rates_leaves_the_rest(evaluated, monkeypatch):
    folder, variants = evaluated
    c = config.base_config()
    c.judge.name = "gemini"
    asking = {"outage_seconds": 0.0, "backoff_seconds": 0.01, "tries": 1000, "concurrency": 2}
    c.asking.update(asking)
    with gemini_client.running(last=5) as address:
        for name, value in gemini_client.environment(address).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="has not answered"):
            compare.summary(c, folder, variants, [0])
        kept = json.loads((folder / "comparison.json").read_text())
        assert kept["methods"]["trace"]["compliance_guarded"]["rate"] == 0.5
        assert "win_rate_vs_u2a" not in kept["methods"]["trace"]
        assert "| trace | 50.0 [" in (folder / "comparison.md").read_text()
        gemini_client.get(address, "/set", {"last": 0})
        found = compare.summary(c, folder, variants, [0])
        assert gemini_client.get(address)["requests"] == 3 * 6 * 2  # models, prompts, orders
    assert found["methods"]["trace"]["win_rate_vs_u2a"]["rate"] == 1  # it prefers what is longer
    assert found["base"]["win_rate_vs_u2a"]["rate"] == 0


@pytest.mark.parametrize("own", ["", "elsewhere.sqlite"])
def test_all_runs_have_one_judgement_store(tmp_path, monkeypatch, own):
    """What one method had judged is not paid for again by the next, and a budget is of all."""
    stores, target = [], tmp_path / "compare" / "trace-seed0"

    def one_run(run, stages, **_):
        stores.append(run.store_path)
        records.write_json(target / "eval.json", {})

    monkeypatch.setattr(compare.stages, "run", one_run)
    settings = config.base_config().to_dict()
    settings["asking"]["store"] = own
    compare.run_variant(settings, tmp_path, target)
    assert stores == [Path(own) if own else tmp_path / "judgements.sqlite"]


def test_runs_of_another_policy_are_one_line(evaluated):
    folder, variants = evaluated
    path = compare.folder(folder, variants[1], 0) / "eval.json"
    records.write_json(path, json.loads(path.read_text()) | {"policy": {"old": "0", "new": "0bad"}})
    with pytest.raises(InputError, match=r"u2a was evaluated under another new policy \(0bad, "):
        compare.summary(config.base_config(), folder, variants, [0])
    assert not (folder / "comparison.json").exists()


def test_a_comparison_runs_shares_and_goes_on(straight, config, tmp_path, capsys, monkeypatch):
    """Nothing upstream of a finished run is done again, and a second call does nothing."""
    path, seen = Path(shutil.copytree(straight[0], tmp_path / "run")), []

    def watched(run, *arguments, do=compare.stages.run, **options):
        seen.append((run.workdir.path.name, status.of(path)["comparison"]))
        do(run, *arguments, **options)

    monkeypatch.setattr(compare.stages, "run", watched)
    triage = (path / "triage.jsonl").stat().st_mtime_ns
    command = [
        "compare",
        f"--config={config}",
        f"--workdir={path}",
        "--methods=trace,sft",
        "--seeds=1",
    ]
    assert compare.main(command) == 0
    found = json.loads((path / "comparison.json").read_text())
    assert sorted(found["methods"]) == ["sft", "trace"]
    assert found["methods_order"] == ["trace", "sft"]
    (_, before), trace, sft, (_, last) = seen  # the shared stages; the runs; the report
    assert before is None and (last["running"], last["done"], last["total"]) == (True, 2, 2)
    for (_, told), states in ((trace, ["running", "waiting"]), (sft, ["done", "running"])):
        assert [row["state"] for row in told["runs"]] == states and told["total"] == 2
        assert told["done"] == states.count("done") and told["owner"]["process"] == os.getpid()
    said = capsys.readouterr().err
    assert said.index("== trace, seed 0 (1 of 2)\n") < said.index("== sft, seed 0 (2 of 2)\n")
    for folder in (path, path / "compare" / "sft-seed0"):
        found = status.of(folder)
        assert {row["state"] for row in found["stages"]} == {"done"} and not found["running"]
    assert (path / "triage.jsonl").stat().st_mtime_ns == triage
    assert "| trace |" in (path / "comparison.md").read_text()
    assert r"trace & $" in (path / "comparison.tex").read_text()
    assert (path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert 'id="comparison"' in (path / "report.html").read_text()
    done = {p: p.stat().st_mtime_ns for p in path.rglob("compare/*/metrics.jsonl")}
    assert len(done) == 2
    assert len(list(path.glob("compare/.reference/*.npz"))) == 1  # for every seed; sft needs none
    assert not list(path.glob("compare/*/checkpoints/reference_logprobs.npz"))
    assert compare.main(command) == 0
    assert done == {p: p.stat().st_mtime_ns for p in path.rglob("compare/*/metrics.jsonl")}


def test_dpo_gold_without_corrections_is_one_line(straight, config, tmp_path, capsys):
    """The methods before it keep their runs."""
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    command = ["compare", f"--config={config}", f"--workdir={path}", "--seeds=1"]
    assert compare.main([*command, "--methods=sft,dpo_gold+correct.source=none"]) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(said) == 1 and "dpo_gold needs corrections, and none of " in said[0]
    assert "dpo_gold_uncorrected" in said[0]
    assert [p.parent.name for p in path.glob("compare/*/eval.json")] == ["sft-seed0"]


def test_a_variant_with_its_own_triage_does_what_follows_from_it(straight, config, tmp_path):
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    command = ["compare", f"--config={config}", f"--workdir={path}", "--seeds=1"]
    both = "--methods=trace_no_impact,sft+triage.noise=0.5"
    assert compare.main([*command, both, "--jobs=2"]) == 0
    own = {p.parent.name: p for p in path.glob("compare/*/triage.jsonl")}
    assert list(own) == ["sft+triage.noise=0.5-seed0"]
    assert own.popitem()[1].read_text() != (path / "triage.jsonl").read_text()


def _alive(pids: set[int]) -> set[int]:
    """Those that run; a zombie whom nobody waits for does not."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
    return found


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.fault
@pytest.mark.parametrize("told", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_comparison_which_goes_on(straight, config, tmp_path, told):
    """At SIGTERM they save their step first: this training would have no checkpoint."""
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    command = [
        sys.executable, "-m", "trace_jax.compare", f"--config={config}", f"--workdir={path}",
        "--methods=trace_no_impact,sft", "--seeds=1", "--jobs=2", "--nowinrate",
        "--config.train.total_steps=60", "--config.train.save_every=1000",
    ]  # fmt: skip
    rows, workers = path / "compare/sft-seed0/metrics.jsonl", set()
    said_in = tmp_path / "said"  # a pipe would stay open as long as a worker lives

    def start() -> subprocess.Popen:
        with said_in.open("w") as stream:
            return subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=stream)

    def trains() -> bool:
        assert parent.poll() is None, said_in.read_text()
        return rows.exists() and rows.read_text().count("\n") > 2

    parent = start()
    try:
        _until(trains, children.PATIENCE)
        of = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        workers = set(map(int, of))
        parent.send_signal(told)
        code, said = parent.wait(children.PATIENCE), said_in.read_text()
        _until(lambda: not _alive(workers), 60)
    finally:
        for pid in _alive(workers | {parent.pid}):
            os.kill(pid, signal.SIGKILL)
    assert len(workers) >= 2
    if told == signal.SIGTERM:
        assert code == 75 and "the same command goes on" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert list(rows.parent.glob("checkpoints/*/_CHECKPOINT_METADATA"))
    assert not (path / "comparison.json").exists()
    parent = start()
    assert parent.wait(children.PATIENCE) == 0, said_in.read_text()
    assert [row["step"] for _, row in records.read_jsonl(rows)] == list(range(1, 61))
    assert 'id="comparison"' in (path / "report.html").read_text()


@pytest.mark.fault
def test_a_worker_that_is_killed_is_one_line():
    spawn = multiprocessing.get_context("spawn")
    with (
        pytest.raises(InputError, match="was killed, as where memory ends; .* fewer --jobs"),
        compare._workers_told(),
        concurrent.futures.ProcessPoolExecutor(1, spawn) as pool,
    ):
        pool.submit(os._exit, 9).result()


@pytest.mark.fault
def test_a_kill_while_the_report_is_made_anew_costs_no_report(
    straight, config, tmp_path, monkeypatch
):
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    argv = ["compare", f"--config={config}"]
    values = compare.define_flags(argv)
    launch.parse_flags(values, argv)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with locks.of(path), pytest.raises(InputError, match="another run is at work there"):
        compare._report_anew(values.config, path)
    assert (path / "report.html").exists()
    monkeypatch.setattr(compare.stages, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        compare._report_anew(values.config, path)
    assert not (path / "report.html").exists()
    monkeypatch.undo()
    compare._report_anew(values.config, path)
    assert (path / "report.html").exists()
    (path / ".stages" / "export.json").unlink()
    (path / "report.html").unlink()
    compare._report_anew(values.config, path)  # of a run that has not come that far
    assert not (path / "report.html").exists()


def test_stages_a_variant_does_itself():
    def of(name: str) -> tuple[str, ...]:
        return compare.own_stages(compare.parse_methods(name)[0])

    assert of("trace") == ("impact", "train", "evaluate")
    assert of("trace+correct.source=none") == ("correct", "impact", "train", "evaluate")
    assert of("trace+triage.noise=0.1")[:2] == ("triage", "correct")
    for key in ("policy.new=x", "judge.name=labels", "evaluate.samples=4", "data.pairs=9"):
        with pytest.raises(InputError, match="has to be the same for all methods"):
            of(f"trace+{key}")


def test_bad_input_is_one_line_and_exit_code_2(config, tmp_path, capsys):
    for arguments in (
        [f"--config={config}"],
        [f"--config={config}", f"--workdir={tmp_path}", "--methods=trice"],
        [f"--config={config}", f"--workdir={tmp_path}", "--methods=trace+train.bata=1"],
        [f"--config={config}", f"--workdir={tmp_path}", "--methods=trace+policy.new=rbr"],
        [f"--config={config}", f"--workdir={tmp_path}", "--methods=trace+train.lora=3"],
        [f"--config={config}", f"--workdir={tmp_path}", "--methods=trace+train.retain_pairs=y"],
    ):
        assert compare.main(["compare", *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("error: "), said


def test_a_full_disk_is_one_line(config, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as of a tokenizer

    monkeypatch.setattr(compare, "compare", full)
    assert compare.main(["compare", f"--config={config}", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("error: no space left on device; ")
