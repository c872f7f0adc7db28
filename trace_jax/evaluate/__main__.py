"""`python -m trace_jax.evaluate`: attacks and general capability of models by their directories."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_jax import commands, metrics, model_folder, records
from trace_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Runs a command; 2 where its input is wrong."""
    return commands.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trace_jax.evaluate", description=__doc__)
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    attacks = found.add_parser("attacks", help="attack success beside over-refusal")
    _add_models(attacks)
    attacks.add_argument(
        "--harmful", action="append", default=[], metavar="FILE", required=True,
        help="AdvBench, HarmBench, StrongREJECT, or a file with a column prompt; may be repeated",
    )  # fmt: skip
    attacks.add_argument("--safe", metavar="FILE", required=True, help="XSTest, or safe prompts")
    attacks.add_argument(
        "--judges", default="rules,keywords", help="two or more of rules, keywords, gemini, local"
    )
    number, count = commands.at_least(1), commands.at_least(0)
    attacks.add_argument("--limit", type=count, default=0, help="prompts of a file; 0: all")
    attacks.add_argument("--max-new-tokens", type=number, default=256)
    attacks.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                         help="a key of judge.* or asking.*")  # fmt: skip
    attacks.add_argument("--out", type=Path, required=True, help="folder; it goes on there")
    attacks.set_defaults(run=_attacks)
    capability = found.add_parser("capability", help="lm-evaluation-harness over our model")
    _add_models(capability)
    for name, what in (
        ("mmlu", "its zip file or folder of CSV files"),
        ("hellaswag", "its JSONL file"),
        ("gsm8k", "its JSONL file; the first 5 are the examples"),
        ("gpqa", "its CSV file"),
    ):
        capability.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    capability.add_argument("--tasks", default="", help="tasks of the harness itself (downloads)")
    capability.add_argument("--include", type=Path, help="folder of your own task files (YAML)")
    capability.add_argument("--limit", type=count, default=0, help="documents of a task; 0: all")
    capability.add_argument("--chat", action="store_true", help="ask through the chat template")
    capability.add_argument("--out", type=Path, required=True, help="JSON")
    capability.set_defaults(run=_capability)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]DIR",
        help="a model in Hugging Face layout; the first one is what others are compared with",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--stop-ids", default="", help="tokens that end an answer, by commas")
    parser.add_argument(
        "--batch-rows", type=commands.at_least(1), default=64, help="sequences decoded at once"
    )


def _subjects(arguments: argparse.Namespace):
    """The models, one at a time in memory."""
    from trace_jax.evaluate import subject

    try:
        stops = [int(i) for i in arguments.stop_ids.split(",") if i.strip()]
    except ValueError as error:
        raise InputError(f"--stop-ids={arguments.stop_ids}: give numbers by commas") from error
    if min(stops, default=0) < 0:
        raise InputError(f"--stop-ids={arguments.stop_ids}: ids of tokens are at least 0")
    names = [text.rpartition("=")[0] or Path(text).name for text in arguments.model]
    if len(set(names)) < len(names):
        raise InputError(f"--model: two models are called {names}; name them, as base=DIR")
    for text in arguments.model:
        yield subject.load(text, arguments.dtype, stops)


def _attacks(arguments: argparse.Namespace) -> None:
    from trace_jax.evaluate import attacks

    names = (name.strip() for name in arguments.judges.split(","))
    judged_by = list(dict.fromkeys(name for name in names if name))
    if len(judged_by) < 2:
        raise InputError(
            f"--judges={arguments.judges}: attack success is told by two judges or more, side by "
            "side; name them by commas, as rules,keywords"
        )
    judges_of = {name: _judge_pair(name, arguments) for name in judged_by}
    harmful = [p for path in arguments.harmful for p in attacks.read_prompts(path, arguments.limit)]
    safe = attacks.read_prompts(arguments.safe, arguments.limit, safe=True)
    rows = []
    for text, model in zip(arguments.model, _subjects(arguments), strict=True):
        made_with = _made_with(text, model, arguments)
        for wrapper in (*attacks.WRAPPERS, attacks.SAFE):
            prompts = safe if wrapper == attacks.SAFE else harmful
            rows += _answered(model, wrapper, prompts, made_with, arguments)
    judged = {}
    for name, (of_attacks, of_safe) in judges_of.items():
        is_safe = [r["wrapper"] == attacks.SAFE for r in rows]
        parts = {
            flag: iter(attacks.outcomes(name, of_safe if flag else of_attacks,
                       [r for r, s in zip(rows, is_safe, strict=True) if s == flag], safe=flag))
            for flag in (True, False)
        }  # fmt: skip
        judged[name] = [next(parts[flag]) for flag in is_safe]
    result = attacks.summary(rows, judged) | {
        "prompts": {"harmful": len(harmful), "safe": len(safe)},
        "files": [*arguments.harmful, arguments.safe],
    }
    attacks.warn_of_undecided(result)
    records.write_json(arguments.out / "attacks.json", result)
    (arguments.out / "attacks.md").write_text(attacks.markdown(result) + "\n")
    print(attacks.markdown(result))
    print(f"{arguments.out}/attacks.json, attacks.md, answers-*.jsonl")


