"""Boundaries in token space, packing, and packed rows against separate rows."""

import functools

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from trace_jax import batches, encoding, logprobs, packing, train
from trace_jax.errors import InputError

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_token_id


def encoder(**changes) -> encoding.Encoder:
    return encoding.Encoder(TOKENIZER, **dict(max_length=32, end_id=END) | changes)


def words(tokens) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(list(tokens))


def test_prompt_and_response_are_tokenised_together():
    e = encoder().encode("c d", ["e", " f"])
    assert words(e.prompt) == ["<s>", "▁", "c", "▁", "d"]
    assert [words(b) for b in e.branches] == [["e", "</s>"], ["▁", "f", "</s>"]]
    assert e.skip == (0, 0)
    assert e.row_length == 4 + 2 + 3


def test_a_straddling_token_belongs_to_the_response():
    e = encoder().encode("xa", ["bc"])
    assert words(e.prompt) == ["<s>", "▁", "x"]
    assert [words(b) for b in e.branches] == [["ab", "c", "</s>"]]
    assert e.skip == (0,)


def test_where_branches_split_the_prompt_differently_its_tokens_carry_no_loss():
    e = encoder().encode("xa", ["bc", "d"])
    assert words(e.prompt) == ["<s>", "▁", "x"]
    assert [words(b) for b in e.branches] == [["ab", "c", "</s>"], ["a", "d", "</s>"]]
    assert e.skip == (0, 1)
    rows = batches.write_rows([e], [[0]], (1, 8, 1))
    counted = [words(rows.targets[0, rows.responses[0] == b]) for b in (0, 1)]
    assert counted == [["ab", "c", "</s>"], ["d", "</s>"]]


def test_responses_that_share_no_prompt_token_are_refused():
    bare = tiny.tokenizer()
    bare.bos_token = None
    bare.backend_tokenizer.pre_tokenizer = None
    inside = encoding.Encoder(bare, max_length=32, end_id=END)
    with pytest.raises(InputError, match="beginning-of-text"):
        inside.encode("a", ["b"])  # one token, which straddles
    with pytest.raises(InputError, match="record r7.*beginning-of-text"):
        inside.encode("xy", ["z", "d"], "r7")  # x yz and xy d


def test_prompt_tokens_are_the_prompt_alone():
    assert words(encoder().prompt_tokens("xa")) == ["<s>", "▁", "x", "a"]


def test_truncation_cuts_the_prompt_from_the_left_and_is_counted():
    e = encoder(max_length=7)
    whole = e.encode("c d", ["e", "f"])
    assert e.truncated_prompts == 0 and len(whole.prompt) == 5
    cut = e.encode("g h c d", ["e", "fgh"])
    assert words(cut.prompt) == ["<s>", "▁", "d"]  # BOS stays
    assert [words(b) for b in cut.branches] == [["e", "</s>"], ["f", "g", "h", "</s>"]]
    assert e.truncated_prompts == 1


def test_a_response_too_long_is_an_error_that_names_the_record():
    assert len(encoder(max_length=7).encode("c", ["abcdef"], "r7").prompt) == 1  # 6 tokens fit
    with pytest.raises(InputError, match=r"record r7.*7 tokens.*max_length=7"):
        encoder(max_length=7).encode("c", ["abcdefg"], "r7")


def test_a_response_too_long_may_be_cut_at_its_end_and_is_counted():
    cutting = encoding.Encoder(TOKENIZER, max_length=7, end_id=END, cut_responses=True)
    e = cutting.encode("c", ["abcdefgh", "e"])  # 3 tokens of prompt leave 4
    assert words(e.prompt) == ["<s>", "▁", "c"] and cutting.truncated_responses == 1
    assert [words(b) for b in e.branches] == [["ab", "c", "d", "e"], ["e", "</s>"]]
    assert cutting.truncated_prompts == 0
    long = cutting.encode("c d e f", ["abcdefgh", "e"])  # a prompt keeps half of the limit
    assert len(long.prompt) == 3 and len(long.branches[0]) == 4
    assert cutting.truncated_prompts == 1 and cutting.truncated_responses == 2


def test_examples_too_long_are_dropped_by_name_or_refused():
    made = [tiny.methods.Example(f"r{n}", "INVERT", "c", "d" * n, "e", pref=1.0) for n in (2, 40)]
    dropped = []
    kept, encoded = batches.encode_examples(encoder(), made, on_drop=dropped.append)
    assert [e.record_id for e in kept] == ["r2"] and len(encoded) == 1 and dropped == ["r40"]
    with pytest.raises(InputError, match="record r40"):
        batches.encode_examples(encoder(), made)


def test_a_chat_template_that_writes_bos_gets_no_second():
    chat = tiny.tokenizer()
    chat.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    e = encoding.Encoder(chat, max_length=32, end_id=None)
    messages = [{"role": "user", "content": "cd"}]
    one = e.encode(messages, [[{"role": "assistant", "content": " ef"}]])
    assert one.prompt.count(chat.bos_token_id) == 1 and one.prompt[0] == chat.bos_token_id
    assert [words(b) for b in one.branches] == [
        ["▁", "e", "f"]
    ]  # and no stop token where end_id=None


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        encoder().encode([{"role": "user", "content": "c"}], ["d"])


def test_response_text_keeps_the_leading_space():
    e = encoder()
    prompt, branch = (list(t) for t in (e.prompt_tokens("cd"), e.encode("cd", [" ef"]).branches[0]))
    assert TOKENIZER.decode(branch, skip_special_tokens=True) == "ef"  # alone, the space is lost
    assert e.response_text(prompt, branch) == " ef"


