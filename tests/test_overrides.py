import json

import pytest

from trace_jax import overrides, records, triage
from trace_jax.errors import InputError

RECORD = records.PreferenceRecord("r", "x", "yw", "yl")
YES, NO = (records.Verdict(s, p, {}) for s, p in (("compliant", 0.9), ("violating", 0.2)))


def read(tmp_path, *rows, known=("r", "s")):
    path = tmp_path / "o.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return overrides.read(path, known)


def decided(tmp_path, *rows, soft=False):
    settings = triage.Settings(by_hand=read(tmp_path, *rows), soft=soft)
    return triage.decide(RECORD, NO, YES, settings)  # INVERT without overrides


@pytest.mark.parametrize(
    "rows, action",
    [
        ([{"id": "r", "verdict": "PUNISH"}], "PUNISH"),
        ([{"id": "r", "verdict": "UNRESOLVED"}], "UNRESOLVED"),
        ([{"id": "r", "chosen": "compliant"}], "RETAIN"),
        ([{"id": "r", "rejected": "violating"}], "PUNISH"),
        ([{"id": "r", "response": "rejected", "verdict": "violating"}], "PUNISH"),
        ([{"id": "r", "chosen": "compliant", "rejected": "violating"}], "RETAIN"),
        ([{"id": "r", "chosen": "violating"}, {"id": "r", "rejected": "violating"}], "PUNISH"),
        ([{"id": "r", "verdict": None}], "INVERT"),
        ([{"id": "r", "chosen": "compliant", "rejected": None}], "RETAIN"),
        ([{"id": "r", "chosen": "compliant", "rejected": "The text of a response."}], "RETAIN"),
        ([{"id": "r", "chosen": "Yes.", "rejected": "No.", "verdict": "PUNISH"}], "PUNISH"),
        ([{"id": "s", "verdict": "PUNISH"}], "INVERT"),
    ],
)
def test_people_have_the_last_word(tmp_path, rows, action):
    assert decided(tmp_path, *rows).action == action


def test_what_people_said_is_recorded(tmp_path):
    found = decided(tmp_path, {"id": "r", "verdict": "PUNISH", "by": "Ada", "note": "both rude"})
    assert found.to_json()["override"] == {"action": "PUNISH", "by": "Ada", "note": "both rude"}
    assert (found.chosen_verdict.status, found.rejected_verdict.status) == ("violating",) * 2
    assert records.TriagedRecord.from_json(found.to_json()) == found
    assert "override" not in decided(tmp_path).to_json()


def test_an_override_is_certain_in_soft_triage(tmp_path):
    masses = decided(tmp_path, {"id": "r", "verdict": "RETAIN"}, soft=True).masses
    assert masses == {"INVERT": 0, "PUNISH": 0, "RETAIN": 1, "UNRESOLVED": 0}


def test_what_people_left_undecided_trains_nothing_in_soft_triage(tmp_path):
    item = decided(tmp_path, {"id": "r", "verdict": "UNRESOLVED"}, soft=True)
    assert item.masses == {"INVERT": 0, "PUNISH": 0, "RETAIN": 0, "UNRESOLVED": 1}
    assert triage.trains_nothing(item)
    assert not triage.trains_nothing(decided(tmp_path, soft=True))


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "q", "verdict": "PUNISH"}], r"o.jsonl:1: there is no record 'q'"),
        ([{"verdict": "PUNISH"}], r"o.jsonl:1: there is no record None"),
        ([{"id": "r", "verdict": "violating"}], "of which response"),
        ([{"id": "r", "verdict": "bad"}], "verdict 'bad' is unknown; use INVERT"),
        ([{"id": "r"}], "says nothing"),
        (
            [{"id": "r", "verdict": None, "chosen": "Violating", "rejected": "compliant"}],
            r"o.jsonl:1: chosen is 'Violating'; use compliant or violating, or leave it out",
        ),
        ([{"id": "r", "verdict": None, "rejected": "Compliant "}], "rejected is 'Compliant '"),
        ([{"id": "r", "chosen": "violating", "rejected": "fine"}], "rejected is 'fine'; use"),
        ([{"id": "r", "chosen": "violating", "rejected": True}], "rejected is True; use"),
        (
            [{"id": "r", "verdict": "PUNISH"}, {"id": "r", "verdict": "RETAIN"}],
            "action of record 'r' is RETAIN here and PUNISH above",
        ),
        (
            [{"id": "r", "verdict": "PUNISH"}, {"id": "r", "chosen": "compliant"}],
            "both an action and verdicts",
        ),
    ],
)
def test_an_unclear_override_is_one_clear_line(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, *rows)
