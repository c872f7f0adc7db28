"""Curves: judge noise, amount of data, soft against hard triage, and a gold that is gold.

python -m bench.studies --config=configs/quickstart.py --workdir=runs/quickstart --name=synth \\
    [--studies=noise,size,soft,gold] [--seeds=3] [--jobs=2] [--config.key=value]

Every point is a variant of a comparison over one prepared run, each method at the operating point
that it has in `bench.realign`. Writes
docs/results/NAME_studies.json, .md and .png.

noise   the paper's corruption of 0, 10, 20 % of the records
size    25, 50, 100 % of the records
soft    a judge that errs on 10 or 20 % of its verdicts and says how sure it is: actions by the more
        likely verdict, against a share of every action by its probability
gold    dpo_gold on exact verdicts; the others and the controls see only such a judge: here the
        share of the gap closed means what the paper means
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from bench import realign, results
from trace_jax import compare, launch, records, shortlist
from trace_jax.errors import InputError

LISTED = 100  # records on the short list for people that are looked at
NOISE, SIZE, ERROR = (0.0, 0.1, 0.2), (0.25, 0.5, 1.0), (0.1, 0.2)

NOISY = (
    "trace", "u2a", "trace_no_impact", "trace_full_weights", "trace_shuffled", "trace_paper",
    "naive_oracle_dpo", "npo", "sft",
)  # fmt: skip  # methods of study gold that see the judge that errs

# Key in the JSON -> (study, line a, line b, what a minus b is).
DIFFERENCES = {
    "soft_minus_hard": ("soft", "trace, soft", "trace, hard", "Soft minus hard triage"),
    "weights_minus_none": ("gold", "trace", "trace_no_impact", "trace minus trace_no_impact"),
    "whole_minus_none": (
        "gold", "trace_full_weights", "trace_no_impact", "trace_full_weights minus trace_no_impact"
    ),
    "weights_minus_shuffled": (
        "gold", "trace_full_weights", "trace_shuffled", "trace_full_weights minus trace_shuffled"
    ),
}  # fmt: skip


def _point(study: str, method: str, x: float, label: str, **overrides: object) -> dict:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return {"study": study, "method": method, "x": x, "line": label, "overrides": keys}


def points() -> list[dict]:
    """All points of all studies."""
    found = [
        _point("noise", m, x, m, triage__noise=x)
        for m in ("trace", "u2a", "dpo_gold")
        for x in NOISE
    ]
    found += [
        _point("size", m, x, m, train__data_share=x)
        for m in ("trace", "naive_oracle_dpo")
        for x in SIZE
    ]
    for x in ERROR:
        for soft in (False, True):
            label = "trace, soft" if soft else "trace, hard"
            found.append(_point("soft", "trace", x, label, triage__error=x, triage__soft=soft))
        found += [_point("gold", m, x, m, triage__error=x) for m in NOISY]
    return [*found, _point("gold", "dpo_gold", 0.0, "dpo_gold, exact")]


def variant(point: dict, tuned: dict, config) -> compare.Variant:
    """A point as a variant; points that differ in their study alone are one run."""
    (at,) = realign.variants([point["method"]], tuned, config)
    neutral = {
        "triage.noise": 0.0,
        "triage.error": 0.0,
        "triage.soft": False,
        "train.data_share": 1,
    }
    changed = {k: v for k, v in point["overrides"].items() if v != neutral[k]}
    name = "+".join([point["method"], *(f"{k}={v}" for k, v in changed.items())])
    return compare.Variant(name, at.overrides | changed)


def measure(config, prepared: Path, tuned: dict, studies: list[str], seeds: int, jobs: int) -> dict:
    """Figures of every point, and what `answers` makes of them."""
    from trace_jax import comparison

    chosen = [p for p in points() if p["study"] in studies]
    of_point = [variant(p, tuned, config) for p in chosen]
    variants = {v.name: v for v in of_point}
    found = compare.compare(config, prepared, list(variants.values()), seeds, jobs, winrate=False)
    outcomes = {}
    for at in variants.values():
        paths = [compare.folder(prepared, at, s) / "samples.jsonl" for s in found["seeds"]]
        rows = [comparison.rows_of(path, "trained", found["split"], ()) for path in paths]
        outcomes[at.name] = comparison.outcomes(rows, "compliance_guarded")
    rows = []
    for p, at in zip(chosen, of_point, strict=True):
        of = found["methods"][at.name]
        figures = {k: {n: of[k][n] for n in ("rate", "low", "high")} for k in comparison.TESTED}
        rows.append({k: p[k] for k in ("study", "line", "x")} | figures
                    | {"perplexity": of["perplexity"]})  # fmt: skip
    said = {
        (p["study"], p["line"], p["x"]): outcomes[at.name]
        for p, at in zip(chosen, of_point, strict=True)
    }
    out = {"points": rows, "seeds": found["seeds"], "split": found["split"], **answers(said)}
    if "gold" in studies:
        out["weight_of_verdicts"], out["wrong_among_listed"] = {}, {}
        for x in ERROR:
            at = _whole(x, tuned, config)
            runs = [compare.folder(prepared, at, seed) for seed in found["seeds"]]
            out["weight_of_verdicts"][str(x)] = weight_of_verdicts(prepared, runs)
            out["wrong_among_listed"][str(x)] = wrong_among_listed(prepared, runs)
    return out


def _whole(x: float, tuned: dict, config) -> compare.Variant:
    """The run with whole weights under a judge that errs on a share of x."""
    (point,) = (
        p for p in points() if (p["study"], p["line"], p["x"]) == ("gold", "trace_full_weights", x)
    )
    return variant(point, tuned, config)


def weight_of_verdicts(prepared: Path, runs: Sequence[Path]) -> dict[str, dict[str, float]]:
    """What whole weights make of conflicts that the judge got right, and of those it got wrong.

    prepared: the run whose verdicts are exact. Returns {"right" | "wrong": {"records", "weight",
    "clamped"}}: how many there are in a run, their mean weight and the share with none, of scored
    records, means over the runs.
    """

    exact = _actions(prepared)
    found: dict[str, list[tuple[int, float, float]]] = {"right": [], "wrong": []}
    for run in runs:
        said, weights = _actions(run), {"right": [], "wrong": []}
        for _, row in records.read_jsonl(run / "impact.jsonl"):
            if row["score"] is not None:
                key = "right" if said[row["id"]] == exact[row["id"]] else "wrong"
                weights[key].append(row["weight"])
        for key, of in weights.items():
            found[key].append((len(of), float(np.mean(of)), float(np.mean(np.array(of) == 0))))
    names = ("records", "weight", "clamped")
    return {
        key: dict(zip(names, np.mean(of, axis=0).tolist(), strict=True))
        for key, of in found.items()
    }


def wrong_among_listed(prepared: Path, runs: Sequence[Path]) -> dict[str, float]:
    """Share of actions that the judge got wrong: of all records, and of the LISTED on the short
    list for people; means over the runs."""
    exact, shares = _actions(prepared), []
    for run in runs:
        said = _actions(run)
        wrong = {name for name, action in said.items() if action != exact[name]}
        listed = [row["id"] for row in shortlist.of_workdir(run, LISTED)]
        shares.append((len(wrong) / len(said), np.mean([name in wrong for name in listed])))
    return dict(zip(("all", "listed"), np.mean(shares, axis=0).tolist(), strict=True))


def _actions(path: Path) -> dict[str, str]:
    return {row["id"]: row["action"] for _, row in records.read_jsonl(path / "triage.jsonl")}


def answers(outcomes: Mapping[tuple[str, str, float], Sequence[np.ndarray]]) -> dict:
    """What the studies that are there were made to say, at every error of the judge.

    outcomes: (study, line, x) of a point -> [prompts, samples] 0/1 of each seed.
    """
    from trace_jax.evaluate import paired

    studied = {study for study, _, _ in outcomes}
    found: dict[str, dict] = {}
    if "gold" in studied:
        exact = outcomes["gold", "dpo_gold, exact", 0.0]
        found["gap_closed"] = {
            str(x): paired.gap_closed(
                outcomes["gold", "trace", x], outcomes["gold", "u2a", x], exact
            )
            for x in ERROR
        }
    for key, (study, a, b, _) in DIFFERENCES.items():
        if study in studied:
            found[key] = {
                str(x): dataclasses.asdict(
                    paired.compare(outcomes[study, a, x], outcomes[study, b, x])
                )
                for x in ERROR
            }
    return found


def plot(found: dict, path: Path) -> None:
    """A panel a study."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    studies = list(dict.fromkeys(p["study"] for p in found["points"]))
    labels = {"noise": "share of records corrupted", "size": "share of the records",
              "soft": "mean error of the judge", "gold": "mean error of the judge"}  # fmt: skip
    figure, panels = pyplot.subplots(
        1, len(studies), figsize=(4.2 * len(studies), 4.4), layout="constrained", squeeze=False
    )
    for axes, study in zip(panels[0], studies, strict=True):
        of_study = [p for p in found["points"] if p["study"] == study]
        for line in dict.fromkeys(p["line"] for p in of_study):
            rows = sorted((p for p in of_study if p["line"] == line), key=lambda p: p["x"])
            rate = [100 * p["compliance_guarded"]["rate"] for p in rows]
            error = [
                [r - 100 * p["compliance_guarded"]["low"] for r, p in zip(rate, rows, strict=True)],
                [
                    100 * p["compliance_guarded"]["high"] - r
                    for r, p in zip(rate, rows, strict=True)
                ],
            ]
            if len(rows) == 1:  # the same at every x
                axes.axhline(rate[0], ls="--", color="gray", label=line)
                low, high = (100 * rows[0]["compliance_guarded"][end] for end in ("low", "high"))
                axes.axhspan(low, high, color="gray", alpha=0.15)
                continue
            axes.errorbar([p["x"] for p in rows], rate, yerr=error, fmt="o-", capsize=3, label=line)
        axes.set_title(study)
        axes.set_xlabel(labels[study])
        axes.set_xticks(sorted({p["x"] for p in of_study if p["x"] or study == "noise"}))
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("guarded compliance, T=1 (%)")
    figure.savefig(path, dpi=110)


