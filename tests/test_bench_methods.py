"""What the scripts of bench/ that train choose before they run anything."""

import runpy

import numpy as np
import pytest

from bench import frontier, pages, realign, replication, studies
from trace_jax import compare, records
from trace_jax import config as config_lib
from trace_jax.errors import InputError

POINT = {"learning_rate": 1e-4, "beta": 0.1, "steps": 20, "perplexity": 1.0}
CONFIG = config_lib.base_config()
CONFIG.train.learning_rate, CONFIG.train.beta, CONFIG.train.total_steps = 3e-4, 0.4, 50


def _tuned(*names: str, **changes) -> dict:
    of = {"best": POINT, "points": [POINT]} | changes
    return {"methods": dict.fromkeys(names, of)}


def test_points_of_studies_differ_in_what_they_say():
    """A frontier with one point a method; equal points are one run, others are not."""
    tuned = _tuned(*{at for _, at in realign.METHODS.values()})
    found = {
        p["study"] + str(i): studies.variant(p, tuned, CONFIG)
        for i, p in enumerate(studies.points())
    }
    by_name = {v.name: v for v in found.values()}
    assert by_name["trace+triage.error=0.1+triage.soft=True"].overrides["triage.soft"] is True
    assert by_name["trace"].overrides["train.learning_rate"] == 3e-4
    changes = (
        "train.data_share=0.25",
        "train.data_share=0.5",
        "triage.error=0.1",
        "triage.error=0.2",
    )
    assert {v.name for v in found.values() if v.name.startswith("naive")} == {
        "naive_oracle_dpo", *(f"naive_oracle_dpo+{change}" for change in changes),
    }  # fmt: skip
    assert len(by_name) == 34 and all(compare.own_stages(v) for v in by_name.values())


def test_a_table_of_studies_says_every_point_and_the_gap():
    rate = {"rate": 0.5, "low": 0.25, "high": 0.75}
    point = {"study": "gold", "line": "trace", "x": 0.1, "perplexity": 1.5}
    point |= {"compliance_guarded": rate, "compliance": rate | {"rate": 0.6}}
    found = {"points": [point], "split": "test", "seeds": [0, 1], "commit": "abc"}
    told = studies.table(found | {"gap_closed": {"0.1": rate}})
    assert "| gold | trace | 10% | 50.0 [25.0, 75.0] | 60.0 [25.0, 75.0] | 1.50 |" in told
    assert "errs on 10%: 50 % [25, 75]." in told and "seeds 0, 1; commit abc." in told


def test_answers_of_studies_are_of_the_points_that_they_name():
    """Every point complies on another number of ten prompts; gold comes in without soft, too."""
    at = {(p["study"], p["line"], p["x"]): i % 10 for i, p in enumerate(studies.points())}
    at |= {("gold", "u2a", x): 0 for x in studies.ERROR} | {("gold", "dpo_gold, exact", 0.0): 8}
    at |= {("gold", "trace", 0.1): 4, ("gold", "trace_no_impact", 0.1): 1}
    rows = {key: [np.arange(10)[:, None] < n] * 2 for key, n in at.items()}
    found = studies.answers(rows)
    assert found.keys() == {"gap_closed", *studies.DIFFERENCES}
    assert found["gap_closed"]["0.1"]["rate"] == pytest.approx(4 / 8)
    assert found["weights_minus_none"]["0.1"]["difference"] == pytest.approx(0.3)
    for x in studies.ERROR:
        for key, (study, a, b, _) in studies.DIFFERENCES.items():
            expected = (at[study, a, x] - at[study, b, x]) / 10
            assert found[key][str(x)]["difference"] == pytest.approx(expected)
    alone = studies.answers({key: of for key, of in rows.items() if key[0] != "gold"})
    assert alone.keys() == {"soft_minus_hard"} and not studies.answers({})


