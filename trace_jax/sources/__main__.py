"""`python -m trace_jax.sources`: look at preference data, convert them, export a run's triage."""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_jax import commands, errors, judges, records, sources
from trace_jax.errors import InputError
from trace_jax.sources import forms


def main(argv: Sequence[str]) -> int:
    """Runs a command; 2 where its input is wrong."""
    return commands.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trace_jax.sources", description=__doc__)
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = found.add_parser("inspect", help="counts, lengths, contradictions, tokens, masks")
    _add_reading(inspect)
    inspect.add_argument("--model", help="folder or hub id whose tokenizer and template to use")
    inspect.add_argument("--tokenizer", type=Path, help="the same from a tokenizer.json alone")
    number, count = commands.at_least(1), commands.at_least(0)
    inspect.add_argument("--max-length", type=number, default=512, help="as data.max_length")
    inspect.add_argument("--show", type=count, default=2, help="records to show in tokens")
    inspect.add_argument("--as-chat", action="store_true", help="as data.as_chat")
    inspect.add_argument("--no-color", action="store_true", help="marks in place of colours")
    inspect.add_argument("--json", action="store_true", help="only the counts, as JSON")
    inspect.set_defaults(run=_inspect)
    convert = found.add_parser("convert", help="into our own JSONL, row by row")
    _add_reading(convert)
    convert.add_argument("out", type=Path, help="FILE.jsonl or FILE.jsonl.gz")
    convert.set_defaults(run=_convert)
    export = found.add_parser("export", help="a run's triage as data sets in TRL's forms")
    export.add_argument("workdir", type=Path)
    export.add_argument("out", type=Path, help="folder")
    export.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    export.set_defaults(run=_export)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="file, folder, pattern or data set of the hub")
    parser.add_argument("--form", choices=forms.NAMES, default="auto")
    parser.add_argument("--columns", default="", help="ours=theirs,... as data.columns")
    parser.add_argument("--split", default="train")
    parser.add_argument("--malformed", choices=("error", "drop"), default="error")
    parser.add_argument(
        "--first", type=commands.at_least(0), default=0, help="read the first N at most; 0: all"
    )


def _found(arguments: argparse.Namespace) -> sources.Records:
    reading = sources.Reading(
        form=arguments.form,
        columns=forms.columns_of(arguments.columns),
        split=arguments.split,
        malformed=arguments.malformed,
        first=arguments.first,
    )
    return sources.Records(arguments.path, reading)


def _inspect(arguments: argparse.Namespace) -> None:
    from trace_jax.sources import inspection

    encoder = _encoder(arguments)
    shown: list[records.PreferenceRecord] = []

    def count(record: records.PreferenceRecord) -> Sequence[int]:
        if arguments.as_chat and isinstance(record.prompt, str):
            chat = [{"role": "user", "content": record.prompt}]
            record = dataclasses.replace(record, prompt=chat)
        if len(shown) < arguments.show:
            shown.append(record)
        texts = [encoder.prompt_text(record.prompt)]
        texts += [judges.response_text(y) for y in (record.chosen, record.rejected)]
        return [
            len(ids)
            for ids in encoder.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        ]

    found = inspection.inspect(
        _found(arguments), count if encoder else None, max_length=arguments.max_length
    )
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    for line in inspection.lines(found, arguments.path):
        print(errors.printable(line))
    if encoder is not None:
        _show(shown, encoder, arguments)


def _encoder(arguments: argparse.Namespace) -> Any:
    """Texts to tokens as training has them, or None without a tokenizer."""
    if not arguments.model and not arguments.tokenizer:
        return None
    import transformers

    from trace_jax import encoding, scratch

    transformers.utils.logging.set_verbosity_error()  # lengths are ours to report
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokenizer:
            scratch.save_tokenizer(arguments.tokenizer, Path(folder))
        name = folder if arguments.tokenizer else arguments.model
        try:
            found = encoding.load_tokenizer(name)
        except InputError as error:
            raise InputError(f"--model={error}") from error
    return encoding.Encoder(found, max_length=arguments.max_length, end_id=found.eos_token_id)


def _show(shown: Sequence[records.PreferenceRecord], encoder: Any, arguments: Any) -> None:
    from trace_jax.sources import show

    colour = not arguments.no_color and sys.stdout.isatty()
    print(f"\n{show.legend(colour=colour)}")
    for record in shown:
        print()
        try:
            print("\n".join(show.lines(record, encoder, colour=colour)))
        except InputError as error:  # one that does not fit, say
            print(error)


def _convert(arguments: argparse.Namespace) -> None:
    found = _found(arguments)
    records.write_jsonl(arguments.out, (record.to_json() for record in found))
    print(errors.printable(f"{found.counts}: {arguments.out}"))


def _export(arguments: argparse.Namespace) -> None:
    from trace_jax.sources import export

    for name, n in export.export(arguments.workdir, arguments.out, arguments.format).items():
        print(errors.printable(f"{n} rows: {arguments.out / name}.{arguments.format}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
