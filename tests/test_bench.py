"""What the scripts of bench/ compute before they run anything."""

import re

import numpy as np
import pytest

from bench import (
    growth,
    head,
    headlines,
    judge,
    packing,
    results,
    sampling,
    scaling,
    startup,
)
from trace_jax import records


def test_packing_counts_what_each_way_computes():
    alone = np.array([[10, 30], [20, 20]] * 200)
    rows = {row["how"]: row for row in packing.measure(alone, np.full(400, 36))}
    assert rows["padded"]["real_token_share"] == pytest.approx(40 / 60, rel=1e-3)
    for how, computed in (("packed", 40), ("shared", 36), ("ours", 36)):
        positions = rows[how]["computed_per_token"] * 40  # of a pair, in rows that have some room
        assert computed <= positions < 1.2 * computed
        assert rows[how]["real_token_share"] == pytest.approx(computed / positions)


LOG = """[prepare]
WARNING:jax._src.dispatch:Finished XLA compilation of jit(train_step) in 3.1 sec
[baseline]
WARNING:jax._src.dispatch:Finished XLA compilation of jit(prefill) in 3.1 sec
WARNING:jax._src.dispatch:Finished XLA compilation of jit(advance) in 3.1 sec
WARNING:jax._src.dispatch:Finished XLA compilation of jit(<lambda>) in 0.1 sec
[impact]
WARNING:jax._src.dispatch:Finished XLA compilation of jit(response_derivatives) in 1 sec
WARNING:jax._src.dispatch:Finished XLA compilation of jit(response_derivatives) in 1 sec
[train]
WARNING:jax._src.compiler:Persistent compilation cache hit for 'jit__lambda_' with key 'x'
WARNING:jax._src.dispatch:Finished XLA compilation of jit(<lambda>) in 0.1 sec
WARNING:jax._src.dispatch:Finished XLA compilation of jit(train_step) in 3.1 sec
"""


def test_programs_are_counted_by_the_stage_that_compiled_them():
    found = packing.by_stage(LOG)
    assert found["baseline"] == {"prefill": 1, "advance": 1, "<lambda>": 1}
    rows = [{"stage": stage, "compiled": dict(of)} for stage, of in found.items()]
    assert packing.counts(rows) == {
        "train_programs": 1, "impact_programs": 2, "sampling_programs": 2, "programs_in_all": 7,
    }  # fmt: skip


def test_one_train_step_and_one_impact_pass_were_compiled():
    found = records.read_json(results.KEPT / "packing.json")
    rows = [row for row in found["rows"] if row["what"] == "programs"]
    counts = packing.counts(rows)
    assert counts == {name: found["headline"][name] for name in counts}
    assert counts["train_programs"] == counts["impact_programs"] == 1
    assert all(row["why"].keys() == row["compiled"].keys() for row in rows)


@pytest.mark.soak
def test_a_small_run_compiles_one_train_step_and_one_impact_pass():
    counts = packing.counts(packing.programs())
    assert counts["train_programs"] == counts["impact_programs"] == 1


def test_growth_is_of_the_stage_that_grows_most():
    row = {"stage": "triage", "records": 100, "seconds": 1.0, "own_mebibytes": 20.0}
    small = [row, {**row, "stage": "report", "seconds": 0.01, "own_mebibytes": 0.0}]
    large = [
        {**row, "records": 1000, "seconds": 11.0, "own_mebibytes": 50.0},
        {**small[1], "records": 1000, "seconds": 1.0, "own_mebibytes": 12.0},
    ]
    assert growth.headline(small + large) == {
        "growth_of_seconds": 1.1, "growth_of_memory": 2.5,
        "bytes_per_record": 30 * 2**20 / 900,
    }  # fmt: skip


def test_the_chunked_head_and_the_whole_one_say_the_same():
    for name in head.ENDS:
        found = head.times(name, 300, 96, repeats=1)  # compares what they compute
        assert len(found["time_ratios"]) == 1 and min(found["seconds"]["whole"]) > 0


def test_headlines_of_the_head_are_of_its_largest_and_of_what_was_timed():
    row = {"where": "here", "program": "logprob_gradient", "temp_ratio": 0.2}
    rows = [row | {"vocabulary": "32k", "time_ratios": [9.0]},
            row | {"vocabulary": "128k", "time_ratios": [1.0, 4.0, 1.5]},
            row | {"vocabulary": "128k", "time_ratios": [2.0], "program": "logprob_jvp"},
            row | {"vocabulary": "256k"}, row | {"where": "v5e", "vocabulary": "32k"}]  # fmt: skip
    found, spread = head.headline(rows)
    assert found == {"temp_ratio_256k": 0.2, "time_ratio_128k": 1.5, "time_ratio_128k_jvp": 2.0}
    assert spread["time_ratio_128k"] == [1.0, 4.0, 1.5]


