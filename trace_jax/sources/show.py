"""Records as a model sees them: tokens in colour, by whether they are learned from.

Text comes from anybody, so control characters are written out, never sent to the terminal.
"""

from collections.abc import Iterator

from trace_jax import encoding, errors, records

_RESET = "\x1b[0m"
_COLOURS = {
    "prompt": "\x1b[90m",
    "carried": "\x1b[33m",
    "chosen": "\x1b[32m",
    "rejected": "\x1b[31m",
}
_BARS = {"prompt": "|", "carried": "~", "chosen": "|", "rejected": "|"}  # without colours
LEGEND = {
    "prompt": "prompt, no loss",
    "carried": "end of the prompt, tokenised with the response, no loss",
    "chosen": "better response, loss",
    "rejected": "worse response, loss",
}


def lines(
    found: records.PreferenceRecord, encoder: encoding.Encoder, *, colour: bool
) -> Iterator[str]:
    """A record in tokens, each behind a thin bar; with colours, or with marks instead."""
    encoded = encoder.encode(found.prompt, [found.chosen, found.rejected], found.id)
    name = errors.printable(found.id)
    yield f"record {name}: {encoded.row_length} positions of a row, the prompt written once"
    yield _painted(encoder, encoded.prompt, "prompt", colour)
    for side, branch, skip in zip(
        ("chosen", "rejected"), encoded.branches, encoded.skip, strict=True
    ):
        carried = _painted(encoder, branch[:skip], "carried", colour) if skip else ""
        learned = _painted(encoder, branch[skip:], side, colour)
        yield f"  {side} ({len(branch) - skip} tokens): {carried}{learned}"


def legend(*, colour: bool) -> str:
    """What colours or marks mean."""
    if colour:
        return "  ".join(f"{_COLOURS[kind]}{text}{_RESET}" for kind, text in LEGEND.items())
    return "tokens stand behind | ; behind ~ those of the prompt that carry no loss in a response"


def _painted(encoder: encoding.Encoder, tokens: tuple[int, ...], kind: str, colour: bool) -> str:
    pieces = [errors.printable(encoder.tokenizer.decode([token])) for token in tokens]
    if colour:
        return f"{_COLOURS[kind]}{'|'.join(pieces)}{_RESET}"
    return "".join(f"{_BARS[kind]}{piece}" for piece in pieces)