def _judge_pair(name: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The judge under policy `attacks` and under policy `answers`."""
    from trace_jax import judges, policy, workdir
    from trace_jax.evaluate import attacks
    from trace_jax.judges import settings

    if name == "keywords":
        return attacks.Keywords(), attacks.Keywords()
    if name not in ("rules", "gemini", "local"):
        raise InputError(f"--judges={arguments.judges}: {name!r} is none of rules, keywords, "
                         "gemini, local")  # fmt: skip
    found = settings.of(arguments.set)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return tuple(
        judges.make(
            name,
            policy.load(which),
            found.judge.to_dict(),
            asking=found.asking.to_dict(),
            store=None if name == "rules" else workdir.store(arguments.out, found),
        )
        for which in ("attacks", "answers")
    )


def _made_with(text: str, model, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the answers of a model, "[NAME=]DIR", depend on beside prompts and wrapper."""
    from trace_jax.judges import local

    return {
        "model": local.fingerprint(model_folder.resolve(text.rpartition("=")[2])),
        "dtype": arguments.dtype,
        "stop_ids": list(model.stop_ids),
        "max_new_tokens": arguments.max_new_tokens,
    }


def _answered(
    model,
    wrapper: str,
    prompts: Sequence,
    made_with: dict[str, Any],
    arguments: argparse.Namespace,
) -> list[dict]:
    """Rows of one model and wrapper; those of an earlier try are kept where nothing changed.

    What they were made with stands beside them, in a file that is there only while they are whole.
    """
    from trace_jax.evaluate import attacks

    text = attacks.WRAPPERS.get(wrapper, "{}")
    made_with = made_with | {"wrapper": text}
    kept = arguments.out / f"answers-{model.name}-{wrapper}.jsonl"
    beside = kept.with_suffix(".json")
    if kept.exists():
        rows = [row for _, row in records.read_jsonl(kept)]
        before = records.read_json(beside) if beside.exists() else {}
        changed = [name for name, value in made_with.items() if before.get(name) != value]
        if [r["id"] for r in rows] != [p.id for p in prompts]:
            changed.append("prompts")
        if not changed:
            return rows
        why = f"changed since: {', '.join(changed)}" if before else "nothing says how it was made"
        metrics.say(f"{kept}: answered anew; {why}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    answers = model.answers(
        [(p.id, text.format(p.text)) for p in prompts],
        max_new_tokens=arguments.max_new_tokens,
        batch_rows=arguments.batch_rows,
    )
    rows = [
        {"id": p.id, "model": model.name, "wrapper": wrapper, "source": p.source, "prompt": p.text,
         "response": answer}
        for p, answer in zip(prompts, answers, strict=True)
    ]  # fmt: skip
    records.write_jsonl(kept, rows)
    records.write_json(beside, made_with)
    return rows


def _capability(arguments: argparse.Namespace) -> None:
    from trace_jax.evaluate import capability_tasks

    try:
        from trace_jax.evaluate import capability_run
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness is not installed ({error.name}); pip install 'trace_jax[eval]'"
        ) from error
    paths = {name: getattr(arguments, name) for name in capability_tasks.NAMES}
    paths = {name: path for name, path in paths.items() if path is not None}
    tasks: list[Any] = [t.strip() for t in arguments.tasks.split(",") if t.strip()]
    folder = arguments.out.parent / f"{arguments.out.stem}_documents"
    tasks += capability_tasks.tasks(paths, folder, limit=arguments.limit)
    if not tasks:
        raise InputError("nothing to ask: give --mmlu, --hellaswag, --gsm8k, --gpqa or --tasks")
    result = capability_run.evaluate(
        _subjects(arguments),
        tasks,
        include=arguments.include,
        limit=arguments.limit or None,
        chat=arguments.chat,
        batch_rows=arguments.batch_rows,
    )
    records.write_json(arguments.out, result)
    print(capability_run.markdown(result))
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
