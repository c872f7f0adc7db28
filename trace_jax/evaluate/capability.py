"""General capability through EleutherAI's lm-evaluation-harness, over our own model.

`HarnessModel` is a `TemplateLM`: the harness makes the requests and the metrics. Log-likelihoods
are those of the harness's own Hugging Face backend (tests hold them together). Needs the extra
`eval`; nothing else of the package imports lm_eval.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from trace_jax import batches, encoding, logprobs, losses, metrics, sampling, sharding
from trace_jax.errors import InputError
from trace_jax.evaluate import statistics

Request = tuple[Any, list[int], list[int]]  # the texts, context tokens, continuation tokens


class HarnessModel(TemplateLM):
    """A decoder of ours as the harness asks it.

    Args:
      module: the decoder.
      tokenizer: its transformers tokenizer.
      stop_ids: tokens that end a generation.
      max_length: most tokens of context and continuation; 0: what the model was made for.
      batch_rows: sequences decoded at once.
      micro_rows: packed rows of the likelihood pass computed at once.
    """

    backend = "causal"

    def __init__(
        self,
        module: nnx.Module,
        tokenizer,
        *,
        stop_ids: Sequence[int],
        max_length: int = 0,
        batch_rows: int = 64,
        micro_rows: int = 4,
    ):
        super().__init__()
        self.module, self.tokenizer, self._stop_ids = module, tokenizer, tuple(stop_ids)
        self.max_length = max_length or module.config.max_position_embeddings
        self._batch_rows, self._micro_rows = batch_rows, micro_rows

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text scored without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; special tokens as the tokenizer adds them, but no second BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            if bos and string.startswith(bos):
                return self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
            return self.tokenizer.encode(string, verbose=False)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, is it what greedy decoding gives) of every request."""
        encoded, places = _by_context([self._fitting(c, y) for _, c, y in requests])
        graphdef, state = nnx.split(self.module)
        with metrics.progress(len(encoded), "log-likelihoods") as bar:
            found = logprobs.map_packed(
                lambda rows, n: _scores(graphdef, state, rows, n),
                encoded,
                logprobs.roomy_groups(
                    encoded, row_length=batches.longest_row(encoded), micro_rows=self._micro_rows
                ),
                bar.advance,
            )
        return [(float(found[i, b, 0]), bool(found[i, b, 1] == 0)) for i, b in places]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[tuple, tuple]:
        """The last max_length + 1 tokens, cut from the left of the context as the harness does."""
        room = max(1, self.max_length + 1 - len(continuation))
        return tuple(context[-room:]), tuple(continuation)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of max_length."""
        windows, counts = [], []
        for request in requests:
            of_text = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [(None, *utils.make_disjoint_window(window)) for window in of_text]
            windows += made
            counts.append(len(made))
        values = iter(self._loglikelihood_tokens(windows)) if windows else iter(())
        return [sum(next(values)[0] for _ in range(n)) for n in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop sequence; groups of equal settings are decoded together."""
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        out = [""] * len(requests)
        for members in groups.values():
            texts = [requests[i].args[0] for i in members]
            for i, text in zip(members, self._generate(texts, requests[members[0]].args[1]),
                               strict=True):  # fmt: skip
                out[i] = text
        return out

    def check_room(self, new_tokens: int, task: str) -> int:
        """Tokens left for the context; InputError where there are none."""
        room = self.max_length - new_tokens
        if room <= 0:
            raise InputError(
                f"{task} wants {new_tokens} new tokens, the model takes {self.max_length} in all; "
                "leave the task out, or set its max_gen_toks"
            )
        return room

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new = int(settings.get("max_gen_toks", 256))
        sampled = settings.get("do_sample", False)
        temperature = float(settings.get("temperature", 1.0)) if sampled else 0.0
        room = self.check_room(new, "a task")
        prompts = [self.tok_encode(text)[-room:] for text in contexts]
        with metrics.progress(len(prompts), "generations") as bar:
            found = sampling.generate(
                self.module,
                prompts,
                ids=[str(i) for i in range(len(prompts))],
                seed=0,
                samples=1,
                max_new_tokens=new,
                temperature=temperature,
                stop_ids=self._stop_ids,
                batch_rows=self._batch_rows,
                progress=bar.advance,
            )
        texts = [self.tokenizer.decode(s.tokens, skip_special_tokens=True) for (s,) in found]
        return [_cut(text, until) for text in texts]


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def _by_context(
    pairs: Sequence[tuple[tuple, tuple]],
) -> tuple[list[encoding.Encoded], list[tuple[int, int]]]:
    """Two continuations of one context share a row; and where each request went, (row, branch)."""
    open_rows: dict[tuple, int] = {}
    contexts: list[tuple] = []
    branches: list[list[tuple]] = []
    places = []
    for context, continuation in pairs:
        row = open_rows.pop(context, None)
        if row is None:
            row = open_rows[context] = len(contexts)
            contexts.append(context)
            branches.append([])
        branches[row].append(continuation)
        places.append((row, len(branches[row]) - 1))
    encoded = [
        encoding.Encoded(context, tuple(of), (0,) * len(of))
        for context, of in zip(contexts, branches, strict=True)
    ]
    return encoded, places


@functools.partial(jax.jit, static_argnames=("graphdef", "n_responses"))
def _scores(graphdef, state, rows: batches.Rows, n_responses: int) -> jax.Array:
    """[M, R, n_responses, 2]: log p of a response, and how far its tokens are below the largest."""
    module = nnx.merge(graphdef, state)

    def of(values: Callable, hidden: jax.Array, micro: batches.Rows) -> jax.Array:
        found = values(
            module.logits, hidden, micro.targets, logprobs.counted(micro, n_responses),
            module.head_chunk,
        )  # fmt: skip
        return logprobs.sum_by_response(found, micro.responses, n_responses)

    def both(micro: batches.Rows) -> jax.Array:
        hidden = logprobs.hidden(module, micro)
        found = [of(f, hidden, micro) for f in (losses.token_logprobs, losses.token_shortfalls)]
        return jnp.stack(found, axis=-1)

    return sharding.replicated(logprobs.of_filled(rows, both))


def paired(a: Sequence[dict], b: Sequence[dict], metric: str) -> dict[str, Any]:
    """Mean difference of a metric over the documents both were asked, with its 95 % interval.

    Rows of one filter: a document of both once. A bootstrap over documents; `newcombe` where they
    all differ by the same, if the metric is a rate.
    """
    of_b = {row["doc_id"]: row[metric] for row in b}
    pairs = [(row[metric], of_b[row["doc_id"]]) for row in a if row["doc_id"] in of_b]
    values = np.array(pairs, np.float64)
    difference, n = values[:, 0] - values[:, 1], len(pairs)
    if statistics.all_equal(difference) and values.min() >= 0 and values.max() <= 1:
        low, high = statistics.newcombe(*(float(x) for x in values.mean(axis=0)), n)
    else:
        rng = np.random.default_rng(0)
        means = difference[rng.integers(0, n, (2000, n))].mean(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "n": n}
