"""`python -m trace_jax.judges`: measure judges, judge files, and look into the judgement store."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import commands, judges, predicates, records
from trace_jax import policy as policies
from trace_jax.errors import InputError
from trace_jax.judges import settings


def main(argv: Sequence[str]) -> int:
    """Runs a command; 2 where its input is wrong."""
    return commands.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    from trace_jax.judges import human_labels

    parser = argparse.ArgumentParser(prog="python -m trace_jax.judges", description=__doc__)
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    calibrate = found.add_parser("calibrate", help="measure a judge against human labels")
    _add_judge(calibrate)
    calibrate.add_argument("--data", required=True, help="prompt, response and people's labels")
    calibrate.add_argument("--form", choices=human_labels.FORMS, default="auto")
    calibrate.add_argument("--out", type=Path, required=True, help="JSON; a page goes beside it")
    calibrate.set_defaults(run=_calibrate)
    judge = found.add_parser("judge", help="verdicts on a file of prompt, response")
    _add_judge(judge)
    judge.add_argument("--data", required=True, help="rows with prompt and response")
    judge.add_argument("--out", type=Path, required=True, help="JSONL of verdicts")
    judge.set_defaults(run=_judge)
    winrate = found.add_parser("winrate", help="which of two runs' answers a judge prefers")
    _add_judge(winrate)
    winrate.add_argument("--a", type=Path, required=True, help="a run's workdir: its win rate")
    winrate.add_argument("--b", type=Path, required=True, help="the run it is compared with")
    for side in ("a", "b"):
        winrate.add_argument(
            f"--model-{side}", default="trained", choices=("trained", "ref", "base")
        )
    winrate.add_argument("--split", default="test", choices=("test", "validation"))
    winrate.add_argument("--out", type=Path, required=True, help="JSON")
    winrate.set_defaults(run=_winrate)
    export = found.add_parser("export", help="all stored verdicts as Parquet")
    export.add_argument("--store", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    export.set_defaults(run=_export)
    spent = found.add_parser("spent", help="calls, tokens and price of a judgement store")
    spent.add_argument("--store", type=Path, required=True)
    spent.set_defaults(run=_spent)
    return parser


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", default="rules", help=", ".join(judges.NAMES))
    parser.add_argument("--policy", required=True, help="a shipped name or a file")
    parser.add_argument(
        "--store", type=Path, help="judgement store; none: asking.store, or one beside --out"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a key of judge.* or asking.*, as judge.local.model=DIR or asking.concurrency=64",
    )  # fmt: skip


def _make_folder(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out.parent}: cannot be made ({error.strerror})") from error


def _made(arguments: argparse.Namespace) -> tuple[judges.Judge, policies.Policy, Path | None]:
    """The judge, its policy, and the store that counts its calls."""
    policy = policies.load(arguments.policy)
    _make_folder(arguments.out)
    given = settings.of(arguments.set)
    store = arguments.store
    if store is None and arguments.judge not in ("rules", "labels"):
        store = Path(given.asking.store or arguments.out.with_suffix(".sqlite"))
    found = judges.make(
        arguments.judge,
        policy,
        given.judge.to_dict(),
        asking=given.asking.to_dict(),
        store=store,
    )
    return found, policy, store


def _calibrate(arguments: argparse.Namespace) -> None:
    from trace_jax.judges import calibrate, human_labels, store

    policy = policies.load(arguments.policy)
    found = human_labels.read(arguments.data, policy, arguments.form)
    judge, policy, kept = _made(arguments)
    result = calibrate.calibrate(
        judge,
        policy,
        found,
        data=arguments.data,
        kept=None if kept is None else store.Store(kept),
        out=arguments.out,
    )
    print("\n".join(calibrate.lines(result)))
    print(f"{arguments.out}, {arguments.out.with_suffix('.html')}")


def _judge(arguments: argparse.Namespace) -> None:
    from trace_jax import metrics
    from trace_jax.sources import files, forms

    rows = [
        (
            row.get("id", n),
            judges.Item(
                forms.text(row, "prompt", where),
                forms.text(row, "response", where, may_be_empty=True),
                _annotations(row, where),
            ),
        )
        for n, (where, row) in enumerate(files.rows(arguments.data), start=1)
    ]
    if not rows:
        raise InputError(f"{arguments.data}: no rows; they need prompt and response")
    judge, _, _ = _made(arguments)
    items = [item for _, item in rows]
    with metrics.progress(len(items), f"judged by {judge.id}") as bar:
        verdicts = judge.judge(items, progress=bar.advance)
    records.write_jsonl(
        arguments.out,
        (
            {"id": name, "prompt": item.prompt, "response": item.response, **v.to_json()}
            | {"rationale": v.rationale}
            for (name, item), v in zip(rows, verdicts, strict=True)
        ),
    )
    counts = {s: sum(v.status == s for v in verdicts) for s in records.STATUSES}
    print(", ".join(f"{status} {n}" for status, n in counts.items()) + f": {arguments.out}")


def _annotations(row: Mapping[str, Any], where: str) -> predicates.Labels:
    """Column `annotations`, as `calibrate` reads it, or `labels`: what predicates ask for."""
    key = "annotations" if row.get("annotations") else "labels"
    found = row.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(
            f"{where}: {key} must map names to values; people's verdicts (a list, as calibrate "
            "reads) are not for a judge: leave them out, or give annotations"
        )
    return found


def _winrate(arguments: argparse.Namespace) -> None:
    from trace_jax.evaluate import winrate

    a = _greedy(arguments.a, arguments.model_a, arguments.split)
    b = _greedy(arguments.b, arguments.model_b, arguments.split)
    shared = [name for name in a if name in b]
    if not shared:
        raise InputError(f"{arguments.a} and {arguments.b} have no held-out prompt in common")
    other = [name for name in shared if a[name]["prompt"] != b[name]["prompt"]]
    if other:
        raise InputError(
            f"{arguments.a} and {arguments.b} have other prompts under the same ids ({len(other)} "
            f"of {len(shared)}, such as {other[0]!r}); compare runs with the same held-out prompts"
        )
    pairs = [winrate.Pair(a[i]["prompt"], a[i]["response"], b[i]["response"]) for i in shared]
    judge, policy, _ = _made(arguments)
    found = winrate.outcomes(judge, pairs)
    result = {"judge": judge.id, "policy": policy.name} | winrate.summary(pairs, found)
    records.write_json(arguments.out, result)
    if result["win_rate"] is None:
        print(f"the judge decided no pair of {len(pairs)}: {arguments.out}")
        return
    print(
        f"win rate {result['win_rate']:.1%} ({result['low']:.1%} to {result['high']:.1%}) over "
        f"{result['n']} prompts, {result['counts']}: {arguments.out}"
    )


def _greedy(workdir: Path, model: str, split: str) -> dict[str, dict[str, Any]]:
    """Prompt id -> the greedy row of a model."""
    path = workdir / "samples.jsonl"
    if not path.exists():
        raise InputError(f"{path}: not there; run stage evaluate first")
    rows = (row for _, row in records.read_jsonl(path))
    wanted = {"model": model, "split": split, "mode": "greedy"}
    found = {row["id"]: row for row in rows if all(row[k] == v for k, v in wanted.items())}
    if not found:
        raise InputError(f"{path}: has no greedy answers of {model} to {split} prompts")
    return found


def _opened(path: Path) -> Any:
    from trace_jax.judges import store

    if not path.is_file():
        raise InputError(f"{path}: no such file; give the judgement store of a run")
    return store.Store(path, read_only=True)


def _export(arguments: argparse.Namespace) -> None:
    n = _opened(arguments.store).export(arguments.out)
    print(f"{n} verdicts: {arguments.out}")


def _spent(arguments: argparse.Namespace) -> None:
    spent = _opened(arguments.store).spent()
    print(
        f"{spent.calls} calls, {spent.input_tokens} input tokens ({spent.cached_tokens} cached), "
        f"{spent.output_tokens} output tokens, {spent.price:.4f} US dollars"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
