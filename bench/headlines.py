"""The headlines of all benchmarks as one table, and those that the README has (`bench.pages`)."""

from collections.abc import Sequence
from pathlib import Path

from trace_jax import records

RESULTS = Path("bench/results")
# file, headline, what it is, what we want of it
ROWS = (
    ("impact", "speedup_vs_torch_loop", "impact stage / PyTorch loop, pairs/s, stories260k", "≥ 5"),
    ("impact", "speedup_vs_torch_loop_each", "the same, repeated responses scored again", ""),
    ("impact", "speedup_vs_torch_loop_16m", "impact stage / PyTorch loop, 16M Llama", "≥ 3"),
    ("impact", "speedup_vs_vmap_grad", "forward mode / vmap(grad), pairs/s, stories260k", ""),
    ("impact", "temp_vs_vmap_grad", "temporaries, forward mode / vmap(grad), 8 pairs", "≤ 0.2"),
    ("impact", "max_relative_error", "largest difference of scores / their rms", "≤ 1e-4"),
    (
        "trl_16m",
        "speedup_vs_trl_default",
        "training throughput vs TRL with default flags, 16M Llama",
        "≥ 3",
    ),
    (
        "trl_16m",
        "speedup_vs_trl_best",
        "training throughput vs TRL with its best flags, 16M Llama",
        "≥ 2",
    ),
    ("trl_16m", "memory_vs_trl", "peak training memory vs TRL's leaner run, 16M Llama", "≤ 0.5"),
    (
        "trl",
        "speedup_vs_trl_default",
        "training throughput vs TRL with default flags, stories260k",
        "≥ 3",
    ),
    (
        "trl",
        "speedup_vs_trl_best",
        "training throughput vs TRL with its best flags, stories260k",
        "≥ 2",
    ),
    ("trl", "memory_vs_trl", "peak training memory vs TRL's leaner run, stories260k", "≤ 0.5"),
    ("trl", "loss_difference", "largest difference of a step's loss, same order", "≤ 1e-3"),
    ("packing", "real_token_share_hh", "real / computed positions, HH", "≥ 0.9"),
    ("packing", "real_token_share_pku", "real / computed positions, PKU-SafeRLHF", "≥ 0.9"),
    ("packing", "real_token_share_xstest", "real / computed positions, XSTest", "≥ 0.9"),
    ("packing", "shared_prefix_saving_hh", "tokens of separate rows / prompts once, HH", "≥ 1.4"),
    ("packing", "train_programs", "compiled train steps in a small run's stage train", "≤ 1"),
    ("packing", "impact_programs", "compiled impact passes in its stage impact", "≤ 1"),
    ("packing", "sampling_programs", "programs of the sampler in the whole run", "≤ 2"),
    ("head", "temp_ratio_256k", "temporaries with gradient, head in chunks / at once", "≤ 0.25"),
    ("head", "time_ratio_256k_forward", "time of log-probs, head in chunks / at once", "≤ 1.15"),
    ("head", "time_ratio_256k_jvp", "the same in forward mode", "≤ 1.15"),
    ("head", "time_ratio_256k", "the same with gradient", "≤ 1.4"),
    ("head", "time_ratio_256k_kl", "the same of KL with gradient", "≤ 1.4"),
    ("sampling", "speedup_vs_transformers", "sampling / transformers' generate, tokens/s", "≥ 3"),
    ("judge", "share_of_server_limit", "verdicts/s / what the server can give, 64 calls", ""),
    ("judge", "share_of_server_limit_256", "the same, 256 calls", ""),
    ("judge", "calls_saved_pku", "calls that repetition saves, PKU-SafeRLHF", ""),
    ("judge", "writes_per_second", "verdicts written to the store a second", ""),
    ("judge", "reads_per_second", "verdicts read from it a second", ""),
    ("judge", "triage_bytes_per_pair", "memory that a pair takes of a triage, bytes", ""),
    (
        "scaling",
        "host_train_strong_flops_8_over_4",
        "a step's compiled FLOPs, 8 CPU devices / 4, as much work",
        "≤ 1.05",
    ),
    (
        "scaling",
        "train_weak_flops_8_over_4",
        "a step's compiled FLOPs a v5p chip, 8 chips / 4, twice the work",
        "≤ 1.05",
    ),
    ("scaling", "train_weak_flops_16_over_8", "the same, 16 chips / 8", "≤ 1.05"),
    (
        "scaling",
        "train_weak_bytes_8_over_4",
        "bytes that a v5p chip receives a step, 8 chips / 4",
        "≤ 1.2",
    ),
    ("scaling", "train_weak_bytes_16_over_8", "the same, 16 chips / 8", "≤ 1.2"),
    ("scaling", "impact_weak_bytes_8_over_4", "the same of an impact pass, 8 chips / 4", "≤ 1.2"),
    ("scaling", "impact_weak_bytes_16_over_8", "the same, 16 chips / 8", "≤ 1.2"),
    (
        "scaling",
        "waited_share_with_overlap",
        "of a step's bytes on 16 chips waited for, with the flags for overlap",
        "",
    ),
    ("growth", "growth_of_seconds", "growth of a stage's time / of its records, at most", "≤ 1.05"),
    (
        "growth",
        "growth_of_memory",
        "growth of a stage's memory above its imports, at most",
        "≤ 1.1",
    ),
    ("growth", "bytes_per_record", "memory that a record takes of a stage, bytes, at most", ""),
    ("startup", "import_seconds", "`import trace_jax`, s", "≤ 0.5"),
    ("startup", "import_launch_seconds", "`import trace_jax.launch`, s", "≤ 0.5"),
    ("startup", "help_seconds", "`--help`, s", "≤ 1"),
    ("startup", "warm_over_cold", "first step, warm / cold compilation cache", "≤ 0.5"),
)


