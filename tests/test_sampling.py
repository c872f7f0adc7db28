import contextlib
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from trace_jax import decoding, errors, models, sampling, sharding

CONFIG = models.ModelConfig(11, 16, 24, 2, 2, 1, 8, 48)
PROMPTS = [[1, *range(2, 2 + n % 8)] for n in range(13)]
IDS = [f"record {n}" for n in range(13)]
NEVER = (-1,)  # a stop token that never comes


@pytest.fixture(scope="module")
def module():
    """Random, with a head large enough that tokens differ in probability."""
    return scaled_head(12.0)


def scaled_head(factor):
    module = models.init(CONFIG, seed=0)
    module.head.kernel[...] *= factor
    module.layers.q.kernel[...] *= 10  # attention sharp enough for a wrong position to show
    return module


def generate(module, prompts=PROMPTS, ids=IDS, **options):
    defaults = dict(seed=0, samples=2, max_new_tokens=6, temperature=1.0, stop_ids=(2,))
    return sampling.generate(module, prompts, ids=ids, **defaults | options)


def test_greedy_equals_transformers_on_stories(shared):
    """50 openings of different lengths, left-padded there as here."""
    torch = pytest.importorskip("torch")
    import transformers

    path = shared / "models" / "stories260k"
    module = models.load(path)
    ids = [str(n) for n in range(50)]
    options = dict(seed=0, max_new_tokens=32, stop_ids=(1, 2), batch_rows=50)
    stories = sampling.generate(module, [[1]] * 50, ids=ids, temperature=1.0, **options)
    prompts = [[1, *story.tokens[: 1 + n % 30]] for n, (story,) in enumerate(stories)]
    assert len({tuple(prompt) for prompt in prompts}) > 40
    ours = sampling.generate(module, prompts, ids=ids, temperature=0.0, **options)

    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype="float32").eval()
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = dict(max_new_tokens=32, do_sample=False, eos_token_id=[1, 2], pad_token_id=0)
    theirs = model.generate(tokens, attention_mask=mask, **settings)[:, width:].tolist()
    for (sample,), row in zip(ours, theirs, strict=True):
        end = next((n for n, token in enumerate(row) if token in (1, 2)), None)
        assert sample.tokens == row[:end]
        assert sample.finished == (end is not None)


def test_greedy_is_the_argmax_of_the_full_forward_pass(module):
    forward = jax.jit(lambda tokens: module(tokens))
    for prompt, (sample, again) in zip(PROMPTS, generate(module, temperature=0.0), strict=True):
        assert sample == again
        row = prompt + sample.tokens + [2] * sample.finished
        padded = np.array([row + [0] * (16 - len(row))])
        expected = np.argmax(forward(padded)[0], axis=-1)
        assert row[len(prompt) :] == expected[len(prompt) - 1 : len(row) - 1].tolist()


