"""What a row means: preference pairs in the forms that they come in.

    pairs   prompt, chosen, rejected (explicit), or chosen and rejected that begin with the prompt
            (implicit); texts or chat messages: TRL's standard and conversational forms. Where the
            responses are chats and the prompt is a text, it is what the user said in them
    hh      chosen and rejected as "\\n\\nHuman: ... \\n\\nAssistant: ..." dialogues
    pku     PKU-SafeRLHF: two responses, which is the safer one, harm categories, severity
    xstest  XSTest completions with people's labels; pairs are made of several models' (xstest.py)

Every form gives `Pair`s. What is malformed is an InputError; what the data mean to leave out is
`Skipped`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from trace_jax import records
from trace_jax.errors import InputError
from trace_jax.sources import pku
from trace_jax.sources.files import Row

NAMES = ("auto", "pairs", "hh", "pku", "xstest")
ABSENT: Any = object()  # the id of a row without one
_TURNS = ("\n\nHuman:", "\n\nAssistant:")
_XSTEST_PROMPT = {"type", "label", "focus", "note"}  # columns of its file of prompts
_ASIDE = "set the column aside with data.columns=other=labels"
_NO_CHAT = "'prompt' is no list of messages, as the responses are"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with its better and its worse response; `ignored` are columns nobody reads."""

    prompt: records.Text
    chosen: records.Text
    rejected: records.Text
    id: Any = ABSENT
    labels: Any = None
    ignored: tuple[str, ...] = ()


class Skipped(Exception):
    """A row that gives no pair by the rules of its form; the text says why."""


def reader(name: str, first: Row, where: str) -> Callable[[Row, str], Pair]:
    """The function (row, where) -> Pair of a form; `first` decides for "auto".

    Raises:
      InputError: the form is not known, or the columns are none that it knows.
    """
    if name == "auto":
        name = _recognised(first, where)
    return {"pairs": _pair, "hh": _hh, "pku": _pku}[name]


def is_xstest(name: str, first: Row) -> bool:
    """Whether rows are completions, of which pairs have to be made."""
    return name == "xstest" or (name == "auto" and {"completion", "final_label"} <= first.keys())


def prompt_labels(row: Row, name: str, where: str) -> Mapping[str, Any]:
    """Annotations of a held-out prompt: column `labels`, or what form xstest makes of its type."""
    of_xstest = name == "auto" and "labels" not in row and row.keys() >= _XSTEST_PROMPT
    if of_xstest or is_xstest(name, row):
        from trace_jax.sources import xstest

        return xstest.prompt_labels(row)
    found = labels(row, where) or {}
    return found["prompt"] if isinstance(found.get("prompt"), Mapping) else found


def prompt(row: Row, name: str, where: str) -> records.Text:
    """Of a row of prompts: column `prompt`, or where the row is a pair in form `name`, the pair's.

    Raises:
      InputError: the row has none.
    """
    is_pair = {"chosen", "rejected"} <= row.keys()
    has_own = "prompt" in row and not (
        isinstance(row["prompt"], str) and isinstance(row.get("chosen"), list)
    )
    if is_pair and not has_own:
        return reader("auto" if name == "xstest" else name, row, where)(row, where).prompt
    return text(row, "prompt", where)


def labels(row: Row, where: str) -> Mapping[str, Any] | None:
    """Column `labels`: a mapping, or one as JSON, which is how CSV has it; None where it is blank.

    Raises:
      InputError: it is something else, or holds what no JSON file can keep.
    """
    found = row.get("labels")
    try:
        if isinstance(found, str) and found.strip():
            found = json.loads(found)
        elif isinstance(found, str) or found != found:  # NaN, a gap in a data frame
            found = None
        json.dumps(found, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: 'labels' is not JSON ({error}); mend it, or {_ASIDE}"
        ) from error
    if found is not None and not isinstance(found, Mapping):
        raise InputError(f"{where}: 'labels' must map names to values; mend it, or {_ASIDE}")
    return found


def _recognised(row: Row, where: str) -> str:
    if {"response_0", "response_1"} <= row.keys():
        return "pku"
    if {"chosen", "rejected"} <= row.keys():
        dialogues = all(
            isinstance(row[key], str) and row[key].startswith(_TURNS[0])
            for key in ("chosen", "rejected")
        )
        return "hh" if dialogues and "prompt" not in row else "pairs"
    missing = [key for key in ("prompt", "chosen", "rejected") if key not in row]
    raise InputError(
        f"{where}: {missing[0]!r} is missing; the columns are {', '.join(row) or 'none'}: name "
        "them, as in data.columns=prompt=QUESTION,chosen=BETTER,rejected=WORSE (sources: --columns)"
    )


def renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """The row under our names; `columns` has our name -> theirs."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise InputError(
                f"{where}: no column {theirs!r} for {ours!r}; the columns are {', '.join(row)}"
            )
    taken = set(columns.values())
    return {k: v for k, v in row.items() if k not in taken} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }


def columns_of(text: str) -> dict[str, str]:
    """Reads "prompt=question,chosen=good" into our name -> theirs.

    Raises:
      InputError: it does not read like that.
    """
    found: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (equals and ours and theirs):
            raise InputError(
                f"columns: {part!r} should be ours=theirs, as in "
                "prompt=question,chosen=good,rejected=bad"
            )
        found[ours] = theirs
    return found


def text(row: Row, key: str, where: str, *, may_be_empty: bool = False) -> records.Text:
    """A text or list of chat messages that is not empty."""
    if key not in row:
        raise InputError(f"{where}: {key!r} is missing; add it or delete the line")
    value = row[key]
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        last = value[-1]["content"]
        value = [{"role": message["role"], "content": message["content"]} for message in value]
    elif isinstance(value, str):
        last = value
    else:
        raise InputError(
            f"{where}: {key!r} must be a text or a list of chat messages with role and content"
        )
    if not last.strip() and not may_be_empty:
        raise InputError(f"{where}: {key!r} is empty; fix or delete the line")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _pair(row: Row, where: str) -> Pair:
    ignored = _other_keys(row, ("prompt", "chosen", "rejected"), ("id", "labels"))
    if "prompt" in row:
        prompt, chosen, rejected = (text(row, k, where) for k in ("prompt", "chosen", "rejected"))
        if isinstance(prompt, str) and list in (type(chosen), type(rejected)):
            _check_alike(chosen, rejected, where)
            prompt, chosen, rejected = _in_chats(prompt, chosen, rejected, where)
        chosen, rejected = (_without(prompt, response) for response in (chosen, rejected))
        prompt, chosen, rejected = _with_shared(prompt, chosen, rejected, where)
    else:
        chosen, rejected = (text(row, key, where) for key in ("chosen", "rejected"))
        _check_alike(chosen, rejected, where)
        split = _split_messages if isinstance(chosen, list) else _split_texts
        prompt, chosen, rejected = split(chosen, rejected, f"{where}: {_missing_prompt(row)}")
    for key, response in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(response, f"{where}: {key!r}")
    prompt = text({"prompt": prompt}, "prompt", where)  # it may end with a turn of the responses
    return Pair(prompt, chosen, rejected, row.get("id", ABSENT), labels(row, where), ignored)


def _check_alike(chosen: records.Text, rejected: records.Text, where: str) -> None:
    if type(chosen) is not type(rejected):
        raise InputError(f"{where}: one response is a chat and the other a text; mend it")


def _in_chats(prompt: str, chosen: list, rejected: list, where: str) -> tuple[list, list, list]:
    """A prompt that is a text beside responses that are chats, as in UltraFeedback: a chat too.

    The messages before the last, the same in both, where they hold the text; before answers alone
    it is the user's turn.
    """
    if len(chosen) == len(rejected) == 1:
        return [{"role": "user", "content": prompt}], chosen, rejected
    asked, chosen, rejected = _split_messages(chosen, rejected, f"{where}: {_NO_CHAT}")
    if not any(prompt.strip() in message["content"] for message in asked):
        raise InputError(
            f"{where}: 'prompt' is a text that is in none of the messages before the answers; give "
            "it as messages, or the answers as texts (then data.as_chat=true makes chats of both)"
        )
    return asked, chosen, rejected


def _missing_prompt(row: Row) -> str:
    others = ", ".join(key for key in row if key not in ("chosen", "rejected", "id", "labels"))
    hint = f" (is it one of {others}? name it: data.columns=prompt=...)" if others else ""
    return f"'prompt' is missing{hint}"


def _without(prompt: records.Text, response: records.Text) -> records.Text:
    """A response given as the whole conversation, without the prompt, or end of it, it repeats."""
    if not (isinstance(response, list) and isinstance(prompt, list)) or len(response) < 2:
        return response
    ends = (prompt[n:] for n in range(len(prompt)))
    return next((response[len(x) :] for x in ends if response[: len(x)] == x), response)


def _with_shared(
    prompt: records.Text, chosen: records.Text, rejected: records.Text, where: str
) -> tuple[records.Text, records.Text, records.Text]:
    """The turns before the answers that both responses begin with are the prompt's."""
    if not all(isinstance(text, list) for text in (prompt, chosen, rejected)):
        return prompt, chosen, rejected
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    shared = chosen[:n]
    if shared[-len(prompt) :] == prompt:  # behind a system message, say
        return shared, chosen[n:], rejected[n:]
    if n and shared[0]["role"] in (prompt[-1]["role"], "system"):
        raise InputError(
            f"{where}: the responses neither repeat 'prompt' nor go on from it; mend the line"
        )
    return prompt + shared, chosen[n:], rejected[n:]