def test_a_row_by_hand():
    """Prompt 1 2 3; y0 = 4 5, y1 = 6 7 8 whose first token still belongs to the prompt."""
    e = encoding.Encoded((1, 2, 3), ((4, 5), (6, 7, 8)), (0, 1))
    after = encoding.Encoded((9, 10), ((11,),), (0,))
    rows = batches.write_rows([e, after], [[0, 1]], (1, 11, 2))
    by_hand = {
        "tokens": [1, 2, 3, 4, 3, 6, 7, 9, 10, 0, 0],  # 3 begins both branches
        "positions": [0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 0],
        "segments": [1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0],
        "branches": [0, 0, 1, 1, 2, 2, 2, 0, 1, 0, 0],
        "targets": [0, 0, 4, 5, 6, 7, 8, 0, 11, 0, 0],
        "responses": [4, 4, 0, 0, 4, 1, 1, 4, 2, 4, 4],  # 4 = counts nowhere
    }
    for name, expected in by_hand.items():
        np.testing.assert_array_equal(getattr(rows, name)[0], expected, err_msg=name)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 5), (1, 4, 2), (6, 2, 3), (3, 5), (2, 6, 6), (5, 1, 1)]
    made = [tiny.text(rng, *lengths) for lengths in shapes]
    return made + [tiny.text(rng, 4, 5, 4, skip=(0, 2))]


@pytest.fixture(scope="module")
def model():
    return tiny.module()


def test_packed_rows_give_the_log_probs_of_separate_rows(model, texts):
    packed = logprobs.of_texts(model, texts, row_length=32, micro_rows=2)
    assert max(len(row) for row in packing.pack_rows([e.row_length for e in texts], 32, 9)) >= 3
    np.testing.assert_allclose(packed, tiny.reference(model, texts), atol=1e-5)
    assert packed[3, 1] == 0  # it has one response


def test_log_probs_do_not_depend_on_the_row_length(model, texts):
    short = logprobs.of_texts(model, texts, row_length=16, micro_rows=2)
    np.testing.assert_allclose(
        short, logprobs.of_texts(model, texts, row_length=32, micro_rows=2), atol=1e-5
    )


@pytest.fixture(scope="module")
def loss_and_gradient(model):
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def compute(batch):
        def loss(params):
            module = nnx.merge(graphdef, params, frozen)
            micro = jax.tree.map(lambda a: a[0], batch)
            return train.conflict_loss(
                module, logprobs.hidden(module, micro.rows), micro, tiny.hyper(), tiny.options()
            )[0]

        return jax.value_and_grad(loss)(params)

    return compute


EXAMPLES = [
    tiny.example(pref=1.0),
    tiny.example(npo0=1.0, npo1=0.5),
    tiny.example(nll=1.0),
    tiny.example(pref=0.5, nll=0.1),
]


def one_batch(texts, examples=EXAMPLES):
    ref = np.random.default_rng(1).normal(-9, 1, (len(texts), 2)).astype(np.float32)
    plan = [[0, 1], [2, 3]]
    layout = packing.Layout(micro_rows=2, row_length=32, slots=3, micro_batches=1)
    return batches.make_batch(plan, layout, texts, examples, ref)


def test_padding_content_is_irrelevant(texts, loss_and_gradient):
    clean = one_batch(texts[:4])
    padding = clean.rows.segments == 0
    assert padding.sum() > 10
    rng = np.random.default_rng(2)
    dirty = {
        name: np.where(padding, rng.integers(0, 40, padding.shape), getattr(clean.rows, name))
        for name in ("tokens", "positions", "targets")
    }
    soiled = clean._replace(rows=clean.rows._replace(**dirty))
    tiny.assert_same(loss_and_gradient(clean), loss_and_gradient(soiled))


def test_an_example_of_coefficient_zero_is_exactly_absent(texts, loss_and_gradient):
    """The same loss and gradient bit for bit whatever its tokens are, and as where it is masked."""
    rng = np.random.default_rng(3)
    examples = [*EXAMPLES[:3], tiny.example()]
    shape = (len(texts[3].prompt), len(texts[3].branches[0]))
    out = loss_and_gradient(one_batch(texts[:4], examples))
    other = loss_and_gradient(one_batch([*texts[:3], tiny.text(rng, *shape)], examples))
    tiny.assert_same(out, other)
    masked = one_batch([*texts[:3], texts[3]], examples)
    of_it = masked.rows.segments[0, 1] == 2
    masked.rows.responses[0, 1, of_it] = 6
    masked.rows.segments[0, 1, of_it] = 0
    tiny.assert_same(out, loss_and_gradient(masked))
    counted = loss_and_gradient(one_batch(texts[:4]))
    assert float(counted[0]) != float(out[0])


def test_the_last_group_of_rows_is_about_full(texts):
    encoded = [texts[0]] * 9  # one a row
    layout, groups = logprobs.packed_groups(
        encoded, row_length=texts[0].row_length, micro_rows=2, micro_batches=4
    )
    assert [len(group) for group in groups] == [6, 3] and layout.n_rows == 6
    alone, (group,) = logprobs.packed_groups(encoded[:3], row_length=32, micro_rows=4)
    assert alone.micro_batches == 1 and sum(map(len, group)) == 3


def test_any_number_of_texts_is_one_program(texts, model):
    logprobs._packed_logprobs.clear_cache()
    length = max(t.row_length for t in texts)
    asked = functools.partial(logprobs.of_texts, model, row_length=length, micro_rows=2)
    whole = asked([*texts[:3]] * 20)
    for n in (1, 7, 30):
        np.testing.assert_allclose(asked(([*texts[:3]] * 20)[:n]), whole[:n], atol=1e-5)
    assert logprobs._packed_logprobs._cache_size() == 1 and whole.all()
