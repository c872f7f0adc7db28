"""A model by its directory, ready to be asked: for evaluations that need no run."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from trace_jax import encoding, metrics, model_folder, respond, sharding
from trace_jax.errors import InputError
from trace_jax.models import hf_weights


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
      name: what tables call it.
      module, tokenizer, stop_ids: the model, and which tokens end its answers.
      mesh: the devices it lies on, None for one.
    """

    name: str
    module: nnx.Module
    tokenizer: Any
    stop_ids: tuple[int, ...]
    mesh: Any

    @contextlib.contextmanager
    def devices(self):
        """With the mesh in context, for everything that computes."""
        import jax

        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            yield

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def answers(
        self, prompts: Sequence[tuple[str, str]], *, max_new_tokens: int, batch_rows: int
    ) -> list[str]:
        """Greedy answers to (id, prompt)s."""
        limit = self.module.config.max_position_embeddings
        if max_new_tokens >= limit:
            raise InputError(f"--max-new-tokens={max_new_tokens}: {self.name} has {limit} in all")
        encoder = encoding.Encoder(self.tokenizer, max_length=limit, end_id=None)
        asked = [
            respond.Prompt(i, [{"role": "user", "content": x}] if self.is_chat else x)
            for i, x in prompts
        ]
        with self.devices(), metrics.progress(len(asked), f"{self.name}: answers") as bar:
            found = respond.respond(
                self.module,
                asked,
                encoder,
                seed=0,
                samples=1,
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                stop_ids=self.stop_ids,
                batch_rows=batch_rows,
                progress=bar.advance,
            )
        return [of_prompt[0] for of_prompt in found]


def load(text: str, dtype: str, stop_ids: Sequence[int] = ()) -> Subject:
    """The model of "NAME=DIRECTORY" or "DIRECTORY" (or a name on the hub), over all devices."""
    import jax

    from trace_jax import models

    name, _, path = text.rpartition("=")
    directory = model_folder.resolve(path)
    name = name or directory.name
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1) if jax.device_count() > 1 else None
    module = models.load(directory, dtype=dtype, mesh=mesh)
    tokenizer = encoding.load_tokenizer(directory)
    hf_weights.check_tokenizer(module.config, tokenizer)
    known = [*module.config.eos_token_ids, tokenizer.eos_token_id]
    stops = tuple(stop_ids) or tuple(dict.fromkeys(i for i in known if i is not None))
    if not stops:
        raise InputError(f"{directory}: neither config nor tokenizer names an EOS; give --stop-ids")
    return Subject(name, module, tokenizer, stops, mesh)
