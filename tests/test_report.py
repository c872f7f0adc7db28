import dataclasses
import html.parser
import json
import re
import zlib

import numpy as np
import pytest

from trace_jax import (
    charts,
    coverage,
    metrics,
    policy,
    reasons,
    records,
    report,
    triage,
)
from trace_jax.judges import store
from trace_jax.report import comparison

ATTACK = (
    "<script>alert(1)</script> {{ 7 * 7 }} {% raw %} <img src=x onerror=alert(2)> \" ' & \ud800"
)
OLD = {"joy": "Ends well.", "place": "Names a place.", "speech": "Has direct speech."}
NEW = {"joy": "Ends well.", "speech": "No direct speech.", "animal": "An animal needs <joy>."}


def _rate(value, n=400, parts=True):
    found = {"rate": value, "low": max(0, value - 0.03), "high": min(1, value + 0.03), "n": n}
    if parts:
        found["by_action"] = {a: _rate(value, 120, False) for a in ("INVERT", "PUNISH", "RETAIN")}
        found["by_clause"] = {c: _rate(min(1, value + 0.1), n, False) for c in NEW}
    return found


def _figures(guarded, perplexity):
    return {
        "compliance_guarded": _rate(guarded),
        "compliance": _rate(guarded + 0.05),
        "compliance_greedy": _rate(guarded + 0.08),
        "perplexity": perplexity,
        "choice_accuracy": _rate(0.61),
    }


def _clauses(**statuses):
    return {name: {"status": s, "probability": None} for name, s in statuses.items()}


def _triage_rows(rng):
    for i, action in enumerate(rng.choice(records.ACTIONS, size=600, p=(0.2, 0.55, 0.23, 0.02))):
        chosen = "compliant" if action == "RETAIN" else "violating"
        rejected = "compliant" if action == "INVERT" else "violating"
        yield {
            "id": f"{i:04x}",
            "prompt": "Once",
            "chosen": "a",
            "rejected": "b",
            "action": str(action),
            "chosen_verdict": {
                "status": chosen,
                "probability": None,
                "clauses": _clauses(joy="compliant", speech=chosen, animal="compliant"),
            },
            "rejected_verdict": {
                "status": rejected,
                "probability": None,
                "clauses": _clauses(joy=rejected, speech=rejected, animal="abstain"),
            },
        }


def _impact_rows(rng):
    for i in range(450):
        action = "INVERT" if i % 3 == 0 else "PUNISH"
        score = float(rng.normal(0.4 if action == "INVERT" else -0.2, 1.0))
        yield {
            "id": f"{i:04x}",
            "action": action,
            "score": score,
            "weight": max(score, 0.0),
            "gold": False,
        }
    yield {"id": "gold", "action": "PUNISH", "score": 1e9, "weight": 1.0, "gold": True}


def _sample_rows():
    texts = {
        "base": 'Once there was a dog. "Hello," said the dog.',
        "ref": 'The dog was in the park. "Come and play!" ' * 12,
        "trained": "The little dog was sad, and a girl hugged it until it was happy. " * 3,
    }
    for i in range(14):
        for model, response in texts.items():
            for mode, sample in (("sample", 0), ("sample", 1), ("greedy", 0)):
                yield {
                    "id": f"p{i}",
                    "prompt": ATTACK if i == 0 else f"Once upon a time there was a dog number {i}",
                    "split": "test" if i < 13 else "validation",
                    "model": model,
                    "mode": mode,
                    "sample": sample,
                    "response": ATTACK
                    if i == 0
                    else response + ("" if mode == "sample" else " GREEDY"),
                    "compliant": model == "trained",
                    "guarded": model == "trained" and i != 3,
                    "clauses": {
                        "joy": "compliant",
                        "speech": "compliant" if model == "trained" else "violating",
                    },
                }