def test_wrong_among_listed_is_of_the_records_on_the_list(tmp_path, monkeypatch):
    for name, actions in (("exact", "IPRR"), ("run", "IIPR")):
        (tmp_path / name).mkdir()
        rows = [{"id": key, "action": a} for key, a in zip("abcd", actions, strict=True)]
        records.write_jsonl(tmp_path / name / "triage.jsonl", rows)
    listed = [{"id": "b"}, {"id": "c"}, {"id": "a"}]
    monkeypatch.setattr(studies.shortlist, "of_workdir", lambda path, n: listed[:n])
    found = studies.wrong_among_listed(tmp_path / "exact", [tmp_path / "run"] * 2)
    assert found == {"all": 0.5, "listed": pytest.approx(2 / 3)}


def test_weights_of_verdicts_are_by_what_the_exact_judge_says(tmp_path):
    actions = {"a": "INVERT", "b": "PUNISH", "c": "INVERT", "d": "RETAIN"}
    for name, changed in (("exact", {}), ("one", {"b": "INVERT"}), ("two", {"c": "PUNISH"})):
        (tmp_path / name).mkdir()
        rows = [{"id": key, "action": action} for key, action in (actions | changed).items()]
        records.write_jsonl(tmp_path / name / "triage.jsonl", rows)
        weights = {"a": 1.0, "b": 0.0, "c": 2.0}
        rows = [{"id": k, "score": w - 0.5, "weight": w} for k, w in weights.items()]
        records.write_jsonl(tmp_path / name / "impact.jsonl", [*rows, {"id": "e", "score": None}])
    found = studies.weight_of_verdicts(tmp_path / "exact", [tmp_path / "one", tmp_path / "two"])
    assert found["wrong"] == {"records": 1.0, "weight": 1.0, "clamped": 0.5}
    assert found["right"] == {"records": 2.0, "weight": 1.0, "clamped": 0.25}


def test_a_method_has_points_of_its_own_or_the_common_ones():
    grid = ["1e-4:0.1:150", "npo@1e-5:0.1:50", "2e-4:0.1:150", "npo@3e-6:0.5:50"]
    rates = {m: [v.overrides["train.learning_rate"] for v in frontier.points(grid, m)]
             for m in ("npo", "trace")}  # fmt: skip
    assert rates == {"npo": ["1e-5", "3e-6"], "trace": ["1e-4", "2e-4"]}
    with pytest.raises(InputError, match="reads learning_rate:beta:steps"):
        frontier.points(["npo@1e-5"], "npo")
    with pytest.raises(InputError, match="as many points each: trace 2, npo 1"):
        frontier.frontier(None, None, ["trace", "npo"], grid[:3], 1)


def test_methods_of_the_table_take_their_operating_points():
    tuned = _tuned("trace_paper")
    shuffled, paper = realign.variants(["trace_shuffled", "trace_paper"], tuned, CONFIG)
    assert shuffled.overrides["impact.weights"] == "shuffled"
    assert shuffled.overrides["train.beta"] == 0.4 and shuffled.overrides["train.total_steps"] == 50
    assert paper.overrides["train.beta"] == 0.3  # the paper's, whatever was tuned
    assert paper.overrides["train.learning_rate"] == 1e-4
    with pytest.raises(InputError, match="no points of npo"):
        realign.variants(["npo"], tuned, CONFIG)
    with pytest.raises(InputError, match="an older bench.frontier"):
        realign.variants(["trace"], {"points": []}, CONFIG)
    far = [POINT | {"perplexity": 3.0}, POINT | {"perplexity": 2.0, "beta": 0.7}]
    (npo,) = realign.variants(["npo"], _tuned("npo", best=None, points=far), CONFIG)
    assert npo.overrides["train.beta"] == 0.7


def test_every_method_of_the_table_is_one_that_compares():
    for text, tuned_as in realign.METHODS.values():
        (variant,) = compare.parse_methods(text)
        assert compare.own_stages(variant) and tuned_as in realign.METHODS


def test_the_best_point_is_the_best_evaluation_within_the_limit():
    at = {"learning_rate": 1e-4, "beta": 0.1, "steps": 9}
    rows = [
        at | {"compliance_guarded": 0.9, "perplexity": 3.0, "way": []},
        at | {"compliance_guarded": 0.5, "perplexity": 1.5, "beta": 0.7, "compliance": 0.9,
              "way": [{"step": 1, "compliance_guarded": 0.6, "perplexity": 1.4},
                      {"step": 5, "compliance_guarded": 0.8, "perplexity": 2.1}]},
    ]  # fmt: skip
    found = frontier.method(rows, 2.0)["best"]
    chosen = {"step": 1, "compliance_guarded": 0.6, "perplexity": 1.4}
    assert found == at | {"beta": 0.7} | chosen
    assert frontier.method(rows, 2.5)["best"]["step"] == 5
    assert frontier.method(rows, 3.0)["best"]["step"] == 9
    assert frontier.method(rows[:1], 2.0)["best"] is None