def table(found: dict) -> str:
    """Markdown: every point, and the gap closed."""
    lines = [
        "| study | what | at | guarded, T=1 | raw, T=1 | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for p in found["points"]:
        rates = [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * p[k][e] for e in ("rate", "low", "high")))
            for k in ("compliance_guarded", "compliance")
        ]
        lines.append(
            f"| {p['study']} | {p['line']} | {p['x']:.0%} | {' | '.join(rates)} "
            f"| {p['perplexity']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    seeds = ", ".join(map(str, found["seeds"]))
    text += f"\nPercent [95 % interval]; {found['split']} prompts; seeds {seeds}; "
    text += f"commit {found['commit']}.\n"
    for key, (_, _, _, what) in DIFFERENCES.items():
        for x, d in found.get(key, {}).items():
            mean, low, high = (100 * d[e] for e in ("difference", "low", "high"))
            text += f"\n{what}, a judge that errs on {float(x):.0%}: "
            text += f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}].\n"
    for x, of in found.get("weight_of_verdicts", {}).items():
        text += f"\nWhole weights with a judge that errs on {float(x):.0%}: mean weight "
        text += " and ".join(
            f"{of[key]['weight']:.2f} of the {of[key]['records']:.0f} scored conflicts that it got "
            f"{key} ({of[key]['clamped']:.0%} clamped to 0)"
            for key in ("right", "wrong")
        )
        text += ".\n"
    for x, of in found.get("wrong_among_listed", {}).items():
        text += (
            f"\nOf the {LISTED} records on the short list for people, with a judge that errs on "
        )
        text += f"{float(x):.0%}, it got {of['listed']:.0%} wrong; of all {of['all']:.0%}.\n"
    for x, gap in found.get("gap_closed", {}).items():
        rate, low, high = (100 * gap[e] for e in ("rate", "low", "high"))
        text += "\nGap from u2a to exact dpo_gold that trace closes with a judge that errs on "
        text += f"{float(x):.0%}: {rate:.0f} % [{low:.0f}, {high:.0f}].\n"
    return text


def tables() -> str:
    """Markdown of the committed studies."""
    found = realign.of_benchmarks("_studies")
    return "\n".join(f"**{name}**\n\n{table(of)}" for name, of in found.items())


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    flags.DEFINE_string("name", None, "Name of the result files.", flag_values=values)
    flags.DEFINE_list("studies", "noise,size,soft,gold", "Which.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.name):
            raise InputError("--config, --workdir and --name are needed")
        start = time.time()
        tuned = records.read_json(realign.RESULTS / f"{values.name}_frontier.json")
        found = measure(
            values.config, Path(values.workdir), tuned, values.studies, values.seeds, values.jobs
        )
        found |= {"wall_seconds": round(time.time() - start), **results.machine()}
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = realign.RESULTS / f"{values.name}_studies.json"
    records.write_json(out, found)
    plot(found, out.with_suffix(".png"))
    out.with_suffix(".md").write_text(table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