def _write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def workdir(tmp_path):
    """A finished run, as the stages leave it."""
    for name, clauses in (("tales_old", OLD), ("tales_new", NEW)):
        listed = [{"id": i, "requirement": r} for i, r in clauses.items()]
        # JSON is YAML.
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"name": name, "clauses": listed}))
    rng = np.random.default_rng(0)
    config = {
        "seed": 0,
        "policy": {k: str(tmp_path / f"tales_{k}.yaml") for k in ("old", "new")},
        "train": {"beta": 0.1},
    }
    versions = {"command": "python -m trace_jax.launch --config=configs/tales.py", "jax": "0.10.2"}
    impact_summary = {
        "n_scored": 450,
        "gold_size": 300,
        "normalisation": "mean_one",
        "per_action": {
            action: {
                "n": n,
                "clamped_share": share,
                "mean_score": 0.1,
                "mean_weight": 1.2,
                "stability": s,
            }
            for action, n, share, s in (("INVERT", 150, 0.34, 0.71), ("PUNISH", 300, 0.58, None))
        },
        "effective_sample_size": 187.3,
        "stability": {"spearman": 0.68, "n_examples": 431, "gold_sizes": [150, 150]},
        "warnings": ["85 % of the PUNISH scores are clamped <b>"],
    }
    evaluation = {
        **_figures(0.73, 5.2),
        "guard": {"min_words": 3, "min_mean_logprob": -2.1, "max_repetition": 0.08},
        "ref": _figures(0.12, 4.7),
        "base": _figures(0.05, 3.9),
    }
    for name, value in (
        ("config", config),
        ("versions", versions),
        ("impact_summary", impact_summary),
        ("eval", evaluation),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    _write_jsonl(tmp_path / "triage.jsonl", _triage_rows(rng))
    triaged = triage.read(tmp_path / "triage.jsonl")
    covered = coverage.of(policy.load(tmp_path / "tales_new.yaml"), triaged, least=5)
    records.write_json(tmp_path / "coverage.json", [dataclasses.asdict(c) for c in covered])
    _write_jsonl(tmp_path / "impact.jsonl", _impact_rows(rng))
    _write_jsonl(tmp_path / "samples.jsonl", _sample_rows())
    with metrics.MetricsWriter(tmp_path / "metrics.jsonl", resume_after=0) as writer:
        for step in range(1, 501):
            preference = 0.7 * np.exp(-step / 150) + 0.03 * rng.normal()
            writer.write(
                step,
                {
                    "loss/total": preference + 0.05,
                    "loss/preference": preference,
                    "loss/npo": 0.0,
                    "loss/nll": 0.0,
                    "train/logratio_0": step / 100,
                    "train/logratio_1": -step / 60,
                    "train/kl": 0.002 * step,
                    "train/grad_norm": float("nan") if step == 7 else 1.0 + rng.random(),
                },
            )
    (tmp_path / ".stages").mkdir()
    for stage, seconds, summary in (
        ("train", 184.2, {"steps": 500}),
        ("triage", 2.3, {"actions": {"INVERT": 120, "PUNISH": 330}}),
        ("prepare", 64.0, {"records": 600}),
    ):
        mark = {"stage": stage, "seconds": seconds, "inputs": {}, "outputs": {}, "summary": summary}
        (tmp_path / ".stages" / f"{stage}.json").write_text(json.dumps(mark))
    started = {"stage": "evaluate", "inputs": {}}
    (tmp_path / ".stages" / "evaluate.started.json").write_text(json.dumps(started))
    return tmp_path


def _render(workdir):
    report.write(workdir / "report.html", report.collect(workdir))
    return (workdir / "report.html").read_text(encoding="utf-8")


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sections, self.open, self.said = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "dd"):
            self.said.append(" ")

    def handle_data(self, data):
        if "style" not in self.open:
            self.said.append(data)


def _parse(page):
    found = _Tags()
    found.feed(page)
    assert found.open == []
    return found


def _text(page):
    """What the page says, its white space made single."""
    return " ".join("".join(_parse(page).said).split())


def test_untrusted_text_stays_text(workdir):
    page = _render(workdir)
    tags = _parse(page).tags
    assert "script" not in tags and "img" not in tags and "joy" not in tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }} {% raw %} &lt;img src=x" in page
    assert "49" not in re.findall(r"> *(\d+) *<", page)
    assert "An animal needs &lt;joy&gt;." in page
    assert "are clamped &lt;b&gt;" in page


def test_the_page_loads_nothing(workdir):
    page = _render(workdir)
    assert not re.search(
        r"(?:src|href|action)=[\"']?(?!x )|url\(|@import|https?:", page.replace("src=x ", "")
    )
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_sections_and_their_figures(workdir):
    page = _render(workdir)
    assert _parse(page).sections == [
        "policy", "triage", "impact", "training", "evaluation", "samples", "cost", "reproduce",
    ]  # fmt: skip
    for expected in (
        "tales_old → tales_new",
        "73.0 %",
        "70.0–76.0",
        "5.20",
        "Effective sample size 187",
        "Stability 0.68, from two gold batches of 150 and 150 pairs over 431 conflicts.",
        "34.0 %",
        "4 min 10 s",
        "actions.PUNISH 330",
        "python -m trace_jax.launch --config=configs/tales.py",
        "-2.10 nats a token",
    ):
        assert expected in page, expected
    assert page.count("<svg") == 2 + 4
    assert "GREEDY" not in page


def test_policy_changes(workdir):
    clauses = report.collect(workdir)["policy"]["clauses"]
    assert [(c["id"], c["change"]) for c in clauses] == [
        ("animal", "added"), ("speech", "changed"), ("place", "removed"), ("joy", "unchanged"),
    ]  # fmt: skip
    assert (clauses[1]["before"], clauses[1]["after"]) == (OLD["speech"], NEW["speech"])


