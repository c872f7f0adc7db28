"""The headlines of all benchmarks as one table, in README.md.

python -m bench.headlines     reads bench/results/*.json and rewrites the table
"""

import sys
from pathlib import Path

from trace_jax import records

README, RESULTS = Path("README.md"), Path("bench/results")
BEGIN, END = "<!-- headlines: python -m bench.headlines -->\n", "<!-- end of headlines -->"
# file, headline, what it is, what we want of it
ROWS = (
    ("impact", "speedup_vs_torch_loop", "impact stage / PyTorch loop, pairs/s, stories260k", "≥ 5"),
    ("impact", "speedup_vs_torch_loop_each", "the same, repeated responses scored again", ""),
    ("impact", "speedup_vs_torch_loop_16m", "impact stage / PyTorch loop, 16M Llama", "≥ 3"),
    ("impact", "temp_vs_vmap_grad", "temporaries, forward mode / vmap(grad), 8 pairs", "≤ 0.2"),
    ("impact", "max_relative_error", "largest difference of scores / their rms", "≤ 1e-4"),
    ("trl_16m", "speedup_vs_trl_default", "training / TRL as it comes, pairs/s, 16M Llama", "≥ 3"),
    ("trl_16m", "speedup_vs_trl_best", "training / TRL with its best flags, 16M Llama", "≥ 2"),
    ("trl_16m", "memory_vs_trl", "peak memory / TRL's smaller one, 16M Llama", "≤ 0.5"),
    ("trl", "speedup_vs_trl_default", "training / TRL as it comes, stories260k", "≥ 3"),
    ("trl", "speedup_vs_trl_best", "training / TRL with its best flags, stories260k", "≥ 2"),
    ("trl", "memory_vs_trl", "peak memory / TRL's smaller one, stories260k", "≤ 0.5"),
    ("trl", "loss_difference", "largest difference of a step's loss, same order", "≤ 1e-3"),
    ("packing", "real_token_share_hh", "real / computed positions, HH", "≥ 0.9"),
    ("packing", "real_token_share_pku", "real / computed positions, PKU-SafeRLHF", "≥ 0.9"),
    ("packing", "real_token_share_xstest", "real / computed positions, XSTest", "≥ 0.9"),
    ("packing", "shared_prefix_saving_hh", "tokens of separate rows / prompts once, HH", "≥ 1.4"),
    ("head", "temp_ratio_256k", "temporaries, head in chunks / at once", "≤ 0.25"),
    ("head", "time_ratio_256k", "time, head in chunks / at once, with gradient", "≤ 1.4"),
    ("sampling", "speedup_vs_transformers", "sampling / transformers' generate, tokens/s", "≥ 3"),
    ("judge", "share_of_server_limit", "verdicts/s / what the server can give", ""),
    ("judge", "calls_saved_pku", "calls that repetition saves, PKU-SafeRLHF", ""),
    ("scaling", "weak_flops_ratio", "FLOPs a v5p chip by its compiler, 16 chips / 8", "≤ 1.05"),
    ("scaling", "weak_bytes_ratio", "bytes a v5p chip receives, the same", "≤ 1.2"),
    ("scaling", "waited_share_with_overlap", "of these waited for, with the flags for overlap", ""),
    ("growth", "growth_of_seconds", "growth of a stage's time / of its records, at most", "≤ 1.05"),
    ("growth", "growth_of_peak_memory", "peak memory, ten times the records", "≤ 1.1"),
    ("startup", "import_seconds", "import without jax, s", "≤ 0.5"),
    ("startup", "help_seconds", "--help, s", "≤ 1"),
    ("startup", "warm_over_cold", "first step, warm / cold compilation cache", "≤ 0.5"),
)


def table() -> str:
    """Markdown; a headline that was not measured has no row."""
    lines = ["| what | measured | wanted | benchmark |", "|---|---|---|---|"]
    for file, name, what, wanted in ROWS:
        path = RESULTS / f"{file}.json"
        value = records.read_json(path)["headline"].get(name) if path.exists() else None
        if value is None:
            continue
        met = wanted and (
            value >= float(wanted[2:]) if wanted[0] == "≥" else value <= float(wanted[2:])
        )
        shown = f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
        mark = "" if met or not wanted else " **missed**"
        script = file.partition("_")[0]
        lines.append(f"| {what} | {shown}{mark} | {wanted} | [`bench.{script}`]({path}) |")
    return "\n".join(lines) + "\n"


def written(readme: str) -> str:
    """The README with the table as it is now."""
    head, _, rest = readme.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def main() -> int:
    """Rewrites README.md."""
    README.write_text(written(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
