"""Tables that scripts write into pages, between `<!-- NAME: python -m bench.pages -->` and its end.

python -m bench.pages [--price v5e=0.6 ...]     writes all of them, from the committed result files
                                                and trace_jax/config.py
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import (
    against_gold,
    config_keys,
    frontier,
    generations,
    headlines,
    overrefusal,
    plans,
    realign,
    replication,
    studies,
    weights,
)
from trace_jax.errors import InputError

# Page -> name of a block -> what stands there.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "methods": realign.in_short,
        "statements": realign.answers,
        "against_gold": against_gold.table,
        "headlines": headlines.in_short,
    },
    "docs/results.md": {
        "methods": realign.tables,
        "against_gold": against_gold.table,
        "blind": realign.blind,
        "frontier": frontier.tables,
        "studies": studies.tables,
        "weights": weights.tables,
        "generations": generations.table,
        "xstest": overrefusal.tables,
    },
    "docs/speed.md": {"headlines": headlines.table, "plans": plans.table},
    "docs/judges.md": {"judge": headlines.judge_costs},
    "docs/replication.md": {"methods": realign.beside_the_paper},
    "docs/config.md": {"keys": config_keys.tables},
}


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """The text of a page with each block between its marks.

    Raises:
      InputError: a block has no marks there.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: python -m bench.pages -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        if not rest or not after:
            raise InputError(f"the page has no {begin} ... {end}")
        page = f"{before}{begin}\n\n{block.strip()}\n\n{end}{after}"
    return page


def written(prices: Mapping[str, float]) -> dict[Path, str]:
    """Every page as the result files have it now. prices: dollars a chip-hour."""
    found = {}
    for name, makers in PAGES.items():
        blocks = {block: make() for block, make in makers.items()}
        if name == str(replication.PAGE):
            blocks |= replication.blocks(realign.RESULTS, prices)
        try:
            found[Path(name)] = filled(Path(name).read_text(), blocks)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return found


def main(argv: Sequence[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--price", action="append", default=[], metavar="KIND=DOLLARS")
    try:
        pages = written(replication.prices(parser.parse_args(argv).price))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, text in pages.items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