def test_triage_counts(workdir):
    found = report.collect(workdir)["triage"]
    counts = {row["action"]: row["n"] for row in found["actions"]}
    assert sum(counts.values()) == found["n"] == 600
    assert found["n_conflicts"] == counts["INVERT"] + counts["PUNISH"]
    clauses = {row["id"]: row for row in found["clauses"]}
    assert clauses["speech"]["conflicts"] == found["n_conflicts"]
    assert clauses["joy"]["conflicts"] == counts["PUNISH"]
    assert clauses["joy"]["rejected"] == 600 - counts["INVERT"] and clauses["joy"]["chosen"] == 0
    assert clauses["animal"]["rare"] and not clauses["joy"]["rare"]
    assert clauses["animal"]["undecided"] == 600


def test_what_people_and_studies_did_is_told(workdir):
    rows = [row for _, row in records.read_jsonl(workdir / "triage.jsonl")]
    rows[0]["override"], rows[1]["noise"] = {"action": "PUNISH", "by": "Ada"}, "swap"
    rows[2] |= {"id": "torn", "prompt": "<b>Torn</b>"}
    rows[2]["chosen_verdict"] |= {"status": "violating", "probability": 0.4}
    _write_jsonl(workdir / "triage.jsonl", rows)
    found = report.collect(workdir)["triage"]
    assert (found["overridden"], found["corrupted"]) == (1, 1)
    assert [row["id"] for row in found["doubtful"]] == ["torn"]
    report.write(workdir / "r.html", report.collect(workdir))
    page = (workdir / "r.html").read_text()
    assert "1 pairs were decided by people" in page and "1 verdicts were corrupted" in page
    assert "&lt;b&gt;Torn&lt;/b&gt;" in page


def test_examples_of_every_clause_and_action(workdir):
    found = report.collect(workdir)["triage"]["examples"]
    shown = {
        c["clause"]: {a["action"]: (a["n"], len(a["rows"])) for a in c["actions"]} for c in found
    }
    rows = [row for _, row in records.read_jsonl(workdir / "triage.jsonl")]
    n = {action: sum(r["action"] == action for r in rows) for action in records.ACTIONS}
    assert shown == {
        "joy": {a: (n[a], 2) for a in ("PUNISH", "RETAIN")},
        "speech": {a: (n[a], 2) for a in ("INVERT", "PUNISH", "RETAIN")},
        "animal": {"UNRESOLVED": (n["UNRESOLVED"], 2)},
    }


def test_examples_differ_and_carry_the_judges_words(workdir):
    path = workdir / "tales_new.yaml"
    rules = policy.load(path)
    rows = [row for _, row in records.read_jsonl(workdir / "triage.jsonl")]
    for i, row in enumerate(rows):
        row["chosen"] = f"text {i}"
    (joy, speech, _) = reasons.examples(rows, rules)
    punished = [next(a for a in c["actions"] if a["action"] == "PUNISH") for c in (joy, speech)]
    texts = [row["chosen"] for a in punished for row in a["rows"]]
    assert len(set(texts)) == 4 and all(row["words"] == {} for a in punished for row in a["rows"])
    first = next(row for row in rows if row["chosen"] == texts[0])
    assert punished[0]["rows"][0]["chosen_violates"] == ["speech"]
    kept = store.Store(workdir / "judgements.sqlite")
    reader = store.Reader("gemini", "m", "{}", "t")
    verdicts = {rules.clauses[0]: records.ClauseVerdict("violating", 0.1)}
    call = store.Call("ok", rationale="It ends <i>badly</i>.")
    kept.add(reader, first["prompt"], first["chosen"], call, verdicts)
    kept.close()
    _write_jsonl(workdir / "triage.jsonl", rows)
    page = _render(workdir)
    assert "It ends &lt;i&gt;badly&lt;/i&gt;." in page and page.count("The judge</small>") == 1
    assert "PUNISH, 1 of " in page and "chosen, violates speech" in page


def test_a_comparison_is_shown_with_its_caveat(workdir):
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6}
    figures = dict.fromkeys(("compliance_guarded", "compliance", "compliance_greedy"), rate)
    row = figures | {"perplexity": 2.5}
    won = rate | {"ties": 0.93, "n": 100, "guarded": rate | {"rate": None}}
    gap = {"method": "trace", "lower": "u2a", "upper": "dpo_gold", **rate, "raw": rate}
    said = {"claim": "trace <b>", "figure": "compliance", "difference": 0.2, "low": 0.1,
            "high": 0.3, "answer": "yes", "a": "trace", "b": "u2a", "p_holm": 0.0004}  # fmt: skip
    found = {
        "ref": row, "methods": {"trace": row | {"win_rate_vs_u2a": won}, "u2a": row},
        "tests": [], "statements": [said], "gap_closed": gap | {"caveat": "u2a learnt <nothing>"},
        "seeds": [0, 1], "split": "test",
    }  # fmt: skip
    records.write_json(workdir / "comparison.json", found)
    page = _render(workdir)
    assert "comparison" in _parse(page).sections
    section = page.split('id="comparison"')[1].split("</section>")[0]
    assert "Caveat: u2a learnt &lt;nothing&gt;." in section and "trace &lt;b&gt;" in section
    assert '<td class="n">93</td>' in section and "A - B speaks for it" in section
    assert "trace - u2a raw +20.0 points [+10.0, +30.0] < 0.001 yes" in _text(page)
    assert "Share of the gap from u2a to dpo_gold that trace closes: 50.0 [40.0, 60.0]" in section