def _check_answer(response: records.Text, where: str) -> None:
    """Of a chat one message is left once the turns before it are the prompt's."""
    if isinstance(response, str):
        return
    if [message["role"] for message in response] != ["assistant"]:
        roles = ", ".join(message["role"] for message in response) or "nothing"
        raise InputError(
            f"{where} must be one message of the assistant behind those of the prompt that both "
            f"responses share, and is {roles}; mend the line"
        )


def _split_messages(chosen: list, rejected: list, where: str) -> tuple[Any, Any, Any]:
    """Implicit prompt: all messages before the last, the same in both."""
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise InputError(
            f"{where}, and chosen and rejected do not begin with the same messages followed by one "
            "each; give the prompt"
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _split_texts(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Implicit prompt: the longest common beginning that ends before a space."""
    n = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        n += 1
    cut = max(chosen.rfind(" ", 0, n), chosen.rfind("\n", 0, n))
    if cut <= 0 or not chosen[:cut].strip():
        raise InputError(
            f"{where}, and chosen and rejected have no common beginning; give the prompt"
        )
    if not (chosen[cut:].strip() and rejected[cut:].strip()):
        raise InputError(
            f"{where}, and a response is empty behind the beginning that both share; give the "
            "prompt"
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _hh(row: Row, where: str) -> Pair:
    ignored = _other_keys(row, ("chosen", "rejected"), ("id", "labels"))
    sides = {}
    for key in ("chosen", "rejected"):
        value = text(row, key, where)
        if not isinstance(value, str):
            raise InputError(f"{where}: {key!r} must be a dialogue in one text (form hh)")
        sides[key] = _turns(value, f"{where}: {key!r}")
    chosen, rejected = sides["chosen"], sides["rejected"]
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f"{where}: the dialogues differ before the last turn; leave the line out")
    return Pair(
        chosen[:-1],
        chosen[-1]["content"],
        rejected[-1]["content"],
        row.get("id", ABSENT),
        labels(row, where),
        ignored,
    )


def _turns(dialogue: str, where: str) -> list[dict[str, str]]:
    """The messages of a raw dialogue, which ends with an assistant's turn.

    A turn begins with its marker at the start of a paragraph; two of one role in a row are one.
    """
    if not dialogue.startswith(_TURNS[0]):
        raise InputError(f"{where} does not begin with {_TURNS[0].strip()!r}; mend it")
    messages: list[dict[str, str]] = []
    rest = dialogue
    while rest:
        role = "user" if rest.startswith(_TURNS[0]) else "assistant"
        body = rest[len(_TURNS[role == "assistant"]) :]
        ends = [at for marker in _TURNS if (at := body.find(marker)) >= 0]
        end = min(ends, default=len(body))
        content, rest = body[:end].strip(), body[end:]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise InputError(f"{where} does not end with an assistant's turn; leave the line out")
    if not all(message["content"] for message in messages):
        raise InputError(f"{where} has an empty turn; leave the line out")
    return messages


def _pku(row: Row, where: str) -> Pair:
    responses = [text(row, f"response_{n}", where) for n in (0, 1)]
    prompt = text(row, "prompt", where)
    safer = row.get("safer_response_id")
    if safer not in (0, 1, "0", "1"):
        if "safer_response_id" not in row:
            raise InputError(f"{where}: 'safer_response_id' is missing; is this PKU-SafeRLHF?")
        raise Skipped("neither response is the safer one")
    better = int(safer)
    labels = {
        "chosen": pku.labels(row, better, where),
        "rejected": pku.labels(row, 1 - better, where),
    }
    return Pair(prompt, responses[better], responses[1 - better], row.get("id", ABSENT), labels)


def _other_keys(row: Row, texts: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of a row that nothing reads; those of chat messages as "chosen.name"."""
    of_messages = {
        f"{key}.{inner}"
        for key in texts
        if isinstance(row.get(key), list)
        for message in row[key]
        if isinstance(message, dict)
        for inner in message.keys() - {"role", "content"}
    }
    return tuple((row.keys() - {*texts, *others}) | of_messages)
