"""Judged rows of held-out prompts: what judges left undecided is counted and told."""

import numpy as np

from trace_jax import records, report
from trace_jax.evaluate import compliance, guard
from trace_jax.stages import responses

PROMPTS = [{"id": str(i), "prompt": "Say a.", "split": "test"} for i in range(3)]


class Judge:
    """Says what the response says; a response that names no status is an error."""

    def judge(self, items, progress=None):
        status = [
            i.response if i.response in ("compliant", "violating") else "error" for i in items
        ]
        return [records.Verdict(s, None, {"c": records.ClauseVerdict(s, None)}) for s in status]


class Abstains:
    def judge(self, items, progress=None):
        return [records.Verdict("abstain", None, {}) for _ in items]


def rows(*answers):
    made = [
        row
        for mode in ("sample", "greedy")
        for row in compliance.judged_rows(
            PROMPTS,
            [[a] for a in answers],
            model="trained",
            mode=mode,
            judge=Judge(),
            old_judge=Abstains(),
            mean_logprobs=np.zeros(len(answers)),
        )
    ]
    return compliance.with_guard(made, guard.Guard(0, -1.0, 1.0))


def test_a_judge_that_fails_is_counted_beside_the_rate():
    found = compliance.summary(rows("compliant", "violating", "lost"), {})
    assert found["compliance"]["rate"] == 1 / 3  # undecided counts as not compliant
    assert found["undecided"] == {"judge_errors": 2, "abstentions": 6}


def test_a_judge_that_fails_is_told_and_asked_again_with_redo(capsys):
    assert responses.told_undecided(rows("lost", "lost", "violating"))["judge_errors"] == 4
    assert "4 verdicts are missing" in capsys.readouterr().err
    answered = rows("violating", "violating", "compliant")
    assert responses.told_undecided(answered)["judge_errors"] == 0
    assert not capsys.readouterr().err


def test_the_report_says_that_verdicts_are_missing(tmp_path):
    figures = compliance.summary(rows("compliant", "lost", "lost"), {})
    records.write_json(tmp_path / "eval.json", figures)
    report.write(tmp_path / "report.html", report.collect(tmp_path))
    assert (
        "4 verdicts are missing because the judge failed" in (tmp_path / "report.html").read_text()
    )