def _test_of(b, figure, difference):
    return {"a": "trace", "b": b, "figure": figure, "difference": difference, "low": 0.01,
            "high": 0.25, "p_holm": 0.012, "cohens_h": 0.31}  # fmt: skip


def _compared(names):
    """comparison.json of these methods, the first against the others."""
    figures = ("compliance_guarded", "compliance")
    row = {figure: {"rate": 0.5, "low": 0.4, "high": 0.6} for figure in figures}
    tests = [_test_of(b, figure, 0.125) for figure in figures for b in names[1:]]
    return {
        "base": row | {"perplexity": 3.77}, "ref": row | {"perplexity": 4.51},
        "methods": {name: row | {"perplexity": 2.5} for name in names},
        "tests": tests, "statements": [], "seeds": [0], "split": "test",
    }  # fmt: skip


METHODS = ["trace", "u2a", "dpo_gold", "naive_oracle_dpo", "trace_no_kl"]


def test_methods_stand_as_they_were_asked_for(workdir):
    records.write_json(workdir / "comparison.json", _compared(METHODS))
    assert list(records.read_json(workdir / "comparison.json")["methods"]) == sorted(METHODS)
    for table in report.collect(workdir)["comparison"]["tables"]:
        assert [row["name"] for row in table["rows"]] == ["base", "M_ref", *METHODS]
    named = _compared(METHODS) | {"methods_order": METHODS[::-1]}
    assert comparison.order(named) == METHODS[::-1]
    alone = _compared(["sft", "trace"]) | {"tests": []}
    assert comparison.order(alone) == ["sft", "trace"]


def test_the_paired_tests_are_shown(workdir):
    found = _compared(METHODS)
    found["tests"] = [t for t in found["tests"] if (t["b"], t["figure"]) != ("u2a", "compliance")]
    records.write_json(workdir / "comparison.json", found)
    text = _text(_render(workdir))
    assert "trace - u2a +12.5 [+1.0, +25.0] 0.012 +0.31 – – –" in text
    assert "trace - dpo_gold" + 2 * " +12.5 [+1.0, +25.0] 0.012 +0.31" in text


def test_evaluation_compares_the_three_models(workdir):
    found = report.collect(workdir)["evaluation"]
    assert [row["model"] for row in found["rows"]] == ["base", "ref", "trained"]
    assert [row["perplexity"] for row in found["rows"]] == [3.9, 4.7, 5.2]
    assert [row["accuracy"]["rate"] for row in found["rows"]] == [0.61] * 3
    rates = [rate["rate"] for rate in found["rows"][2]["rates"]]
    assert rates == pytest.approx([0.73, 0.78, 0.81])
    by_action, by_clause = found["tables"]
    assert by_action["rows"][0]["rates"][2]["rate"] == 0.73  # guarded
    assert {row["rates"][0] for row in by_action["rows"]} == {None}  # its samples are the actions
    assert by_clause["rows"][0]["rates"][0] is not None
    assert "the first pair of the base model's samples" in by_action["note"]
    assert by_clause["rows"][0]["rates"][2]["rate"] == pytest.approx(0.88)  # raw


def test_a_run_without_m_ref_has_two_rows(workdir):
    figures = records.read_json(workdir / "eval.json")
    del figures["ref"]
    records.write_json(workdir / "eval.json", figures)
    assert [r["model"] for r in report.collect(workdir)["evaluation"]["rows"]] == [
        "base",
        "trained",
    ]
    assert "M_ref (old" not in _render(workdir).split('id="samples"')[0]


def test_samples_are_the_first_ones(workdir):
    found = report.collect(workdir)["samples"]
    assert len(found) == report.SAMPLES_SHOWN
    assert [cell["model"] for cell in found[1]["cells"]] == ["base", "ref", "trained"]
    assert found[1]["cells"][0]["violated"] == ["speech"]
    assert _render(workdir).count("degenerate</span>") == 1  # compliant, and the guard refused it


def test_only_the_first_split_is_shown(workdir):
    rows = [row for row in _sample_rows() if row["id"] in ("p2", "p13")]
    _write_jsonl(workdir / "samples.jsonl", rows)
    assert len(report.collect(workdir)["samples"]) == 1