def test_every_run_of_the_table_keeps_its_best_evaluation():
    both = realign.variants(["trace", "trace_no_triage"], _tuned("npo"), CONFIG)
    assert [v.overrides["train.evaluate_every"] for v in both] == [5, 2]  # ten in every run
    assert all(v.overrides["train.keep_best"] for v in both)


def test_equal_betas_are_those_of_the_other_method():
    both = realign.variants(["trace@beta", "dpo_gold@beta"], _tuned("dpo_gold"), CONFIG)
    assert [v.overrides["train.beta"] for v in both] == [0.1, 0.4]
    assert [v.overrides["train.method"] for v in both] == ["trace", "dpo_gold"]


def test_the_default_of_trace_is_one_on_both_benchmarks():
    files = (runpy.run_path(f"configs/{name}.py") for name in ("quickstart", "stories"))
    quickstart, stories = (file["get_config"]() for file in files)
    assert quickstart.train.to_dict() == stories.train.to_dict()
    for config in (quickstart, stories):  # the tables have it as it is shipped
        (trace,) = realign.variants(["trace"], _tuned(), config)
        assert config_lib.with_overrides(config, trace.overrides).train.to_dict() == (
            config.train.to_dict()
        )


def test_what_stands_beside_the_paper(tmp_path):
    """synth has everything, stories nothing; a plan is there, its judge too."""
    rate = {"rate": 0.5, "low": 0.25, "high": 0.75}
    row = {"compliance_guarded": rate, "perplexity": 1.5, "choice_accuracy": rate}
    gap = rate | {"rate": 1.2, "caveat": "above all"}
    records.write_json(tmp_path / "synth.json", {"methods": {"trace": row}, "gap_closed": gap})
    point = {"study": "size", "line": "trace", "x": 0.25, "compliance_guarded": rate}
    studied = {"points": [point], "gap_closed": {"0.1": rate | {"rate": None}}}
    records.write_json(tmp_path / "synth_studies.json", studied)
    plan = {"hours": 0.5, "device": {"kind": "h100", "count": 2}}
    records.write_json(tmp_path / "plans.json", {"plans": {"llama8b:lora on h100:1": plan}})
    made = replication.blocks(tmp_path, {"h100": 4.0})
    missing = "not measured | not measured | not measured"
    shown = "50.0 [25.0, 75.0]"
    full = f"| all of it | 70.7 / 70.2 / 27.3 | {missing} | {shown} | 1.50 | {shown} |"
    assert full in made["ablation"] and f"24.6 | {missing} | {missing} |" in made["ablation"]
    assert f"| trace, 5k pairs; here 25 % | 55.9 | not measured | {shown} |" in made["size"]
    assert "| u2a, 20% | 54.7 | not measured | not measured |" in made["noise"]
    assert "| one judge for all | 81.8 | not measured | 120.0 [25.0, 75.0] |" in made["gap"]
    assert "errs on 10% | - | not measured | no gap |" in made["gap"]
    assert made["gap"].endswith("synth: above all.")
    assert "| 2 x h100 | 0.50 | 1.0 | 4.00 | 4 |" in made["cost"]
    assert made["cost"].endswith("The judge: not measured.")
    judge = {"model": "m", "policy": "p", "clauses": 3, "pairs": 2000, "calls": 10, "tokens": 2e5,
             "price": 1.5}  # fmt: skip
    assert "100 calls, 2.0 million tokens, 15 dollars (8 by" in replication.cost({}, {}, judge)


@pytest.mark.parametrize("price", ["v5e", "v5e=cheap"])
def test_a_price_that_is_none_is_one_line(price, capsys):
    assert pages.main([f"--price={price}"]) == 2
    assert "give KIND=DOLLARS" in capsys.readouterr().err
