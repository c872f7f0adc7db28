"""What `bench.profile` measures in a process, and how a trace is put down to functions."""

import collections
import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import transformers
from flax import nnx

from bench import training
from trace_jax import batches, encoding, logprobs, methods, models, sharding, train
from trace_jax import impact as impact_lib
from trace_jax.stages import scoring

LENGTH = 128  # of the impact pass
# The first whose file or function is in an operation's stack says what it belongs to.
PLACES = {
    "attention": ("block_attention.py", "attention.py"),
    "head and loss": ("losses.py", "logits"),
    "MLP, attention's output": ("finish",),
    "queries, keys, values": ("qkv",),
    "other of the layers": ("hidden",),
    "losses and sums of gradients": ("gradient", "response_derivatives"),
    "optimizer": ("train_step",),
}
CONTAINERS = ("while", "call", "conditional")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)")
_NAME = re.compile(r'^(\d+) "(.*)"')
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\(")
_STACK = re.compile(r"stack_frame_id=(\d+)")


def owners(text: str) -> dict[str, str]:
    """Instruction -> what it belongs to, of a compiled program's text; loops and calls left out."""
    tables: dict[str, dict[int, tuple]] = collections.defaultdict(dict)
    section, found = "", {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif match := (_FRAME.match(line) or _LOCATION.match(line) or _NAME.match(line)):
            tables[section][int(match[1])] = match.groups()[1:]
        elif match := _INSTRUCTION.match(line):
            if match[2] not in CONTAINERS:
                stack = _STACK.search(line)
                found[match[1]] = _owner(tables, int(stack[1])) if stack else "copies and loops"
    return found


def _owner(tables: Mapping[str, dict], frame: int) -> str:
    names = []
    while True:
        location, parent = map(int, tables["StackFrames"][frame])
        file, function = map(int, tables["FileLocations"][location])
        names += [tables["FileNames"][file][0], tables["FunctionNames"][function][0]]
        if parent in (0, frame):
            break
        frame = parent
    for owner, places in PLACES.items():
        if any(name.endswith(place) for name in names for place in places):
            return owner
    return "other"


@contextlib.contextmanager
def traced(into: dict[str, float], program: str, text: str) -> Iterator[None]:
    """Adds up seconds of the program's operations by what they belong to."""
    belongs = owners(text)
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            yield
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == program and stats.get("hlo_op") in belongs:
                    owner = belongs[stats["hlo_op"]]
                    into[owner] = into.get(owner, 0.0) + event.duration_ns / 1e9


class Clock:
    """Seconds and memory by what was done since the last mark."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.gib_after: dict[str, float] = {"imports": resident_gib()}
        self._last = time.perf_counter()

    def mark(self, what: str) -> None:
        """Says what the time since the last mark was."""
        now = time.perf_counter()
        self.seconds[what], self._last = now - self._last, now
        self.gib_after[what] = resident_gib()


def resident_gib() -> float:
    """Memory of this process now."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 2**20


def _shares(by_owner: dict[str, float], wall: float) -> tuple[dict[str, float], float]:
    total = sum(by_owner.values())
    shares = {owner: seconds / total for owner, seconds in by_owner.items()}
    return shares, total / (wall * jax.device_count())


def training_run(model: Path, rows: list[dict], steps: int) -> dict:
    """Of the train step on `bench.trl`'s pairs, 8 a step."""
    # A commit before may have no loader of its own.
    load = getattr(encoding, "load_tokenizer", transformers.AutoTokenizer.from_pretrained)
    tokenizer, clock = load(model), Clock()
    run = training.prepared(model, rows, 8, balanced=True, tokenizer=tokenizer, mark=clock.mark)
    made = run.source[0]
    clock.mark("batch of a step")
    placed = sharding.place_rows(made)
    clock.mark("place it")
    arguments, named = run.arguments(run.state, placed)
    lowered = train.train_step.lower(*arguments, **named)
    clock.mark("trace and lower the step")
    compiled = lowered.compile()
    clock.mark("compile it")
    state, _ = jax.block_until_ready(compiled(*arguments))
    clock.mark("first step")
    by_owner: dict[str, float] = {}
    took = []
    for traced_step in (False, True):
        with contextlib.ExitStack() as stack:
            if traced_step:
                stack.enter_context(traced(by_owner, "jit_train_step", compiled.as_text()))
            for _ in range(steps):
                start = time.perf_counter()
                arguments, _ = run.arguments(state, placed)
                state, _ = jax.block_until_ready(compiled(*arguments))
                took.append(time.perf_counter() - start)
    clock.mark("steps")
    alone = float(np.median(took[:steps]))
    clock.seconds["a step"] = alone
    loop, n = training.Loop(run.arguments), min(steps + 1, len(run.source))
    train.loop(
        state, run.source.iterator(0, n), loop.step_fn, start=0, total_steps=n,
        record_ids=run.source.record_ids, on_metrics=loop.on_metrics,
        save=lambda step, state: None, save_every=n + 1,
    )  # fmt: skip
    clock.mark("loop")
    shares, busy = _shares(by_owner, sum(took[steps:]))
    layout = run.plan.layout
    positions = layout.n_rows * layout.row_length
    texts = [e.row_length for e in run.texts]
    flops = 3 * positions * run.config.forward_flops(layout.row_length)
    memory = compiled.memory_analysis()
    return {
        "seconds": clock.seconds,
        "gib_after": clock.gib_after,
        "shares": shares,
        "devices": jax.device_count(),
        "figures": {
            "in_operations": busy,
            "starved_steps": loop.starved,
            "real_token_share": run.plan.real_token_share(texts),
            "gflops_a_second": flops / alone / 1e9,
            "gflops_a_second_of_matmul": matmul_speed() / 1e9,
            "gib_temporaries": memory.temp_size_in_bytes / 2**30,
            "gib_arguments": memory.argument_size_in_bytes / 2**30,
        },
    }


def matmul_speed(n: int = 1024, repeats: int = 5) -> float:
    """FLOPs a second of a float32 product of n x n on one device: what the machine can do."""
    times = jax.jit(lambda a, b: a @ b)
    a = jax.random.normal(jax.random.key(0), (n, n))
    jax.block_until_ready(times(a, a))
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(times(a, a))
        took.append(time.perf_counter() - start)
    return 2 * n**3 / min(took)


def impact_run(model: Path, rows: list[dict], repeats: int) -> dict:
    """Of the stage's way from texts to directional derivatives, every response once."""
    tokenizer, clock = transformers.AutoTokenizer.from_pretrained(model), Clock()
    jax.set_mesh(sharding.make_mesh(1, -1, 1))  # for the rest of the process
    module = models.load(model, mesh=sharding.current())
    module.remat = "none"
    graphdef, params, frozen = nnx.split(module, nnx.Param, ...)
    tangents = jax.tree.map(lambda p: p[None], params)  # any direction costs the same
    clock.mark("load")
    examples = [
        methods.Example(str(i), "INVERT", r["prompt"], r["chosen"], r["rejected"], pref=1.0)
        for i, r in enumerate(rows)
    ]
    encoder = encoding.Encoder(tokenizer, max_length=LENGTH, end_id=None, cut_responses=True)
    _, texts = scoring.unique_responses(encoder, examples)
    clock.mark("tokenise")
    packed = logprobs.packed_groups(
        texts, row_length=0, micro_rows=4,
        flops=module.position_flops(max(e.row_length for e in texts)),
    )  # fmt: skip
    layout, groups = packed
    clock.mark("pack")
    placed = [sharding.place_rows(batches.make_batch(g, layout, texts).rows) for g in groups]
    clock.mark("make batches")
    arguments = (params, frozen, tangents)
    fixed = {"graphdef": graphdef, "n_responses": 2 * layout.slots}
    lowered = impact_lib.response_derivatives.lower(*arguments, placed[0], **fixed)
    clock.mark("trace and lower")
    compiled = lowered.compile()
    clock.mark("compile")

    def whole() -> float:
        start = time.perf_counter()
        jax.block_until_ready([compiled(*arguments, rows) for rows in placed])
        return time.perf_counter() - start

    whole()
    alone = float(np.median([whole() for _ in range(repeats)]))
    by_owner: dict[str, float] = {}
    with traced(by_owner, "jit_response_derivatives", compiled.as_text()):
        wall = whole()
    clock.mark("all passes")
    clock.seconds["a pass over the pairs"] = alone
    shares, busy = _shares(by_owner, wall)
    positions = len(groups) * layout.n_rows * layout.row_length
    flops = 3 * positions * module.config.forward_flops(layout.row_length)
    _, pairs = batches.encode_examples(encoder, examples)
    longest = [len(e.prompt) + max(map(len, e.branches)) for e in pairs]
    of_torch = sum(3 * 2 * n * module.config.forward_flops(n) for n in longest)
    memory = compiled.memory_analysis()
    return {
        "seconds": clock.seconds,
        "gib_after": clock.gib_after,
        "shares": shares,
        "devices": jax.device_count(),
        "figures": {
            "in_operations": busy,
            "pairs_per_second": len(rows) / (alone + clock.seconds["tokenise"]),
            "real_token_share": sum(e.row_length for e in texts) / positions,
            "positions_a_pair": positions / len(rows),
            "positions_a_pair_of_torch": 2 * float(np.mean(longest)),
            "gflops_a_second": flops / alone / 1e9,
            "gflops_a_second_of_matmul": matmul_speed() / 1e9,
            "speedup_at_equal_gflops": of_torch / flops,
            "gib_temporaries": memory.temp_size_in_bytes / 2**30,
        },
    }