def test_gold_records_are_not_drawn(workdir):
    with_gold = report.collect(workdir)["impact"]["charts"][0]["svg"]
    *rows, gold = (row for _, row in records.read_jsonl(workdir / "impact.jsonl"))
    assert gold["gold"]
    _write_jsonl(workdir / "impact.jsonl", rows)
    assert report.collect(workdir)["impact"]["charts"][0]["svg"] == with_gold


def _weigh(workdir, strength, **settings):
    """impact.jsonl and config.json as impact.strength makes them."""
    rows = [row for _, row in records.read_jsonl(workdir / "impact.jsonl")]
    for row in rows:
        row["weight"] = 1 - strength + strength * max(row["score"], 0.0)
    _write_jsonl(workdir / "impact.jsonl", rows)
    _configure(workdir, impact={"strength": strength} | settings)
    return rows


def _configure(workdir, **sections):
    config = records.read_json(workdir / "config.json")
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    (workdir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("strength", "said"),
    [(0.25, "counts as 0, which leaves the weight 0.75: impact.strength=0.25 is what scores"),
     (1.0, "counts as 0, which leaves the weight 0: these conflicts do not train.")],
)  # fmt: skip
def test_a_negative_score_leaves_what_the_strength_leaves(workdir, strength, said):
    rows = _weigh(workdir, strength)
    drawn = report.collect(workdir)["impact"]["charts"][1]["svg"]
    heights = [float(h) for h in re.findall('height="([0-9.]+)"', drawn)]
    most = max(heights)  # the lowest weight, of the negative scores: it is drawn, too
    assert most == 186.0 and sum(heights) / most < 3
    text = _text(_render(workdir))
    assert said in text and "clamped to weight 0" not in text
    assert sum(row["score"] <= 0 for row in rows if row["action"] == "PUNISH") > 100


def test_weights_that_say_nothing_of_negative_scores_are_not_explained_by_them(workdir):
    _weigh(workdir, 1.0, weights="shuffled")
    assert "dealt to the conflicts of an action at random" in _text(_render(workdir))
    rows = [row for _, row in records.read_jsonl(workdir / "impact.jsonl")]
    _write_jsonl(workdir / "impact.jsonl", [row | {"weight": row["score"]} for row in rows])
    _configure(workdir, impact={"weights": "impact", "clamp": False})
    names = [name for name, _ in report.collect(workdir)["impact"]["terms"]]
    assert names == ["mean_one", "Effective sample size", "Stability"]


def test_uniform_weights_have_no_scores(workdir):
    summary = {"normalisation": "uniform", "n_scored": 0}
    (workdir / "impact_summary.json").write_text(json.dumps(summary))
    row = {"id": "a", "action": "PUNISH", "score": None, "weight": 1.0, "gold": False}
    _write_jsonl(workdir / "impact.jsonl", [row])
    assert "Every conflict has weight 1; nothing was scored." in _render(workdir)


def _trained(workdir, perplexities, summary, stopped=None, **settings):
    """What stage train leaves of a run with an evaluation every 15 steps."""
    rows = [
        {"step": 15 * i, "kind": "evaluation", "compliance_guarded": 0.1 * i, "compliance": 0.9,
         "kept": 0.5, "perplexity": p, "perplexity_ref": 2.0, "prompts": 100}
        for i, p in enumerate(perplexities, 1)
    ]  # fmt: skip
    _write_jsonl(workdir / "pauses.jsonl", [{"step": 5, "kind": "weights"}, *rows])
    mark = {"stage": "train", "seconds": 1.0, "inputs": {}, "outputs": {}, "summary": summary}
    (workdir / ".stages" / "train.json").write_text(json.dumps(mark))
    if stopped:
        (workdir / "checkpoints").mkdir()
        records.write_json(workdir / "checkpoints" / "stopped.json", stopped)
    _configure(workdir, train=settings)
    return report.collect(workdir)["training"]


LIMITED = {"keep_best": True, "perplexity_limit": 1.1, "total_steps": 500}


@pytest.mark.parametrize(
    ("perplexities", "summary", "said"),
    [
        ((1.9, 2.1, 2.3, 2.4), {"kept_step": 30, "stopped_at": 60},
         "The model is that of step 30: the best guarded compliance among evaluations with a "
         "perplexity of at most 2.20 (1.1 times M_ref's); training ended at step 60 of 500."),
        ((2.4, 2.3), {"kept_step": 30},
         "The model is that of step 30: the least perplexity, since none of the evaluations is "
         "within the limit of 2.20 (1.1 times M_ref's); training ended at step 500."),
    ],
)  # fmt: skip
def test_which_step_the_model_is_of(workdir, perplexities, summary, said):
    found = _trained(workdir, perplexities, summary, **LIMITED)
    assert found["kept"] == said and said in _text(_render(workdir))
    compliance, perplexity, *others = found["charts"]
    assert compliance["names"] == [
        "guarded compliance", "raw compliance", "unchanged clauses kept, guarded",
    ]  # fmt: skip
    assert perplexity["names"] == ["model in training", "M_ref"]
    assert "limit 2.20" in perplexity["svg"] and 'line class="limit"' in perplexity["svg"]
    last = 15 * len(perplexities)
    x = 54 + 368 * (30 - 15) / (last - 15)
    for chart in (compliance, perplexity):
        assert f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}"' in chart["svg"]
        assert "model: step 30" in chart["svg"]
    assert all("model: step 30" in chart["svg"] for chart in others)
    steps = "500" if "stopped_at" not in summary else "60 of 500"
    assert dict(report.collect(workdir)["run"])["steps"] == f"{steps} (the model is of step 30)"


