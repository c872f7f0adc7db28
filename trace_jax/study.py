"""Blind human study: `python -m trace_jax.study make|score`.

`make` writes a self-contained page of blind pairs or triplets and, apart from it, the key that says
which system wrote what. People open the page offline, choose, and send back the file of votes that
it saves. `score` joins votes and key: win rates with intervals, and the raters' agreement.
"""

import argparse
import base64
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax import commands, records
from trace_jax.errors import InputError
from trace_jax.evaluate import agreement, statistics

RESAMPLES = 2000
TIE = "tie"


def main(argv: Sequence[str]) -> int:
    """Runs a command; 2 where its input is wrong."""
    return commands.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trace_jax.study", description=__doc__)
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    make = found.add_parser("make", help="a page to be voted on, and its key")
    make.add_argument(
        "--system", action="append", required=True, metavar="NAME=WORKDIR[:MODEL]",
        help="two or three; MODEL is trained (the default), ref or base",
    )  # fmt: skip
    make.add_argument("--policy", required=True, help="shipped name or file: what raters go by")
    make.add_argument("--split", default="test")
    make.add_argument("--n", type=commands.at_least(1), default=50, help="prompts")
    make.add_argument("--seed", type=commands.at_least(0), default=0)
    make.add_argument("--out", type=Path, required=True, help="the page, *.html")
    make.set_defaults(run=_make)
    score = found.add_parser("score", help="win rates out of votes")
    score.add_argument("key", type=Path, help="the key that make wrote")
    score.add_argument("votes", type=Path, nargs="+", help="files that raters saved")
    score.add_argument("--out", type=Path, required=True, help="JSON")
    score.set_defaults(run=_score)
    return parser


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt with one answer of every system, in the order in which raters see them."""

    id: str
    prompt: str
    answers: tuple[str, ...]
    systems: tuple[str, ...]


def items(
    answers: Mapping[str, Mapping[str, Mapping[str, Any]]], *, n: int, seed: int
) -> list[Item]:
    """n prompts that all systems answered differently, in random order, their answers shuffled.

    answers: system -> prompt id -> row of samples.jsonl.

    Raises:
      InputError: other prompts under one id, or nothing to choose between.
    """
    first, *others = answers.values()
    shared = [i for i in first if all(i in other for other in others)]
    for name in shared:
        if any(other[name]["prompt"] != first[name]["prompt"] for other in others):
            raise InputError(
                f"the systems were asked different prompts under the id {name!r}; give runs that "
                "were evaluated on one data set"
            )
    rng = np.random.default_rng([seed, 0x57D])
    made = []
    for name in (shared[k] for k in rng.permutation(len(shared))):
        texts = {s: of[name]["response"].strip() for s, of in answers.items()}
        if len(set(texts.values())) < len(texts):
            continue  # between equal answers there is nothing to choose
        order = [list(texts)[k] for k in rng.permutation(len(texts))]
        code = hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()[:12]
        prompt = _plain(first[name]["prompt"])
        made.append(Item(code, prompt, tuple(texts[s] for s in order), tuple(order)))
        if len(made) == n:
            break
    if not made:
        raise InputError("the systems have no prompt in common on which their answers differ")
    return made


def _plain(text: records.Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def page(study: str, policy: Any, made: Sequence[Item]) -> str:
    """The page: no system's name in it, nothing loaded, one script that its policy allows by hash.

    Prompts and answers are data of JSON and reach the page as text only.
    """
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trace_jax"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    script = environment.loader.get_source(environment, "study.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {
        "study": study,
        "items": [{"id": i.id, "prompt": i.prompt, "answers": i.answers} for i in made],
    }
    text = json.dumps(data, ensure_ascii=True)
    for sign in "<>&":  # nothing in it can end the element it stands in
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return environment.get_template("study.html.j2").render(
        policy=policy,
        data=markupsafe.Markup(text),
        script=markupsafe.Markup(script),
        digest=digest,
        n_answers=len(made[0].answers),
        n_items=len(made),
    )


def score(key: Mapping[str, Any], votes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Win rates of every ordered pair of systems, and Krippendorff's alpha of the raters.

    A vote for one of two or three answers is a win over each of the others; a tie is half a win for
    each. Intervals (95 %) draw whole prompts, whose votes resemble each other; where all draws give
    one rate, Wilson's interval on the number of prompts takes their place.

    Returns:
      {"n_items", "raters", "votes", "systems": {name: {"chosen", "n"}}, "win_rates": [{"a", "b",
      "rate", "low", "high", "n"}], "alpha", "position": share of votes by place}
    """
    order = {item["id"]: item["systems"] for item in key["items"]}
    chosen: dict[str, dict[str, str]] = {}  # item -> rater -> system or tie
    places = np.zeros(len(next(iter(order.values()))))
    for of_rater in votes:
        for item, choice in of_rater["votes"].items():
            systems = order[item]
            if choice != TIE:
                places[choice] += 1
            found = TIE if choice == TIE else systems[choice]
            chosen.setdefault(item, {})[of_rater["rater"]] = found
    raters = [v["rater"] for v in votes]
    systems = sorted({s for of in order.values() for s in of})
    flat = [c for of in chosen.values() for c in of.values()]
    ratings = [[of.get(r) for of in chosen.values()] for r in raters]
    return {
        "n_items": len(order),
        "raters": raters,
        "votes": len(flat),
        "systems": {s: {"chosen": flat.count(s), "n": len(flat)} for s in (*systems, TIE)},
        "win_rates": [
            {"a": a, "b": b} | _rate(a, b, chosen) for a, b in itertools.permutations(systems, 2)
        ],
        "alpha": agreement.krippendorff_alpha(ratings) if len(raters) > 1 else None,
        "position": [float(x) for x in places / max(1.0, places.sum())],
    }


