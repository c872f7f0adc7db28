"""Proposals sampled from a model at hand: by rejection, or by instruction."""

from collections.abc import Callable, Sequence
from typing import Any

from trace_jax import respond


class SampledWriter:
    """Samples from a model; each proposal depends on (seed, prompt id, its number) only.

    Args:
      name: for messages.
      module: the model. encoder: its texts to tokens.
      as_asked: prompt -> what the model is asked; None: the prompt itself.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        encoder: Any,
        *,
        seed: int,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        batch_rows: int,
        as_asked: Callable[[Any], Any] | None = None,
    ):
        self.name, self._module, self._encoder, self._as_asked = name, module, encoder, as_asked
        self._sampling = {
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stop_ids": tuple(stop_ids),
            "batch_rows": batch_rows,
        }

    def write(self, prompts: Sequence[respond.Prompt], *, first: int, n: int) -> list[list[str]]:
        """See `writers.Writer`."""
        if self._as_asked is not None:
            prompts = [respond.Prompt(p.id, self._as_asked(p.prompt)) for p in prompts]
        return respond.respond(
            self._module, prompts, self._encoder, samples=n, first_sample=first, **self._sampling
        )

    def price(self) -> float:
        """Nothing."""
        return 0.0