def test_a_run_that_was_stopped_says_what_it_went_back_to(workdir):
    stopped = {"step": 15, "stopped_at": 30}
    found = _trained(workdir, (2.0, 2.0), {"stopped_at": 30}, stopped, stop_below=0.8)
    assert found["kept"].startswith("The model is that of step 15, the evaluation before fewer")
    assert found["kept"].endswith("training ended at step 30.")


def test_a_run_that_ends_with_its_last_step_has_no_mark(workdir):
    found = _trained(workdir, (2.0, 2.0), {}, keep_best=False, perplexity_limit=1.1)
    assert found["kept"] is None
    assert not any('class="mark"' in c["svg"] or "limit" in c["svg"] for c in found["charts"])


def test_what_was_run_stands_first(workdir):
    assert dict(report.collect(workdir)["run"])["seed"] == "0"
    _configure(
        workdir, model={"path": "models/<b>"}, data={"source": "file", "path": "pairs.jsonl"},
        judge={"name": "gemini", "gemini": {"model": "gemini-2.5-flash"}},
        train={"method": "trace", "punish": "dual_npo", "adapters": "lora"},
    )  # fmt: skip
    page = _render(workdir)
    head = _text(page).split("What changed in the policy")[0]
    for said in ("method trace_dual_npo (LoRA)", "base model models/<b>", "seed 0", "steps 500",
                 "data pairs.jsonl, 600 pairs", "judge gemini, gemini-2.5-flash",
                 "tales_old.yaml → "):  # fmt: skip
        assert said in head, said
    assert "models/&lt;b&gt;" in page


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"method": "trace", "punish": "correction"},
         "were corrected: they train as (y_c, chosen), y_c being a text that complies. The other"),
        ({"method": "trace", "punish": "dual_npo"}, "suppresses both responses of all of them"),
        ({"method": "dpo_gold", "punish": "correction"}, " are left out."),
        ({"method": "npo", "punish": "correction"}, "method npo makes no use of that."),
    ],
)  # fmt: skip
def test_corrections_are_counted_and_shown(workdir, train, said):
    rows = [row for _, row in records.read_jsonl(workdir / "triage.jsonl")]
    for i, row in enumerate(rows):
        row["chosen"] = f"text {i} \ud800"
    _write_jsonl(workdir / "triage.jsonl", rows)
    punished = [row["id"] for row in rows if row["action"] == "PUNISH"]
    found = [{"id": i, "response": f"y_c <b> of {i}", "tries": 8} for i in punished]
    found[1]["response"] = None
    _write_jsonl(workdir / "corrections.jsonl", found)
    _configure(workdir, train=train)
    page = _render(workdir)
    n = len(punished)
    assert f"Of {n} PUNISH pairs {n - 1} were corrected" in page and said in page
    assert f"y_c &lt;b&gt; of {punished[0]}" in page
    assert "y_c: none that complies was found in 8 tries" in page
    shown = report.collect(workdir)["triage"]["examples"]
    of = {a["action"]: a["rows"] for c in shown for a in c["actions"] if c["clause"] == "joy"}
    assert [row["correction"]["response"] for row in of["PUNISH"]] == [found[0]["response"], None]
    assert not any("correction" in row for row in of["RETAIN"])


def test_the_judges_calls_are_counted_as_status_counts_them(workdir):
    assert report.collect(workdir)["judge"] is None  # of a judge that is not named
    _configure(workdir, judge={"name": "rules"})
    assert "0 calls, 0 input and 0 output tokens, 0.0000 US dollars" in _text(_render(workdir))
    kept = store.Store(workdir / "judgements.sqlite")
    reader = store.Reader("gemini", "m", "{}", "t")
    for i in range(2):
        call = store.Call("ok", input_tokens=1200, output_tokens=30, price=0.25)
        kept.add(reader, "prompt", f"response {i}", call, {})
    kept.close()
    assert "2 calls, 2,400 input and 60 output tokens, 0.5000 US dollars" in _text(_render(workdir))


def test_stages_come_in_order_and_only_finished(workdir):
    assert [s["stage"] for s in report.collect(workdir)["stages"]] == ["prepare", "triage", "train"]


