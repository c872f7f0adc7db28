"""Scores of conflicts along the gradient of the gold batch, at M_ref or at later weights.

Legend: n examples, G tangents.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import (
    batches,
    curvature,
    encoding,
    fit,
    impact,
    logprobs,
    methods,
    metrics,
    packing,
    records,
    sharding,
)
from trace_jax.evaluate import statistics
from trace_jax.stages import context

_BY_LOSS = {
    "jvp_losses": impact.loss_derivatives,
    "vmap_grad": impact.per_example_gradient_dots,
}


class Scores(NamedTuple):
    """<g_J, g_i> of n examples of unit weight.

    along_J: [n]. checked: indices of k examples, scored along both halves of the gold batch as
    well: halves [k, 2], whose mean is along_J. solved: how conjugate gradients went.
    """

    along_J: np.ndarray
    checked: np.ndarray
    halves: np.ndarray
    solved: list[dict]

    def stability(self, of: np.ndarray) -> float:
        """Rank correlation of the halves' scores, over those checked of examples `of` [n] bool."""
        halves = self.halves[of[self.checked]]
        return statistics.spearman(halves[:, 0], halves[:, 1])


def scores(
    run: context.Context,
    examples: Sequence[methods.Example],
    encoded: Sequence[encoding.Encoded],
    gold: Sequence[methods.Example],
    module: nnx.Module | None = None,
) -> Scores:
    """Scores of `examples`.

    module: theta now, adapters beside the kernels; None is M_ref. Both gradients of a score are
    taken there, and logratios are against M_ref. Away from M_ref the closed form of path jvp does
    not hold, and jvp_losses takes its place.
    """
    settings, config = run.settings("train"), run.config.impact
    path = config.path
    if module is None:
        module = fit.adapted(run.ref, settings)
    elif path == "jvp":
        path = "jvp_losses"
    graphdef, params, frozen = nnx.split(module, fit.trainable(settings), ...)
    row_length = run.config.data.row_length or batches.longest_row(encoded)
    gradients = _gold_gradients(run, gold, graphdef, params, frozen, row_length)
    tangents = [_mean(gradients), gradients[0]]
    del gradients
    tangents, solved = _tangents(run, tangents, examples, encoded, graphdef, params, frozen)
    of_path = _by_response if path == "jvp" else functools.partial(_by_example, path=path)
    some = min(config.reliability_examples or len(examples), len(examples))
    rng = np.random.default_rng([run.config.seed, 0x4A1F])
    checked = np.sort(rng.permutation(len(examples))[:some])
    along_J, along_A = of_path(
        run, examples, encoded, checked, tangents, (graphdef, params, frozen)
    )
    # By linearity: the whole batch is the mean of its halves.
    halves = np.stack([along_A, 2 * along_J[checked] - along_A], axis=1)
    steps = [{k: v for k, v in vars(s).items() if k != "tangent"} for s in solved]
    return Scores(along_J, checked, halves, steps)


def _gold_gradients(
    run: context.Context, gold, graphdef, params, frozen, row_length: int
) -> list[nnx.State]:
    """g_J of each half of the gold batch, by one program where they are equal in number."""
    encoded = [run.encoder.encode(e.prompt, [e.y0, e.y1], e.record_id) for e in gold]
    row_length = max(row_length, batches.longest_row(encoded))
    ref = _reference(run, encoded, row_length)
    halves = [(gold[k::2], encoded[k::2], ref[k::2]) for k in range(min(2, len(gold)))]
    settings = run.settings("train")
    hyper = settings.hyper()._replace(beta=jnp.float32(run.config.impact.gold_beta))
    found = []
    for (half, *_), batch in zip(halves, _whole_batches(run, halves, row_length), strict=True):
        options = dataclasses.replace(
            settings.options(), preference="logistic", n_conflict=len(half)
        )
        step = sharding.place_rows(batches.Step(batch, None))
        found.append(
            impact.objective_gradient(
                params, frozen, step, hyper, graphdef=graphdef, options=options
            )
        )
    return found


@jax.jit
def _mean(gradients: list[nnx.State]) -> nnx.State:
    return jax.tree.map(lambda *g: sum(g) / len(g), *gradients)


