"""The paper's procedure in PyTorch: one backward pass a record, dotted with g_J."""

import os
from typing import Any

import numpy as np
import torch
import transformers

from bench import impact_ours
from trace_jax.models import lora

LINEARS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
           "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
           "down": "mlp.down_proj"}  # fmt: skip


class Adapted(torch.nn.Module):
    """A frozen linear map with low-rank factors beside it, as `trace_jax.models.lora` adds them."""

    def __init__(self, linear: torch.nn.Linear, a: np.ndarray, b: np.ndarray, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = (torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in (a, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and its low-rank update."""
        return self.linear(x) + x @ self.a @ self.b * self.scale


def network(p: impact_ours.Problem) -> Any:
    """transformers' model, with the same adapters as ours."""
    found = transformers.AutoModelForCausalLM.from_pretrained(p.folder, dtype=torch.float32)
    if p.adapters == "none":
        return found
    found.requires_grad_(False)
    ours = impact_ours.adapted(p)
    for name in lora.TARGETS:
        linear = getattr(ours.layers, name)
        for i, layer in enumerate(found.model.layers):
            block, _, attribute = LINEARS[name].partition(".")
            block = getattr(layer, block)
            factors = (linear.lora_a[...][i], linear.lora_b[...][i], linear.lora_scale)
            setattr(block, attribute, Adapted(getattr(block, attribute), *factors))
    return found


def way(p: impact_ours.Problem) -> impact_ours.Way:
    """Both responses of a record as one batch of two, backward, dot with g_J; on all cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    _, _, texts = impact_ours.encoded(p)
    model = network(p)
    trained = [w for w in model.parameters() if w.requires_grad]
    inputs = [_padded(e) for e in texts[: p.slow]]
    with torch.no_grad():
        references = [_logps(model, *one) for one in inputs]

    def backward(i: int) -> None:
        ratio = _logps(model, *inputs[i]) - references[i]
        loss = -torch.nn.functional.logsigmoid(impact_ours.BETA * (ratio[0] - ratio[1]))
        loss.backward()

    def gold() -> list[torch.Tensor]:
        model.zero_grad()
        for i in range(len(inputs)):
            backward(i)
        return [w.grad / len(inputs) for w in trained]

    g_J = gold()

    def score() -> np.ndarray:
        found = []
        for i in range(len(inputs)):
            model.zero_grad()
            backward(i)
            found.append(sum(float((w.grad * g).sum()) for w, g in zip(trained, g_J, strict=True)))
        return np.array(found)

    return impact_ours.Way(score, gold)


def _padded(e: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both texts of a pair [2, L] and which of their tokens count."""
    whole = [[*e.prompt, *branch] for branch in e.branches]
    ids = torch.zeros(2, max(map(len, whole)), dtype=torch.long)
    counted = torch.zeros(ids.shape)
    for b, tokens in enumerate(whole):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        counted[b, len(e.prompt) + e.skip[b] : len(tokens)] = 1
    return ids, counted


def _logps(model: Any, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    token = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    return (token * counted[:, 1:]).sum(1)