def _rate(a: str, b: str, chosen: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """a against b, of the votes that decide between them: one of them was chosen, or a tie."""
    points = {a: 1.0, b: 0.0, TIE: 0.5}
    by_item = [[points[c] for c in of.values() if c in points] for of in chosen.values()]
    sums = np.array([[sum(of), len(of)] for of in by_item if of], np.float64)
    if not len(sums):
        return {"rate": None, "low": None, "high": None, "n": 0}
    rng = np.random.default_rng(0)
    drawn = sums[rng.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(axis=1)
    rates = drawn[:, 0] / drawn[:, 1]
    total = sums.sum(axis=0)
    rate = float(total[0] / total[1])
    if statistics.all_equal(rates):
        low, high = statistics.wilson(rate * len(sums), len(sums))
    else:
        low, high = np.percentile(rates, (2.5, 97.5))
    return {"rate": rate, "low": float(low), "high": float(high), "n": int(total[1])}


def read_votes(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """A rater's file, checked against the study."""
    found = records.read_json(path)
    if not isinstance(found, dict) or not {"study", "rater", "votes"} <= found.keys():
        raise InputError(f"{path}: not a file of votes (study, rater, votes)")
    if found["study"] != key["study"]:
        raise InputError(f"{path}: votes of study {found['study']}, the key is of {key['study']}")
    if not isinstance(found["rater"], str) or not found["rater"].strip():
        raise InputError(f"{path}: a rater's name is needed, a text; it is {found['rater']!r}")
    if not isinstance(found["votes"], dict):
        raise InputError(f"{path}: votes are needed, a choice an item")
    known = {item["id"]: len(item["systems"]) for item in key["items"]}
    for item, choice in found["votes"].items():
        if item not in known:
            raise InputError(f"{path}: vote on {item!r}, which is no item of the study")
        is_place = isinstance(choice, int) and not isinstance(choice, bool)
        if choice != TIE and not (is_place and 0 <= choice < known[item]):
            raise InputError(f"{path}: {choice!r} on item {item} is no choice")
    return found


def _make(arguments: argparse.Namespace) -> None:
    from trace_jax import policy as policies

    if not 2 <= len(arguments.system) <= 3:
        raise InputError("give two or three --system")
    if arguments.out.suffix != ".html":
        raise InputError(f"--out={arguments.out}: the page is called *.html")
    answers = dict(_answers(text, arguments.split) for text in arguments.system)
    if len(answers) < len(arguments.system):
        raise InputError("--system: every system needs a name of its own")
    made = items(answers, n=arguments.n, seed=arguments.seed)
    content = json.dumps([dataclasses.astuple(item) for item in made])
    study = hashlib.sha256(content.encode()).hexdigest()[:12]
    policy = policies.load(arguments.policy)
    key = {"study": study, "systems": arguments.system, "policy": policy.name,
           "items": [{"id": i.id, "systems": i.systems} for i in made]}  # fmt: skip
    key_path = arguments.out.with_suffix(".key.json")
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = page(study, policy, made)
        arguments.out.write_bytes(text.encode("utf-8", errors="replace"))
        records.write_json(key_path, key)
    except OSError as error:
        raise InputError(f"{arguments.out}: cannot be written ({error.strerror})") from error
    print(f"{arguments.out}: {len(made)} prompts; give it to raters. {key_path}: keep it from them")


def _answers(text: str, split: str) -> tuple[str, dict[str, dict]]:
    name, equals, rest = text.partition("=")
    if not equals or not name:
        raise InputError(f"--system={text}: give NAME=WORKDIR or NAME=WORKDIR:MODEL")
    place, colon, model = rest.rpartition(":")
    workdir, model = (Path(place), model) if colon else (Path(rest), "trained")
    path = workdir / "samples.jsonl"
    if not path.exists():
        raise InputError(f"{path}: not there; run stage evaluate first")
    rows = (row for _, row in records.read_jsonl(path))
    wanted = {"model": model, "split": split, "mode": "sample", "sample": 0}
    found = {row["id"]: row for row in rows if all(row[k] == v for k, v in wanted.items())}
    if not found:
        raise InputError(f"{path}: no samples of model {model!r} on split {split!r}")
    return name, found


def _score(arguments: argparse.Namespace) -> None:
    if not arguments.key.is_file():
        raise InputError(f"{arguments.key}: no such file; give the key that `make` wrote")
    key = records.read_json(arguments.key)
    if not isinstance(key, dict) or not {"study", "items"} <= key.keys():
        raise InputError(f"{arguments.key}: not the key of a study")
    votes = [read_votes(path, key) for path in arguments.votes]
    names = [v["rater"] for v in votes]
    if len(set(names)) < len(names):
        raise InputError(f"two files are of one rater ({', '.join(names)}); give one of each")
    found = {"study": key["study"]} | score(key, votes)
    records.write_json(arguments.out, found)
    for row in found["win_rates"]:
        if row["rate"] is not None:
            print(
                f"{row['a']} over {row['b']}: {row['rate']:.1%} [{row['low']:.1%}, "
                f"{row['high']:.1%}] of {row['n']} votes"
            )
    alpha = "not defined" if found["alpha"] is None else f"{found['alpha']:.2f}"
    print(f"{len(names)} raters, alpha {alpha}: {arguments.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
