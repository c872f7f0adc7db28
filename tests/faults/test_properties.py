"""What holds for any input, by hypothesis: texts survive, fences hold, rows pack, weights sum."""

import json
import os
import re

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from faults.test_hostile import EACH
from tests import tiny
from trace_jax import batches, bucket, encoding, impact, packing, policy, records, sources
from trace_jax.errors import InputError
from trace_jax.judges import rules, template

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
FULL = TEXTS.filter(lambda text: text.strip())
TOKENIZER = tiny.tokenizer()
JUDGES = [rules.RulesJudge(policy.load(name)) for name in policy.shipped()]
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
# `make test` tries the same inputs every time; `make soak` looks for new ones.
many = settings(
    max_examples=max(50, EACH // 4),
    deadline=None,
    suppress_health_check=SLOW,
    derandomize="TRACE_SOAK" not in os.environ,
)


@many
@given(prompt=FULL, chosen=FULL, rejected=FULL)
def test_a_record_is_read_back_to_the_character(tmp_path, prompt, chosen, rejected):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    records.write_jsonl(path, [row])
    try:
        (found,), _ = sources.read_records(str(path))
    except InputError as error:
        assert chosen.strip() == rejected.strip() or "\x00" in prompt + chosen + rejected, error
        return
    assert {key: getattr(found, key) for key in row} == row


@many
@given(prompt=TEXTS, responses=st.lists(TEXTS, min_size=1, max_size=2))
def test_no_text_closes_the_fence_around_it(prompt, responses):
    parts = {"prompt": prompt} | {f"response_{i}": r for i, r in enumerate(responses)}
    written = template.fenced(parts)
    code = re.match(r"<prompt (\w{24})>\n", written)[1]
    for name, text in parts.items():
        begin, end = f"<{name} {code}>\n", f"\n</{name} {code}>"
        assert written.count(begin) == 1 == written.count(end)
        assert written.partition(begin)[2].partition(end)[0] == text
    # A text that quotes the fence of another question is in a fence with another code.
    again = template.fenced({"prompt": written})
    assert re.match(r"<prompt (\w{24})>", again)[1] != code


@many
@given(text=TEXTS, prompt=FULL)
def test_the_rules_have_one_answer_about_any_text(text, prompt):
    for judge in JUDGES:
        one, two = (judge.judge([(prompt, text)])[0] for _ in range(2))
        assert one == two and one.clauses.keys() == {c.id for c in judge.policy.clauses}


@many
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    row_length=st.integers(60, 200),
    slots=st.integers(1, 8),
)
def test_rows_hold_every_example_once_and_no_more_than_fits(lengths, row_length, slots):
    rows = packing.pack_rows(lengths, row_length, slots)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) <= slots and sum(lengths[i] for i in row) <= row_length for row in rows)


@many
@given(prompt=FULL, responses=st.lists(FULL, min_size=2, max_size=2))
def test_a_packed_example_is_its_texts(prompt, responses):
    encoder = encoding.Encoder(TOKENIZER, max_length=4096, end_id=None)
    found = encoder.encode(prompt, responses, "x")
    rows = batches.write_rows([found], [[0]], (1, found.row_length, 1))
    for b, response in enumerate(responses):
        mine = rows.branches[0] == b + 1
        text = encoder.prompt_text(prompt) + response
        whole = TOKENIZER(text, add_special_tokens=False).input_ids
        shared = rows.tokens[0][rows.branches[0] == 0].tolist()
        tokens = [*shared, *rows.tokens[0][mine].tolist(), rows.targets[0][mine].tolist()[-1]]
        assert tokens[len(tokens) - len(whole) :] == whole
        counted = (rows.responses[0] == b).sum()
        assert counted == len(found.branches[b]) - found.skip[b] > 0


@many
@given(
    scores=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=40),
    strength=st.floats(0, 1),
    of_sum=st.booleans(),
)
@example(scores=[0.0, 0.0, 0.0, 5e-324], strength=0.5, of_sum=False)
def test_weights_have_the_mean_they_should(scores, strength, of_sum):
    scores = np.array(scores)
    kind = "sum_to_one" if of_sum else "mean_one"
    try:
        found = impact.weights(scores, normalisation=kind, strength=strength)
    except InputError:
        assert scores.max() <= 0
        return
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(), 1 if of_sum else len(scores), rtol=1e-9)
    better = np.argsort(scores, kind="stable")
    assert (np.diff(found[better]) >= -1e-12).all()


@many
@given(name=st.text(st.sampled_from(["a", ".", "/", "\\", ":"]), max_size=12))
def test_a_name_that_stays_inside_stays_inside(tmp_path, name):
    if bucket._inside(name):
        assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())


@many
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_an_artefact_is_read_back_as_it_was(tmp_path, value):
    records.write_json(tmp_path / "value.json", value)
    assert records.read_json(tmp_path / "value.json") == json.loads(json.dumps(value))
