"""A small decoder trained from scratch, where there is no deployed model: its tokenizer and texts.

The text is that of the records themselves (both responses), or SynthValueBench's own corpus.
"""

from collections.abc import Sequence
from pathlib import Path

from trace_jax import encoding, records, synth
from trace_jax.errors import InputError

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(source: str, target: Path) -> None:
    """Writes the tokenizer of config key model.scratch.tokenizer to the folder `target`."""
    if source:
        save_tokenizer(Path(source), target)
    else:
        synth.tokenizer(target)


def save_tokenizer(source: Path, target: Path) -> None:
    """Writes the tokenizer at `source` to the folder `target`.

    source: a folder that transformers loads; or a bare tokenizer.json, whose vocabulary then has to
    hold <|endoftext|>, <|im_start|> and <|im_end|>, for a chat template (ChatML).
    """
    import tokenizers
    import transformers

    try:
        if source.is_dir():
            encoding.load_tokenizer(source).save_pretrained(str(target))
            return
        backend = tokenizers.Tokenizer.from_file(str(source))
    except InputError as error:
        raise InputError(f"model.scratch.tokenizer={error}") from error
    except Exception as error:  # the tokenizers library raises bare Exceptions
        what = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.scratch.tokenizer={source}: no tokenizer could be read ({what})"
        ) from error
    if any(backend.token_to_id(token) is None for token in _SPECIAL):
        raise InputError(
            f"model.scratch.tokenizer={source}: its vocabulary lacks {', '.join(_SPECIAL)} or some "
            "of them; give a folder with tokenizer_config.json instead"
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(target))


def texts(found: Sequence[records.PreferenceRecord]) -> list[tuple[records.Text, records.Text]]:
    """(prompt, response) of all records, each once, in order."""
    both = ((r.prompt, y) for r in found for y in (r.chosen, r.rejected))
    return list({records.content_id(x, y): (x, y) for x, y in both}.values())
