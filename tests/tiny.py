"""Small things that test files share: a decoder, a tokenizer, random texts, plain log-probs.

Legend: B responses (two a text), L tokens, V vocabulary.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx

from trace_jax import batches, encoding, methods, models, packing, train
from trace_jax import fit as fitting

CONFIG = models.ModelConfig(40, 16, 24, 2, 2, 1, 8, 128)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Files that import this compile in half the time; their programs are small anyway."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def module(seed: int = 0):
    """A random decoder with a head so large that its predictions are far from uniform."""
    model = models.init(CONFIG, seed=seed)
    model.head.kernel[...] = model.head.kernel[...] * 10
    return model


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Letters, the space as "▁" before a word as in Llama, and the merges "ab", "yz", "xy"."""
    vocab = ["<unk>", "<s>", "</s>", "▁", *LETTERS, "ab", "yz", "xy"]
    ids = {token: i for i, token in enumerate(vocab)}
    merges = [("a", "b"), ("y", "z"), ("x", "y")]
    bpe = tokenizers.models.BPE(ids, merges, unk_token="<unk>")
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text(rng: np.random.Generator, *lengths: int, skip=None) -> encoding.Encoded:
    """Random tokens: lengths of the prompt and of each branch."""
    prompt, *branches = (tuple(int(t) for t in rng.integers(3, 40, n)) for n in lengths)
    return encoding.Encoded(prompt, tuple(branches), tuple(skip or (0,) * len(branches)))


def example(name: str = "r", y1: str | None = "", **coefficients: float) -> methods.Example:
    """An example whose texts do not matter, because its tokens are given beside it."""
    return methods.Example(name, "INVERT", "", "", y1, **coefficients)


def options(**changes) -> train.Options:
    """Options of a plain run."""
    values = dict(preference="logistic", npo_scale="plain", length_normalised=False)
    values |= dict(n_conflict=4, n_retain=2, total_steps=10, warmup_steps=2, final_fraction=0.1)
    values |= dict(weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95)
    return train.Options(**values | changes)


def hyper(learning_rate: float = 1e-3, beta: float = 0.3, tau: float = 0.2) -> train.Hyper:
    return train.Hyper(*(jnp.float32(v) for v in (learning_rate, beta, tau)))


def plan(texts, *, micro_rows: int = 1, row_length: int = 32) -> packing.PackPlan:
    """All texts in one step."""
    return packing.PackPlan(
        [e.row_length for e in texts],
        np.arange(len(texts))[None],
        row_length=row_length,
        micro_rows=micro_rows,
    )


def batch(texts, examples=None, ref=None, *, packed: packing.PackPlan | None = None, **shape: int):
    """All texts as one packed batch [M, R, ...]."""
    packed = packed or plan(texts, **shape)
    return batches.make_batch(packed.rows[0], packed.layout, texts, examples, ref)


def separate(texts) -> tuple[np.ndarray, np.ndarray]:
    """One response a row, padded on the right: tokens [2 n, L], and where they count as targets."""
    lengths = [len(e.prompt) + max(map(len, e.branches)) for e in texts]
    tokens = np.zeros((2 * len(texts), max(lengths)), np.int32)
    counts = np.zeros(tokens.shape, np.float32)
    for i, e in enumerate(texts):
        for b, (branch, skip) in enumerate(zip(e.branches, e.skip, strict=True)):
            whole = e.prompt + branch
            tokens[2 * i + b, : len(whole)] = whole
            counts[2 * i + b, len(e.prompt) + skip : len(whole)] = 1
    return tokens, counts


def plain_logprobs(model, tokens_BL, counts_BL) -> jax.Array:
    """log p of every response by the whole [B, L, V] log-softmax, [n, 2]."""
    logp_BLV = jax.nn.log_softmax(model(tokens_BL)[:, :-1], axis=-1)
    logp_BL = jnp.take_along_axis(logp_BLV, tokens_BL[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(logp_BL * counts_BL[:, 1:], axis=-1).reshape(-1, 2)


def reference(model, texts) -> np.ndarray:
    """log p of texts under `model`, [n, 2]."""
    return np.asarray(jax.jit(plain_logprobs)(model, *separate(texts)))


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same(a, b) -> None:
    """Two trees are equal bit for bit."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, **tolerance: float) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def split(model, kind: type = nnx.Param):
    """(graphdef, trainable, frozen)."""
    return nnx.split(model, kind, ...)


@contextlib.contextmanager
def quiet(total=None, description="", start=0):
    """Progress that shows nothing."""

    class Bar:
        def advance(self, n: int = 1) -> None:
            pass

    yield Bar()


def encoder() -> encoding.Encoder:
    tokens = tokenizer()
    return encoding.Encoder(tokens, max_length=24, end_id=tokens.eos_token_id)


def conversations() -> list[methods.Example]:
    """Twelve examples in letters: INVERT, dual NPO and KL in turn."""
    rng = np.random.default_rng(0)

    def words() -> str:
        return " ".join("".join(rng.choice(list(LETTERS), 3)) for _ in range(rng.integers(1, 3)))

    made = []
    for i in range(0, 12, 3):
        made.append(methods.Example(f"r{i}", "INVERT", words(), words(), words(), pref=1.0))
        pair = dict(npo0=0.5, npo1=0.5)
        made.append(methods.Example(f"r{i + 1}", "PUNISH", words(), words(), words(), **pair))
        made.append(methods.Example(f"r{i + 2}", "RETAIN", words(), words(), kl=0.1))
    return made


def settings(**changes) -> fitting.Settings:
    """Of a run of 6 steps with a checkpoint every 2."""
    values = dict(total_steps=6, examples_per_step=3, retain_per_step=2, micro_rows=2)
    values |= dict(row_length=48, learning_rate=0.02, beta=0.3, tau=0.2, warmup_steps=1)
    values |= dict(final_fraction=0.1, weight_decay=0.01, clip_norm=1.0, b1=0.9, b2=0.95)
    values |= dict(preference="logistic", npo_scale="plain", length_normalised=False)
    values |= dict(adapters="lora", lora_rank=2, lora_alpha=4.0, lora_targets="all")
    values |= dict(mu_dtype="float32", drift=0.0, balance_steps=False)
    return fitting.Settings(**values | dict(save_every=2, keep=2, seed=5) | changes)


def fit(model, directory, *, examples=None, progress=quiet, on_drop=None, pauses=None, **changes):
    """`fit.fit` in `directory`: checkpoints/ and metrics.jsonl."""
    return fitting.fit(
        model,
        conversations() if examples is None else examples,
        settings(**changes),
        encoder=encoder(),
        directory=directory / "checkpoints",
        metrics_path=directory / "metrics.jsonl",
        on_drop=on_drop,
        progress=progress,
        pauses=pauses,
    )
