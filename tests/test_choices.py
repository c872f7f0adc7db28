import numpy as np

from trace_jax.evaluate import choices


def row(i: int, response: str, **other) -> dict:
    return {"prompt": f"p{i}", "response": response, "mode": "sample", "sample": 0} | other


def test_a_question_has_its_own_continuation_first_and_three_others():
    rows = [row(i, f"text {i}") for i in range(9)]
    rows += [row(0, "greedy", mode="greedy"), row(0, "second", sample=1), row(9, "  ")]
    asked = choices.questions(rows)
    assert [q.prompt for q in asked] == [f"p{i}" for i in range(9)]
    for i, question in enumerate(asked):
        own, *others = question.responses
        assert own == f"text {i}" and len({own, *others}) == choices.CHOICES
        assert {own, *others} <= {f"text {j}" for j in range(9)}
    assert choices.questions(rows) == asked


def test_the_same_text_elsewhere_is_no_wrong_answer():
    rows = [row(i, f"text {i % 4}") for i in range(12)]
    for question in choices.questions(rows):
        assert sorted(question.responses) == [f"text {i}" for i in range(4)]


def test_too_few_texts_ask_nothing():
    assert choices.questions([row(i, f"text {i % 3}") for i in range(9)]) == []
    assert choices.questions([]) == [] and choices.figure([]) == choices.figure(None) == {}


def test_right_is_the_likeliest_alone():
    values = np.array(
        [[-1.0, -2, -3, -4], [-2, -1, -3, -4], [-1, -1, -2, -3], [-5, -6, -np.inf, -7]]
    )
    assert choices.right(values) == [1, 0, 0, 1]


def test_rates_over_seeds():
    found = choices.rate_over_seeds([[1, 1, 0, 1], [1, 0, 0, 1]])
    assert found["rate"] == 0.625 and found["n"] == 4 and found["seeds"] == [0.75, 0.5]
    assert found["low"] < 0.625 < found["high"]
    one = choices.figure([1, 0, 1, 1])["choice_accuracy"]
    assert one["rate"] == 0.75 and one["chosen"] == [1, 0, 1, 1]
