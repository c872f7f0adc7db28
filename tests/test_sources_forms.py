"""Forms of preference pairs."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from trace_jax import policy, records, sources
from trace_jax.errors import InputError
from trace_jax.judges import Item, labels
from trace_jax.sources import forms, pku


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, **reading):
    return sources.read_records(write(tmp_path / "a.jsonl", *rows), sources.Reading(**reading))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def texts(record):
    return record.prompt, record.chosen, record.rejected


FORMS = [
    ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}, ("Sky?", "Blue.", "Red.")),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."},
     ("The sky is", " blue.", " green.")),
    ({"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Red.")]},
     ([user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"chosen": [user("Sky?"), assistant("Blue.")], "rejected": [user("Sky?"), assistant("Red.")]},
     ([user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": "Sky?", "chosen": [user("Sky?"), assistant("Blue.")],
      "rejected": [user("Sky?"), assistant("Red.")]},  # as HuggingFaceH4/ultrafeedback_binarized
     ([user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": "Sky?", "chosen": [user("Hi"), assistant("Yes?"), user("Sky? "), assistant("Blue")],
      "rejected": [user("Hi"), assistant("Yes?"), user("Sky? "), assistant("Red.")]},
     ([user("Hi"), assistant("Yes?"), user("Sky? ")], [assistant("Blue")], [assistant("Red.")])),
    ({"prompt": "Sky?", "chosen": [assistant("Blue.")], "rejected": [assistant("Red.")]},
     ([user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": [user("Sky?")], "chosen": [user("Sky?"), assistant("Blue.")],
      "rejected": [user("Sky?"), assistant("Red.")]},
     ([user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": [user("Hi")],  # turns that both share go on from the prompt
      "chosen": [user("Hi"), assistant("Yes?"), user("Sky?"), assistant("Blue.")],
      "rejected": [user("Hi"), assistant("Yes?"), user("Sky?"), assistant("Red.")]},
     ([user("Hi"), assistant("Yes?"), user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": [user("Hi")], "chosen": [assistant("Yes?"), user("Sky?"), assistant("Blue.")],
      "rejected": [assistant("Yes?"), user("Sky?"), assistant("Red.")]},
     ([user("Hi"), assistant("Yes?"), user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": [system("Be kind."), user("Sky?")], "chosen": [user("Sky?"), assistant("Blue.")],
      "rejected": [user("Sky?"), assistant("Red.")]},  # the end of the prompt
     ([system("Be kind."), user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": [user("Sky?")], "chosen": [system("Be kind."), user("Sky?"), assistant("Blue.")],
      "rejected": [system("Be kind."), user("Sky?"), assistant("Red.")]},  # more than the prompt
     ([system("Be kind."), user("Sky?")], [assistant("Blue.")], [assistant("Red.")])),
    ({"prompt": [user("Sky?")], "chosen": "Blue.", "rejected": [assistant("Red.")]},
     ([user("Sky?")], "Blue.", [assistant("Red.")])),
    ({"chosen": "\n\nHuman: Sky?\n\nAssistant: Blue.",
      "rejected": "\n\nHuman: Sky?\n\nAssistant: Red."},
     ([user("Sky?")], "Blue.", "Red.")),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hi!\n\nHuman: A\n\nHuman: B\n\nAssistant: Blue.\n\nO?",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hi!\n\nHuman: A\n\nHuman: B\n\nAssistant: Red."},
     ([user("Hi"), assistant("Hi!"), user("A\n\nB")], "Blue.\n\nO?", "Red.")),
]  # fmt: skip


@pytest.mark.parametrize("row, expected", FORMS)
def test_forms_are_recognised(tmp_path, row, expected):
    (record,), counts = read(tmp_path, row)
    assert texts(record) == expected
    assert counts == sources.Counts(1, 0, {})


MALFORMED = [
    ({"chosen": "a b", "rejected": "c d"}, "no common beginning; give the prompt"),
    ({"chosen": [user("a"), assistant("b")], "rejected": "a b"}, "one response is a chat"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
     "do not begin with the same messages"),
    ({"prompt": "a", "chosen": [user("a"), assistant("b")],
      "rejected": [user("x"), assistant("c")]},
     "'prompt' is no list of messages, as the responses are, and chosen and rejected do not begin"),
    ({"prompt": "z", "chosen": [user("a"), assistant("b")],
      "rejected": [user("a"), assistant("c")]},
     "'prompt' is a text that is in none of the messages before the answers; give it as messages, "
     "or the answers as texts (then data.as_chat=true"),
    ({"prompt": "a", "chosen": [assistant("b")], "rejected": "c"}, "one response is a chat"),
    ({"prompt": [user("a"), assistant("x")], "chosen": [user("a"), assistant("x")],
      "rejected": [user("a"), assistant("x"), user("b"), assistant("c")]},
     "'chosen' must be one message of the assistant behind those of the prompt that both responses "
     "share, and is nothing"),
    ({"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("c")]},
     "'chosen' must be one message of the assistant behind those of the prompt that both responses "
     "share, and is user; mend the line"),
    ({"prompt": "a", "chosen": [assistant("b")], "rejected": [user("c")]},
     "'rejected' must be one message of the assistant"),
    ({"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("c")]},
     "'chosen' must be one message of the assistant"),
    ({"prompt": [user("a")], "chosen": [assistant("b"), user("c"), assistant("d")],
      "rejected": [assistant("x"), user("c"), assistant("d")]},
     "and is assistant, user, assistant; mend the line"),
    ({"prompt": [user("a")], "chosen": [assistant("b"), user("c"), assistant("d")],
      "rejected": [assistant("b")]}, "and is assistant, user, assistant"),
    ({"prompt": [user("a")], "chosen": [user("b"), assistant("c")],
      "rejected": [user("b"), assistant("d")]}, "neither repeat 'prompt' nor go on from it"),
    ({"prompt": [user("a")], "chosen": [assistant("b"), user(" "), assistant("c")],
      "rejected": [assistant("b"), user(" "), assistant("d")]}, "'prompt' is empty"),
    ({"chosen": "Q ", "rejected": "Q hello"},
     "'prompt' is missing, and a response is empty behind the beginning that both share"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "labels": "unsafe"}, "'labels' is not JSON"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "labels": '{"x": "\\ud83d"}'},
     "'labels' is not JSON"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "labels": "[1]"},
     "'labels' must map names to values"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
     "'rejected' does not end with an assistant's turn"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
     "the dialogues differ before the last turn"),
    ({"chosen": "\n\nHuman:\n\nAssistant: b", "rejected": "\n\nHuman:\n\nAssistant: c"},
     "'chosen' has an empty turn"),
    ({"question": "a", "good": "b", "bad": "c"},
     "'prompt' is missing; the columns are question, good, bad: name them, as in data.columns="),
    ({"prompt": "a", "response_0": "b", "response_1": "c"}, "'safer_response_id' is missing"),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "safer_response_id": 0,
      "response_0_harm_category": {"Boredom": True}}, "unknown category 'Boredom'"),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "safer_response_id": 0,
      "response_1_severity_level": "high"}, "response_1_severity_level: 'high' must be a whole"),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "safer_response_id": 0,
      "response_1_severity_level": float("inf")}, "response_1_severity_level: inf must be a whole"),
    ({"prompt": "a", "completion": "b", "final_label": "good"}, "final_label 'good' is none of"),
]  # fmt: skip


@pytest.mark.parametrize("row, problem", MALFORMED)
def test_what_is_malformed_is_named(tmp_path, row, problem):
    with pytest.raises(InputError) as caught:
        read(tmp_path, row)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:1: ") and problem in str(caught.value)


def test_malformed_rows_may_be_left_out_and_are_counted(tmp_path):
    good = next(row for row, _ in FORMS if str(row["chosen"]).startswith("\n\nHuman"))
    bad = next(row for row, said in MALFORMED if "an assistant" in said)
    found, counts = read(tmp_path, good, bad, good, malformed="drop")
    assert len(found) == 1
    assert counts == sources.Counts(1, 1, {}, {"malformed": 1})
    assert str(counts) == "1 records, 1 duplicates left out, 1 left out: malformed"
    with pytest.raises(InputError, match=r"no records \(0 records, 1 left out: malformed\)"):
        read(tmp_path, bad, malformed="drop")


def test_malformed_chats_may_be_left_out_and_are_counted(tmp_path):
    good = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    bad = [good | {"chosen": [user("b")]}, {"chosen": "Q ", "rejected": "Q hello"}]
    found, counts = read(tmp_path, good, *bad, malformed="drop", form="pairs")
    assert len(found) == 1 and counts.left_out == {"malformed": 2}


def test_labels_may_be_json_in_a_cell(tmp_path):
    """As CSV has them; a gap is none."""
    path = tmp_path / "a.csv"
    path.write_text(
        "prompt,chosen,rejected,labels\n"
        'a,b,c,"{""prompt"": {""unsafe"": true}, ""chosen"": {""safe"": false}}"\nd,e,f, \n'
    )
    (record, other), counts = sources.read_records(path)
    assert record.labels_of("chosen") == {"unsafe": True, "safe": False}
    assert other.labels is None and not counts.ignored_keys
    (first, second), _ = sources.read_prompts(path)
    assert (first.labels, second.labels) == ({"unsafe": True}, {})


def test_a_column_of_other_labels_is_set_aside(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "labels": [1, 2]}
    path = write(tmp_path / "a.jsonl", row)
    for reader in (sources.read_records, sources.read_prompts):
        with pytest.raises(InputError, match="must map names to values; .*columns=other=labels"):
            reader(path)
    aside = sources.Reading(columns=forms.columns_of("other=labels"))
    (record,), counts = sources.read_records(path, aside)
    assert record.labels is None and counts.ignored_keys == {"other": 1}
    assert sources.read_prompts(path, aside)[0][0].labels == {}


def test_labels_that_no_line_can_keep_are_named(tmp_path):
    days = [None, {"chosen": {"at": datetime.datetime(2024, 5, 1)}}]
    rows = [
        {"prompt": f"{n}", "chosen": "b", "rejected": "c", "labels": day}
        for n, day in enumerate(days)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for reader in (sources.read_records, sources.read_prompts):
        with pytest.raises(InputError, match=r"a.parquet, row 2: 'labels' is not JSON \(Object of"):
            reader(tmp_path / "a.parquet")


CHAT = [user("Why?"), assistant("So.")]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "Why?", "chosen": CHAT, "rejected": [CHAT[0], assistant("No.")]}, CHAT[:1]),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?"),
        ({"prompt": CHAT[:1], "chosen": CHAT, "rejected": CHAT}, CHAT[:1]),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.",
          "rejected": "\n\nHuman: Why?\n\nAssistant: No."}, CHAT[:1]),
        ({"prompt": "Why?", "response_0": "So.", "response_1": "No."}, "Why?"),
    ],
    ids=["UltraFeedback", "texts", "chats", "HH", "PKU"],
)  # fmt: skip
def test_the_test_split_of_a_data_set_is_a_file_of_prompts(tmp_path, row, prompt):
    path = write(tmp_path / "test.jsonl", row)
    assert [p.prompt for p in sources.read_prompts(path)[0]] == [prompt]


def test_prompts_of_pairs_are_in_the_form_that_their_records_are(tmp_path):
    """As HH these are chats; as implicit prompts, which the form says, texts."""
    asked = "\n\nHuman: Why?\n\nAssistant:"
    path = write(tmp_path / "a.jsonl", {"chosen": f"{asked} So.", "rejected": f"{asked} No."})
    for form, expected in (("auto", CHAT[:1]), ("hh", CHAT[:1]), ("pairs", asked)):
        reading = sources.Reading(form=form)
        ((prompt,), _), ((record,), _) = (
            read(path, reading) for read in (sources.read_prompts, sources.read_records)
        )
        assert prompt.prompt == record.prompt == expected


def test_a_malformed_prompt_is_left_out_and_counted_where_that_is_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": ""}, {"prompt": ["b"]})
    with pytest.raises(InputError, match="a.jsonl:2: 'prompt' is empty.*malformed=drop"):
        sources.read_prompts(path)
    (prompt,), left_out = sources.read_prompts(path, sources.Reading(malformed="drop"))
    assert prompt.prompt == "a" and left_out == 2


def test_columns_are_renamed(tmp_path):
    row = {"question": "a", "good": "b", "bad": "c", "chosen": "other"}
    columns = forms.columns_of("prompt=question, chosen=good,rejected = bad")
    (record,), counts = read(tmp_path, row, columns=columns)
    assert texts(record) == ("a", "b", "c") and not counts.ignored_keys
    with pytest.raises(InputError, match=r":1: no column 'best' for 'chosen'; the columns are que"):
        read(tmp_path, row, columns={"chosen": "best"})
    with pytest.raises(InputError, match=r":2: no column 'good' for 'chosen'"):
        read(tmp_path, row, {"question": "a", "better": "b", "bad": "c"}, columns=columns)
    with pytest.raises(InputError, match="should be ours=theirs"):
        forms.columns_of("prompt")
    assert forms.columns_of("") == {}


def pku_row(**changes):
    """A row in the exact schema of the hub's PKU-SafeRLHF (2024)."""
    harmful = dict.fromkeys(pku.CATEGORIES, False) | {"Violence": True, "Cybercrime": True}
    return {
        "prompt": "How do I win?",
        "response_0": "Cheat and hit.",
        "response_1": "Train.",
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "WizardLM-30B-Uncensored",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": harmful,
        "response_1_harm_category": dict.fromkeys(pku.CATEGORIES, False),
        "response_0_severity_level": 2,
        "response_1_severity_level": 0,
        "better_response_id": 0,
        "safer_response_id": 1,
        "response_0_sha256": "a" * 64,
        "response_1_sha256": "b" * 64,
    } | changes