@pytest.mark.parametrize(
    ("artefact", "section"),
    [
        ("config.json", "policy"),
        ("triage.jsonl", "triage"),
        ("impact_summary.json", "impact"),
        ("metrics.jsonl", "training"),
        ("eval.json", "evaluation"),
        ("samples.jsonl", "samples"),
    ],
)
def test_a_missing_artefact_leaves_its_section_out(workdir, artefact, section):
    (workdir / artefact).unlink()
    sections = _parse(_render(workdir)).sections
    assert section not in sections and len(sections) == 7


def test_an_empty_workdir_still_gives_a_page(tmp_path):
    assert _parse(_render(tmp_path)).sections == ["reproduce"]


def test_chat_prompts_are_shown_by_role(workdir):
    messages = [{"role": "user", "content": "Tell me <b>"}, {"role": "assistant", "content": "Yes"}]
    context = report.collect(workdir)
    context["samples"][0]["prompt"] = messages
    report.write(workdir / "report.html", context)
    assert "user: Tell me &lt;b&gt;\nassistant: Yes" in (workdir / "report.html").read_text()


def test_line_chart_maps_values_to_pixels():
    svg = charts.line_chart({"a": [(0, 0.0), (5, None), (10, 1.0)]}, "loss <by> step")
    # x 0..10 spans 54..422 and y 0..1 spans 222..36; the point without a value is left out.
    assert '<polyline class="line s0" points="54.0,222.0 422.0,36.0"/>' in svg
    assert "loss &lt;by&gt; step" in svg


def test_line_chart_averages_long_series_and_survives_odd_ones():
    svg = charts.line_chart({"a": [(i, float(i % 2)) for i in range(5000)]}, "x")
    assert len(re.search('points="(.*?)"', svg).group(1).split()) == 200
    assert "polyline" in charts.line_chart({"a": [(1, 3.0)]}, "one point")
    assert charts.line_chart({"a": [(1, None)]}, "none") == ""


def test_histogram_counts_every_value():
    svg = charts.histogram({"a": [-1.0] * 6 + [1.0] * 2, "b": [1.0] * 4}, "scores", n_bins=2)
    heights = [float(h) for h in re.findall('height="([0-9.]+)"', svg)]
    assert heights == [186.0, 62.0, 124.0]  # 6, 2 and 4 of at most 6 over 186 pixels
    assert 'class="zero"' in svg
    assert "rect" in charts.histogram({"a": [2.0, 2.0]}, "constant")
    assert charts.histogram({"a": []}, "none") == ""


def test_histogram_bars_of_a_bin_stand_side_by_side():
    svg = charts.histogram({"a": [0.0, 1.0] * 9, "b": [0.0, 1.0] * 5}, "scores")
    found = re.findall('x="([0-9.]+)" y="[0-9.]+" width="([0-9.]+)"', svg)
    bars = sorted((float(x), float(width)) for x, width in found)
    assert len(bars) == 4
    assert all(x + w <= after for (x, w), (after, _) in zip(bars, bars[1:], strict=False))


def test_axes_have_titles_and_the_first_and_last_step_a_label():
    points = [(15, 1.0), (30, 2.0), (4000, 3.0)]
    svg = charts.line_chart({"a": points}, "x", titles=("step <b>", "loss"))
    assert ">step &lt;b&gt;</text>" in svg and ">loss</text>" in svg
    assert (
        ">15</text>" in svg and ">4,000</text>" in svg and ">0</text>" not in svg.split("4,000")[0]
    )
    labels = [float(x) for x in re.findall(r'x="([0-9.]+)" y="239.0" text-anchor="middle"', svg)]
    assert labels[0] == 54 and labels[-1] == 422
    assert min(np.diff(labels)) >= 36
    svg = charts.histogram({"a": [-1.0, 30.0]}, "x", titles=("score", "conflicts"))
    assert ">score</text>" in svg and ">conflicts</text>" in svg
    assert re.search('y="239.0" text-anchor="middle">0</text>', svg)  # nearer than the first end


def test_a_mark_and_a_limit_are_drawn_where_they_are():
    svg = charts.line_chart(
        {"a": [(0, 0.0), (10, 1.0)]}, "x", mark=(5, "step <5>"), limit=(2.0, "limit <2>")
    )
    assert '<line class="mark" x1="238.0" x2="238.0"' in svg and "step &lt;5&gt;" in svg
    assert '<line class="limit" x1="54" x2="422" y1="36.0" y2="36.0"/>' in svg  # y goes to 2
    assert 'points="54.0,222.0 422.0,129.0"' in svg and "limit &lt;2&gt;" in svg
    assert 'class="mark"' not in charts.line_chart({"a": [(0, 0.0)]}, "x", mark=(5, "step 5"))


def test_ticks_are_round_and_inside():
    axis = charts._Axis(-0.37, 1.13, 0, 100)
    assert axis.ticks() == pytest.approx([0.0, 0.5, 1.0])