def test_headlines_of_the_judge_are_of_64_and_of_256_calls():
    rows = [{"what": "throughput", "concurrency": n, "shares_of_server_limit": [0.5, 0.7, n / 512]}
            for n in (64, 256)]  # fmt: skip
    rows += [{"what": "store", "pairs": n, "mebibytes": 1.0 + n / 2**20, "reads_per_second": n,
              "writes_per_second": 1} for n in (10, 2**20)]  # fmt: skip
    found, spread = judge.headline(rows)
    assert found["share_of_server_limit"] == found["share_of_server_limit_256"] == 0.5
    assert spread["share_of_server_limit"] == [0.5, 0.7, 0.125]
    assert found["triage_bytes_per_pair"] == pytest.approx(1) and "calls_saved_pku" not in found


SCRIPTS = {"growth": growth, "head": head, "judge": judge, "packing": packing,
           "sampling": sampling, "scaling": scaling, "startup": startup}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_figures_have_a_file_of_their_own(name, capsys):
    """The flags that a script itself asks for; what it says of them is what they do."""
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(["--quick", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    kept, quick = f"bench/results/{name}.json", f"build/bench/{name}.quick.json"
    assert f"default {kept}, with --quick {quick}" in told
    for argv, where in (([], kept), (["--quick"], quick), (["--quick", "--out=x"], "x")):
        assert str(results.flags(argv, name, "", "").out) == where


KEYS = {"machine", "versions", "commit", "rows", "headline", "ranges"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_kept_results_have_one_form(name):
    found = records.read_json(results.KEPT / f"{name}.json")
    assert found.keys() >= KEYS and found["rows"]
    shown = {headline for file, headline, *_ in headlines.ROWS if file == name}
    assert shown & found["headline"].keys()
    for headline, (low, high) in found["ranges"].items():
        assert low <= found["headline"][headline] <= high


def test_a_result_says_what_it_ran_on(tmp_path, capsys):
    out = tmp_path / "deep" / "x.json"
    results.write(out, rows=[{"a": 1}], headline={"ratio": 2.0, "once": 1.0},
                  spread={"ratio": [3.0, 2.0, 1.0], "left out": [1.0]}, packages=["pytest"],
                  tokens=7)  # fmt: skip
    found = records.read_json(out)
    assert found.keys() == KEYS | {"tokens"} and found["ranges"] == {"ratio": [1.0, 3.0]}
    assert found["versions"]["pytest"] == pytest.__version__ and found["versions"]["jax"]
    assert re.fullmatch(r".+, \d+ cores, \d+ GiB, \w+, \w+", found["machine"])
    assert "[1, 3]" in capsys.readouterr().out


# Of the issue that asked for them (train is bench.trl).
NAMES = """
impact: speedup_vs_torch_loop speedup_vs_vmap_grad temp_vs_vmap_grad max_relative_error
trl: speedup_vs_trl_default speedup_vs_trl_best memory_vs_trl loss_difference
packing: real_token_share_hh real_token_share_pku real_token_share_xstest shared_prefix_saving_hh
head: temp_ratio_256k time_ratio_256k
sampling: speedup_vs_transformers
judge: share_of_server_limit calls_saved_pku
startup: import_seconds help_seconds warm_over_cold
"""


def test_the_table_has_every_headline_that_was_asked_for():
    asked = {(line.partition(":")[0], name)
             for line in NAMES.split("\n") for name in line.partition(":")[2].split()}  # fmt: skip
    assert len(asked) == 20 and asked <= {row[:2] for row in headlines.ROWS}


def test_the_table_marks_what_is_missed_and_shows_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(headlines, "RESULTS", tmp_path)
    found = {"speedup_vs_transformers": 2.5, "unknown": 1.0}
    ranges = {"speedup_vs_transformers": [0.05, 3.0]}
    records.write_json(tmp_path / "sampling.json", {"headline": found, "ranges": ranges})
    records.write_json(tmp_path / "packing.json", {"headline": {"train_programs": 1}})
    (programs, speed) = headlines.table(folder="there/").splitlines()[2:]
    assert (
        "| 2.50 **missed** | 0.05 to 3 | ≥ 3 | [`bench.sampling`](there/sampling.json) |" in speed
    )
    assert "| 1 |  | ≤ 1 | [`bench.packing`](there/packing.json) |" in programs
    assert headlines.table().strip().endswith("| ≥ 3 | `bench.sampling` |")