def _whole_batches(run: context.Context, parts: Sequence, row_length: int) -> list[batches.Batch]:
    """Parts (examples, encoded, ref), each as one batch; all laid out as the largest needs it."""
    plans = [
        packing.PackPlan(
            [e.row_length for e in encoded],
            np.arange(len(examples))[None],
            row_length=row_length,
            micro_rows=run.config.impact.micro_rows * sharding.shards_in_context(),
        )
        for examples, encoded, _ in parts
    ]
    layout = dataclasses.replace(
        plans[0].layout,
        slots=max(plan.layout.slots for plan in plans),
        micro_batches=max(plan.layout.micro_batches for plan in plans),
    )
    for plan in plans:
        plan.layout = layout
    return [
        batches.StepSource(plan, encoded, examples, ref)[0]
        for plan, (examples, encoded, ref) in zip(plans, parts, strict=True)
    ]


def _reference(run: context.Context, encoded, row_length: int) -> np.ndarray:
    """log p of both responses under M_ref, [n, 2]."""
    return logprobs.of_texts(
        run.ref, encoded, row_length=row_length, micro_rows=run.config.impact.micro_rows
    )


def _tangents(
    run: context.Context, gradients, examples, encoded, graphdef, params, frozen
) -> tuple[list[nnx.State], list[curvature.Solved]]:
    """What scores are taken along: the gradients, or (H + damping)^-1 of them."""
    config, settings = run.config.impact, run.settings("train")
    if config.curvature == "identity":
        return gradients, []
    rng = np.random.default_rng([run.config.seed, 0xC0BE])
    chosen = sorted(rng.permutation(len(examples))[: config.curvature_examples])
    used, texts = [examples[i] for i in chosen], [encoded[i] for i in chosen]
    row_length = batches.longest_row(texts)
    ref = _reference(run, texts, row_length)
    arguments = {"graphdef": graphdef, "options": settings.options()}
    if config.curvature == "fisher_diag":
        diagonal = None
        layout, groups = _one_a_row(range(len(used)), row_length, config.micro_rows)
        with run.progress(len(used), "diagonal Fisher") as bar:
            for group in groups:
                batch = batches.make_batch(group, layout, texts, used, ref)
                squares = curvature.squared_gradients(
                    params, frozen, sharding.place_rows(batch), settings.hyper(), **arguments
                )
                diagonal = squares if diagonal is None else jax.tree.map(
                    jnp.add, diagonal, squares)  # fmt: skip
                bar.advance(len(group))
        return [curvature.by_diagonal(g, diagonal, damping=config.damping) for g in gradients], []
    (batch,) = _whole_batches(run, [(used, texts, ref)], row_length)
    step = sharding.place_rows(batches.Step(batch, None))
    arguments["options"] = dataclasses.replace(settings.options(), n_conflict=len(used))

    def product(vector: nnx.State) -> nnx.State:
        return curvature.hessian_vector_product(
            params, vector, frozen, None, step, settings.hyper(), **arguments
        )

    solved = []
    for g in gradients:
        found = curvature.conjugate_gradients(
            product,
            g,
            damping=config.damping,
            iterations=config.cg_iterations,
            tolerance=config.cg_tolerance,
        )
        metrics.say(
            f"  conjugate gradients: residual {found.residual:.2g} after {found.iterations} "
            f"products, damping {found.damping:.2g} ({found.restarts} restarts)"
        )
        solved.append(found)
    return [s.tangent for s in solved], solved


def _one_a_row(chosen: Sequence[int], row_length: int, micro_rows: int) -> logprobs.Packed:
    """Examples one a row."""
    layout = packing.Layout(micro_rows * sharding.shards_in_context(), row_length, 1, 1)
    rows = [[int(i)] for i in chosen]
    groups = [rows[i : i + layout.n_rows] for i in range(0, len(rows), layout.n_rows)]
    return logprobs.Packed(layout, groups)


def _by_response(
    run: context.Context, examples, encoded, checked: np.ndarray, tangents: list, model: tuple
) -> tuple[np.ndarray, np.ndarray]:
    """Path jvp: one derivative per unique (prompt, response), then the closed form."""
    keys, texts = unique_responses(run.encoder, examples)
    packed = logprobs.packed_groups(
        texts,
        row_length=run.config.data.row_length,
        micro_rows=run.config.impact.micro_rows,
        flops=run.ref.position_flops(max(e.row_length for e in texts)),
    )
    few = [examples[i] for i in checked]
    wanted = {_key(e.prompt, y) for e in few for y in (e.y0, e.y1) if y is not None}
    some = [i for i, of_row in enumerate(keys) if wanted.intersection(of_row)]
    passes = ((examples, packed), (few, logprobs.some_of(packed, texts, some)))
    found = []
    with run.progress(len(texts) + len(some), "impact scores") as bar:
        for scored, groups in passes:  # a tangent is as large as the model: none is held longer
            tangents_G = jax.tree.map(lambda g: g[None], tangents.pop(0))
            of_pass = (*model, tangents_G)
            found.append(
                by_response(
                    scored, keys, texts, groups, of_pass, run.settings("train"), bar.advance
                )
            )
            del tangents_G, of_pass
    return found[0], found[1]