# [contrast, element] of every text against the background behind it, the lowest first.
CONTRASTS = """() => {
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = numbers(colour).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, style = getComputedStyle(e);
    const both = [light(e.closest("svg") ? style.fill : style.color), light(behind(e))];
    const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    found.push([ratio, e.outerHTML.slice(0, 80)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(workdir, browser, scheme):
    _trained(workdir, (1.9, 2.1, 2.3), {"kept_step": 30, "stopped_at": 45}, **LIMITED)
    records.write_json(workdir / "comparison.json", _compared(METHODS))
    _render(workdir)
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    tab.goto((workdir / "report.html").as_uri())
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 500 and contrasts[0][0] >= 4.5, contrasts[0]
    context.close()


def test_wide_tables_keep_their_first_column(workdir, browser):
    names = [*METHODS, "trace+train.punish=dual_npo"]
    records.write_json(workdir / "comparison.json", _compared(names))
    _render(workdir)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.goto((workdir / "report.html").as_uri())
    cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth)"
    assert tab.evaluate(f"{cut}.length") == 0
    tab.set_viewport_size({"width": 390, "height": 900})
    assert tab.evaluate(f"{cut}.length") > 0
    tab.evaluate(f"{cut}.forEach(e => e.scrollLeft = 60)")
    left = (
        "Math.min(...[...document.querySelectorAll('tbody th')].map(e => "
        "e.getBoundingClientRect().left - e.closest('.wide').getBoundingClientRect().left))"
    )
    assert tab.evaluate(left) == 0
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_complaint(straight, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if "http" in request.url else None)
    tab.goto((straight[0] / "report.html").as_uri())
    assert tab.locator("h2").count() >= 6 and said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def _text_of(pdf: bytes) -> list[str]:
    """What a PDF of Chromium says, without spaces: once by the characters of each of its fonts."""
    streams = []
    for body in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            streams.append(zlib.decompress(body))
        except zlib.error:
            continue
    glyphs = [
        h.decode()
        for stream in streams if b"begincmap" not in stream
        for operand in re.findall(rb"(<[^<]*?>)\s*Tj|\[(.*?)\]\s*TJ", stream, re.DOTALL)
        for h in re.findall(rb"<([0-9A-Fa-f]+)>", operand[0] or operand[1])
    ]  # fmt: skip
    return [_decoded(glyphs, s.decode("latin-1")) for s in streams if b"begincmap" in s]


def _decoded(glyphs: list[str], cmap: str) -> str:
    characters = {}
    for block in re.findall(r"beginbfchar(.*?)endbfchar", cmap, re.DOTALL):
        for code, text in re.findall(r"<(\w+)>\s*<(\w+)>", block):
            characters[code.upper()] = bytes.fromhex(text).decode("utf-16-be", "replace")
    for block in re.findall(r"beginbfrange(.*?)endbfrange", cmap, re.DOTALL):
        for low, high, text in re.findall(r"<(\w+)>\s*<(\w+)>\s*<(\w+)>", block):
            for code in range(int(low, 16), int(high, 16) + 1):
                characters[f"{code:04X}"] = chr(int(text, 16) + code - int(low, 16))
    codes = (h[i : i + 4].upper() for h in glyphs for i in range(0, len(h), 4))
    return "".join(characters.get(code, "?") for code in codes).replace(" ", "")


def test_on_paper_nothing_is_closed_cut_or_dark(workdir, browser, tmp_path):
    """The end of a text that scrolls on the screen, in an example that is closed there."""
    rows = [row for _, row in records.read_jsonl(workdir / "triage.jsonl")]
    rows[0]["chosen"] = "line\n" * 60 + "OKAPI END"
    _write_jsonl(workdir / "triage.jsonl", rows)
    samples = list(_sample_rows())
    samples[0]["response"] = "word\n" * 60 + "QUAGGA END"
    _write_jsonl(workdir / "samples.jsonl", samples)
    _render(workdir)
    context = browser.new_context(color_scheme="dark")
    tab = context.new_page()
    tab.goto((workdir / "report.html").as_uri())
    assert tab.locator("details[open]").count() == 0
    assert not tab.get_by_text("OKAPI END").is_visible()
    said = _text_of(tab.pdf(format="A4"))
    for needle in ("OKAPIEND", "QUAGGAEND", "tales_old", '"beta":0.1'):
        assert any(needle in text for text in said), needle
    tab.emulate_media(media="print")
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(29, 29, 27)"
    context.close()


def test_on_paper_a_table_over_pages_has_its_head_on_each(workdir, browser):
    records.write_json(workdir / "comparison.json", _compared([f"m{i}" for i in range(60)]))
    page = _render(workdir)
    assert page.count("<table") == page.count("<thead>") == page.count("<tbody>") > 6
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((workdir / "report.html").as_uri())
    said = _text_of(tab.pdf(format="A4"))
    assert max(text.count("Cohen'sh") for text in said) >= 2 * 2  # both figures, two pages or more
    context.close()