def test_samples_do_not_depend_on_the_batch(module):
    together = generate(module)
    assert together == generate(module, batch_rows=13)
    order = np.random.default_rng(0).permutation(13)
    shuffled = generate(module, [PROMPTS[i] for i in order], [IDS[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert generate(module, PROMPTS[3:4], IDS[3:4]) == [together[3]]


def test_samples_depend_on_seed_id_and_sample(module):
    draw = lambda **options: generate(module, [[1]], stop_ids=NEVER, **options)[0]  # noqa: E731
    a, b = draw(ids=["a"])
    drawn = [a, b, draw(ids=["b"])[0], draw(ids=["a"], seed=1)[0]]
    assert len({tuple(sample.tokens) for sample in drawn}) == 4


def test_every_position_has_its_own_noise():
    flat = generate(scaled_head(0.0), stop_ids=NEVER)
    repeated = [sample.tokens[0] == sample.tokens[1] for each in flat for sample in each]
    assert sum(repeated) < 10  # 26 / 11 expected


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(module, temperature):
    options = dict(samples=2048, max_new_tokens=1, stop_ids=NEVER, temperature=temperature)
    (samples,) = generate(module, [[1, 5]], ["a"], batch_rows=2048, **options)
    counts = np.bincount([sample.tokens[0] for sample in samples], minlength=11)
    logits = module(np.array([[1, 5]]))[0, -1] / temperature
    expected = 2048 * np.asarray(jax.nn.softmax(logits))
    assert 0.02 * 2048 < np.sort(expected)[-4]  # not a distribution of one token
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 29.6  # 10 degrees of freedom, p = 0.001; the seed is fixed


def test_more_samples_go_on_from_the_first(module):
    more = generate(module, first_sample=1, samples=1, batch_rows=13)
    assert more == [each[1:] for each in generate(module)]


def test_a_stop_token_ends_a_sample_and_is_not_part_of_it(module):
    free = generate(module, stop_ids=())
    stopped = generate(module, stop_ids=(3,))
    ended = 0
    for long, short in zip(sum(free, []), sum(stopped, []), strict=True):
        assert len(long.tokens) == 6 and not long.finished
        end = next((n for n, token in enumerate(long.tokens) if token == 3), None)
        assert short.tokens == long.tokens[:end]
        assert short.finished == (end is not None)
        ended += short.finished
    assert 0 < ended


def test_long_prompts_lose_their_left_end_and_say_so(module):
    prompt = [1 + n % 9 for n in range(50)]
    cut, whole = generate(module, [prompt, prompt[-42:]], ["a", "a"])
    assert [sample.prompt_tokens_cut for sample in cut + whole] == [8, 8, 0, 0]
    assert [sample.tokens for sample in cut] == [sample.tokens for sample in whole]


def test_temperature_and_seed_do_not_compile_again(module):
    generate(module)
    before = decoding.advance._cache_size(), decoding.prefill._cache_size()
    generate(module, temperature=0.3, seed=5)
    generate(module, temperature=0.0)
    generate(nnx.merge(*nnx.split(module)), [[1, 2, 3]] * 13)
    assert (decoding.advance._cache_size(), decoding.prefill._cache_size()) == before


def test_progress_counts_rows(module):
    calls = []
    generate(module, PROMPTS[1:], IDS[1:], batch_rows=8, progress=calls.append)
    assert sum(calls) == 24 and len(calls) > 3


@pytest.mark.parametrize("refills", [1, 2, 4])
def test_refilled_slots_give_what_a_row_alone_gives(module, refills):
    """Rows stop at different times; a slot's next row sees nothing of the one before."""
    alone = [generate(module, [p], [i])[0] for p, i in zip(PROMPTS, IDS, strict=True)]
    assert len({len(s.tokens) for samples in alone for s in samples}) > 3
    assert generate(module, batch_rows=4, refills=refills) == alone


def test_the_last_rows_are_the_same_where_no_copy_of_them_is_made(module, monkeypatch):
    copied = generate(module, batch_rows=8)
    monkeypatch.setattr(decoding, "_COPIED_BYTES", 0)
    decoding.advance.clear_cache()
    assert generate(module, batch_rows=8) == copied
    decoding.advance.clear_cache()


def test_a_step_sends_nothing_of_the_cache():
    """On data shards a step agrees on how many rows live and how long they are, no more."""
    with jax.set_mesh(sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])):
        module = sharding.place_module(models.init(CONFIG, seed=0))
        _, advance = sampling.lower(*nnx.split(module), 16, 8, 8)
        text = advance.compile().as_text()
    sent = [line for line in text.splitlines() if re.search(r" all-\w+\(|permute\(", line)]
    assert sent
    for line in sent:
        (shape,) = re.findall(r"= \w+\[([\d,]*)\]", line)
        assert shape in ("", "2", "16", "16,8"), line  # the last two are what the host reads


def test_few_programs_whatever_the_prompts(module):
    decoding.prefill.clear_cache()
    decoding.advance.clear_cache()
    generate(module, [[1] * n for n in (1, 5, 31, 32, 33, 40)], IDS[:6], batch_rows=4)
    assert decoding.prefill._cache_size() == 2  # prompts of up to 32, and of up to 64 tokens
    assert decoding.advance._cache_size() == 1


@pytest.mark.parametrize("shape", [None, (2, 2, 1)])
def test_one_program_however_many_rows_wherever_they_lie(module, shape):
    """Parameters on a device by name, as those that were read from a file are, or on a mesh."""
    decoding.prefill.clear_cache()
    decoding.advance.clear_cache()
    with jax.set_mesh(sharding.make_mesh(*shape)) if shape else contextlib.nullcontext():
        graphdef, state = nnx.split(module)
        on_one = nnx.merge(graphdef, jax.device_put(state, jax.devices()[0]))
        there = sharding.place_module(module) if shape else on_one
        for rows in (6, 1):
            generate(there, [[1, 2, 3]] * rows, IDS[:rows], batch_rows=4)
    assert (decoding.prefill._cache_size(), decoding.advance._cache_size()) == (1, 1)


@functools.cache
def generated_on(*shape: int):
    with jax.set_mesh(sharding.make_mesh(*shape)):
        module = models.init(models.ModelConfig(48, 16, 32, 2, 4, 2, 8, 64), 0)
        module.head.kernel[...] *= 12.0
        return generate(sharding.place_module(module), batch_rows=16)


MESHES = [pytest.param(s, marks=pytest.mark.soak) for s in ((8, 1, 1), (1, 8, 1))] + [(2, 2, 2)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_same_tokens_on_every_mesh(shape):
    one = generated_on(1, 1, 1)
    assert len({tuple(s.tokens) for samples in one for s in samples}) > 20
    assert generated_on(*shape) == one


def test_slots_that_the_shards_do_not_divide_are_refused(module):
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        with pytest.raises(errors.InputError, match="batch_rows=6 is not divisible by 4 data sh"):
            generate(sharding.place_module(module), batch_rows=6)
        assert sampling.most_slots(2) == 4  # one a shard


def test_no_prompts_no_samples(module):
    assert generate(module, [], []) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=[[1], []], ids=["a", "b"]), "prompt of b has no tokens"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=48), "max_new_tokens=48"),
        (dict(temperature=-1.0), "temperature=-1.0"),
    ],
)
def test_bad_options_are_refused(module, options, message):
    with pytest.raises(errors.InputError, match=message):
        generate(module, **options)