def by_response(
    examples: Sequence[methods.Example],
    keys: Sequence[Sequence[str]],
    encoded: Sequence[encoding.Encoded],
    packed: logprobs.Packed,
    model: tuple,
    settings: fit.Settings,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Scores of examples along a tangent at theta_ref, [n].

    keys, encoded: of `unique_responses`; packed holds at least those of the examples. model:
    (graphdef, params, frozen, tangents_G with G = 1).
    """
    graphdef, params, frozen, tangents_G = model

    def compute(rows: batches.Rows, n_responses: int):
        return impact.response_derivatives(
            params, frozen, tangents_G, rows, graphdef=graphdef, n_responses=n_responses
        )

    d_n2 = logprobs.map_packed(compute, encoded, packed, progress)[..., 0]
    d = {key: d_n2[i, b] for i, of_row in enumerate(keys) for b, key in enumerate(of_row)}
    n_tokens = {
        key: len(encoded[i].branches[b]) - encoded[i].skip[b]
        for i, of_row in enumerate(keys)
        for b, key in enumerate(of_row)
    }
    options = settings.options()

    def scored(e: methods.Example) -> np.ndarray:
        k0 = _key(e.prompt, e.y0)
        k1 = k0 if e.y1 is None else _key(e.prompt, e.y1)
        return impact.score(
            e,
            d[k0],
            d[k1],
            options=options,
            beta=settings.beta,
            tau=settings.tau,
            lengths=(n_tokens[k0], n_tokens[k1]),
        )

    return np.array([scored(e) for e in examples])


def unique_responses(
    encoder: encoding.Encoder, examples: Sequence[methods.Example]
) -> tuple[list[list[str]], list[encoding.Encoded]]:
    """Every (prompt, response) once, two of a prompt to a row: their keys and tokens."""
    by_prompt: dict[str, dict[str, tuple]] = {}
    for e in examples:
        responses = by_prompt.setdefault(records.content_id(e.prompt), {})
        for y in (e.y0, e.y1):
            if y is not None:
                responses[_key(e.prompt, y)] = (e.prompt, y, e.record_id)
    keys, encoded = [], []
    for responses in by_prompt.values():
        items = list(responses.items())
        for pair in (items[i : i + 2] for i in range(0, len(items), 2)):
            keys.append([key for key, _ in pair])
            prompt, _, name = pair[0][1]
            encoded.append(encoder.encode(prompt, [y for _, (_, y, _) in pair], name))
    return keys, encoded


def _key(prompt: records.Text, response: records.Text) -> str:
    return records.content_id(prompt, response)


def _by_example(
    run: context.Context,
    examples,
    encoded,
    checked: np.ndarray,
    tangents: list,
    model: tuple,
    *,
    path: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Paths jvp_losses and vmap_grad: derivatives of the per-example losses themselves."""
    graphdef, params, frozen = model
    config, settings = run.config, run.settings("train")
    row_length = batches.longest_row(encoded)
    ref = _reference(run, encoded, row_length)
    if path == "vmap_grad":
        whole_rows = nnx.merge(*model)  # vmap would compute every branch of a choice of keys
        whole_rows.attention_block = 0
        graphdef = nnx.split(whole_rows, fit.trainable(settings), ...)[0]
        packed = _one_a_row(range(len(encoded)), row_length, config.impact.micro_rows)
        some = _one_a_row(checked, row_length, config.impact.micro_rows)
    else:
        packed = logprobs.packed_groups(
            encoded,
            row_length=0,
            micro_rows=config.impact.micro_rows,
            flops=run.ref.position_flops(max(e.row_length for e in encoded)),
        )
        some = logprobs.some_of(packed, encoded, checked)
    found = []
    with run.progress(len(encoded) + len(checked), "impact scores") as bar:
        for tangent, (layout, groups) in zip(tangents, (packed, some), strict=True):
            out = np.zeros(len(encoded))
            for group in groups:
                batch = batches.make_batch(group, layout, encoded, examples, ref)
                values = _BY_LOSS[path](
                    params,
                    frozen,
                    tangent,
                    sharding.place_rows(batch),
                    settings.hyper(),
                    graphdef=graphdef,
                    options=settings.options(),
                )
                flat = np.asarray(values).reshape(layout.n_rows, layout.slots)
                for r, members in enumerate(group):
                    out[members] = flat[r, : len(members)]
                bar.advance(sum(len(members) for members in group))
            found.append(out)
    return found[0], found[1][checked]