# Those of a README: (file, headline).
_SHORT = (
    ("impact", "speedup_vs_torch_loop"),
    ("impact", "temp_vs_vmap_grad"),
    ("trl_16m", "speedup_vs_trl_default"),
    ("trl_16m", "speedup_vs_trl_best"),
    ("trl_16m", "memory_vs_trl"),
    ("packing", "real_token_share_hh"),
    ("packing", "shared_prefix_saving_hh"),
    ("head", "temp_ratio_256k"),
    ("sampling", "speedup_vs_transformers"),
)


def judge_costs() -> str:
    """Markdown: verdicts a second by calls in flight, and what a store costs by its size."""
    found = records.read_json(RESULTS / "judge.json")
    throughput = [row for row in found["rows"] if row["what"] == "throughput"]
    lines = [
        "| calls in flight | verdicts a second | the server's limit | share |",
        "|---" * 4 + "|",
    ]
    for row in throughput:
        speed, limit = row["verdicts_per_second"], row["server_limit"]
        cells = (f"{row['concurrency']}", f"{speed:.0f}", f"{limit:.0f}", f"{speed / limit:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| verdicts in the store | triaged in, s | MiB |", "|---" * 3 + "|"]
    for row in found["rows"]:
        if row["what"] == "store":
            cells = (f"{2 * row['pairs']:,}", f"{row['seconds']:.1f}", f"{row['mebibytes']:,.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    saved, each = (found["headline"][k] for k in ("calls_saved_pku", "triage_bytes_per_pair"))
    return "\n".join([
        *lines, "",
        f"On PKU pairs repetition saves {saved:.0%} of the calls; a triage holds its records, "
        f"{each / 1024:.1f} KiB a pair (`bench/results/judge.json`, commit {found['commit']}, "
        f"{found['machine']}).",
    ])  # fmt: skip


def in_short() -> str:
    """The rows of a README."""
    return table([row for row in ROWS if row[:2] in _SHORT], folder="bench/results/")


def table(rows: Sequence[tuple[str, str, str, str]] = ROWS, folder: str = "") -> str:
    """Markdown; a headline that was not measured has no row, one measured once no range.

    folder: where links to the result files lead; none: no links.
    """
    lines = ["| what | measured | range | wanted | benchmark |", "|---|---|---|---|---|"]
    for file, name, what, wanted in rows:
        path = RESULTS / f"{file}.json"
        found = records.read_json(path) if path.exists() else {"headline": {}}
        value = found["headline"].get(name)
        if value is None:
            continue
        met = wanted and (
            value >= float(wanted[2:]) if wanted[0] == "≥" else value <= float(wanted[2:])
        )
        mark = "" if met or not wanted else " **missed**"
        between = " to ".join(map(_shown, found.get("ranges", {}).get(name, ())))
        link = f"`bench.{file.partition('_')[0]}`"
        if folder:
            link = f"[{link}]({folder}{path.name})"
        lines.append(f"| {what} | {_shown(value)}{mark} | {between} | {wanted} | {link} |")
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    if value == round(value) or value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
