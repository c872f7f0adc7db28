"""Writers of corrections y_c: the model being re-aligned, another local model, or Gemini.

Whoever writes, the judge of the new policy has the last word (stages/correct.py).
"""

from collections.abc import Sequence
from typing import Protocol

from trace_jax import respond

SOURCES = ("self", "local", "gemini", "none")


class Writer(Protocol):
    """Proposes responses to prompts.

    Attributes:
      name: for messages.
    """

    name: str

    def write(
        self, prompts: Sequence[respond.Prompt], *, first: int, n: int
    ) -> list[list[str | None]]:
        """Proposals number `first` to `first` + n - 1 for every prompt; "" where there is none.

        None where asking failed after every try. The same numbers give the same proposals again,
        also after a restart, and ask for those that failed once more.

        Raises:
          InputError: nothing can be written any more; what was paid for is kept.
        """
        ...

    def price(self) -> float:
        """US dollars of all proposals so far, those before a restart too."""
        ...