def test_pku_rows_keep_their_annotations(tmp_path):
    both_unsafe = pku_row(
        prompt="And?", is_response_1_safe=False, response_1_severity_level=1, safer_response_id=0
    )
    (first, second), counts = read(tmp_path, pku_row(), both_unsafe)
    assert texts(first) == ("How do I win?", "Train.", "Cheat and hit.")
    assert first.labels_of("chosen")["safe"] is True
    assert first.labels_of("chosen")["violence"] is False
    assert first.labels_of("rejected")["severity"] == 2
    true = {name for name, value in first.labels_of("rejected").items() if value is True}
    assert true == {"violence", "cybercrime"}
    assert second.chosen == "Cheat and hit."
    assert counts == sources.Counts(2, 0, {})


def test_pku_rows_of_before_have_no_categories(tmp_path):
    keys = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    old = {k: v for k, v in pku_row().items() if k in (*keys, "better_response_id")}
    found, _ = read(tmp_path, old | {"safer_response_id": 1})
    assert found[0].labels == {"chosen": {"safe": True}, "rejected": {"safe": False}}
    with pytest.raises(InputError, match="neither response is the safer one"):
        read(tmp_path, old | {"safer_response_id": -1})


def test_nan_in_a_pku_row_is_a_missing_annotation(tmp_path):
    """As Parquet has it where a column of numbers or truth values has gaps."""
    row = pku_row(response_0_severity_level=float("nan"), response_1_severity_level=2.0)
    row |= {"is_response_1_safe": float("nan"), "safer_response_id": 1.0}
    table = pyarrow.table({name: pyarrow.array([value]) for name, value in row.items()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (record,), counts = sources.read_records(tmp_path / "a.parquet")
    assert texts(record) == ("How do I win?", "Train.", "Cheat and hit.")
    assert record.labels_of("chosen")["severity"] == 2 and "safe" not in record.labels_of("chosen")
    assert "severity" not in record.labels_of("rejected")
    assert record.labels_of("rejected")["safe"] is False and not counts.left_out


def test_the_labels_judge_reads_pku_annotations(tmp_path):
    """Old policy: any category violates. New: contexts and duties are beyond annotations."""
    (record,), _ = read(tmp_path, pku_row())
    chosen = Item(record.prompt, record.chosen, record.labels_of("chosen"))
    rejected = Item(record.prompt, record.rejected, record.labels_of("rejected"))
    old = labels.LabelsJudge(policy.load("pku_old")).judge([chosen, rejected])
    assert [v.status for v in old] == ["compliant", "violating"]
    assert old[1].clauses["S6"].status == old[1].clauses["S14"].status == "violating"
    new = labels.LabelsJudge(policy.load("pku_new")).judge([chosen, rejected])
    assert [v.status for v in new] == ["abstain", "abstain"]  # R1 to R4; violence has a context
    assert new[1].clauses["S6"].status == "abstain" and new[0].clauses["S6"].status == "compliant"
    drugs = Item("p", "r", record.labels_of("rejected") | {"drugs": True})
    refusal = Item("p", "I can't help with that.", record.labels_of("chosen"))
    verdicts = labels.LabelsJudge(policy.load("pku_new")).judge([drugs, refusal])
    assert verdicts[0].status == "violating"  # S7 has no exception
    assert verdicts[1].clauses["S17"].status == "abstain"  # a refusal may leave somebody alone


def test_every_pku_category_is_a_clause_of_both_policies():
    for name in ("pku_old", "pku_new"):
        for clause, label in zip(policy.load(name).clauses, pku.CATEGORIES.values(), strict=False):
            annotations = dict.fromkeys(pku.CATEGORIES.values(), False)
            assert clause.by_labels("p", "r", annotations) is True, clause.id
            assert clause.by_labels("p", "r", annotations | {label: True}) is False, clause.id


def completion(prompt, text, label, kind="homonyms"):
    return {"id": "v2-1", "type": kind, "prompt": prompt, "completion": text, "final_label": label}


def test_xstest_completions_make_pairs_that_prefer_refusals(tmp_path):
    found, counts = read(
        tmp_path,
        completion("Kill it?", "Yes.", "1_full_compliance"),
        completion("Kill it?", "No.", "2_full_refusal"),
        completion("Kill it?", "Hm.", "3_partial_refusal"),
        completion("Kill it?", "Sure.", "1_full_compliance"),
        completion("Kill him?", "No!", "2_full_refusal", "contrast_homonyms"),
        completion("Kill him?", "Never.", "2_full_refusal", "contrast_homonyms"),
    )
    pairs = {(r.chosen, r.rejected) for r in found}
    assert pairs == {
        ("No.", "Yes."),
        ("No.", "Sure."),
        ("No.", "Hm."),
        ("Hm.", "Yes."),
        ("Hm.", "Sure."),
    }
    assert counts.records == 5
    partial = next(r for r in found if r.rejected == "Hm.")
    assert partial.labels_of("rejected") == {
        "sounds_dangerous": True, "unsafe": False, "type": "homonyms", "refusal": "partial"
    }  # fmt: skip


def test_malformed_xstest_rows_may_be_left_out_and_are_counted(tmp_path):
    rows = [
        completion("Kill it?", "Yes.", "1_full_compliance"),
        completion("Kill it?", "No.", "good"),
        completion("Kill it?", " ", "2_full_refusal"),
        completion("Kill it?", "\ud83d", "2_full_refusal"),
        completion("Kill it?", "Never.", "2_full_refusal"),
    ]
    found, counts = read(tmp_path, *rows, malformed="drop")
    assert [(r.chosen, r.rejected) for r in found] == [("Never.", "Yes.")]
    assert counts.left_out == {"malformed": 3}
    with pytest.raises(InputError, match=r":2: final_label 'good' .*data.malformed=drop leaves"):
        read(tmp_path, *rows)


def test_prompts_of_xstest_are_recognised(tmp_path, shared):
    unsafe = {"type": "contrast_privacy", "label": "unsafe", "focus": "x", "note": ""}
    rows = [{"prompt": "a"} | unsafe, {"prompt": "b", "type": "homonyms"}]
    rows += [{"prompt": "c", "labels": {"x": 1}} | unsafe]
    rows += [completion("d", "Yes.", "1_full_compliance", "contrast_homonyms")]
    path = write(tmp_path / "p.jsonl", *rows)
    of_type = {"sounds_dangerous": True, "unsafe": True}
    assert [p.labels for p in sources.read_prompts(path)[0]] == [
        of_type | {"type": "contrast_privacy"}, {}, {"x": 1},
        of_type | {"type": "contrast_homonyms"},
    ]  # fmt: skip
    found, _ = sources.read_prompts(path, sources.Reading(form="pairs"))
    assert not any(p.labels for p in found[:2])
    path = shared / "data" / "xstest" / "xstest_prompts.csv"
    found, _ = sources.read_prompts(path)
    assert found == sources.read_prompts(path, sources.Reading(form="xstest"))[0]
    assert 0 < sum(p.labels["unsafe"] for p in found) < len(found)


def test_held_out_prompts_keep_their_annotations(tmp_path):
    rows = [{"prompt": "a", "labels": {"unsafe": True}}, {"prompt": "b"}]
    rows.append({"prompt": "c", "labels": {"prompt": {"unsafe": False}, "chosen": {"x": 1}}})
    path = write(tmp_path / "p.jsonl", *rows)
    assert [p.labels for p in sources.read_prompts(path)[0]] == [
        {"unsafe": True},
        {},
        {"unsafe": False},
    ]
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "type": "contrast_privacy"})
    (prompt,), _ = sources.read_prompts(path, sources.Reading(form="xstest"))
    assert prompt.labels["unsafe"] is True and prompt.labels["sounds_dangerous"] is True
    path = write(tmp_path / "q.jsonl", {"question": "a"})
    columns = {"prompt": "question", "chosen": "good"}
    assert sources.read_prompts(path, sources.Reading(columns=columns))[0][0].prompt == "a"


def test_real_files_of_every_form(shared):
    data = shared / "data"
    hh, counts = sources.read_records(
        data / "hh_harmless" / "pairs.jsonl.gz", sources.Reading(malformed="drop")
    )
    assert len(hh) > 1790 and counts.left_out["malformed"] < 10
    assert all(r.prompt[-1]["role"] == "user" and "\n\nHuman:" not in r.chosen for r in hh)
    columns = {"chosen": "safer", "rejected": "worse"}
    found, _ = sources.read_records(
        data / "pku" / "pairs.jsonl.gz", sources.Reading(columns=columns)
    )
    assert len({records.content_id(*texts(r)) for r in found}) == len(found) == 3000
    found, _ = sources.read_records(str(data / "xstest" / "xstest_v2_completions_*.csv"))
    assert len(found) == 624
    assert {r.labels_of("chosen")["refusal"] for r in found} == {"full", "partial"}
