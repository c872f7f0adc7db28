"""Texts become tokens: a prompt once, and behind it the responses as branches. Host side only."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trace_jax import model_folder, records
from trace_jax.errors import InputError

_OF_NO_FAMILY = ("PreTrainedTokenizerFast", "TokenizersBackend")
_TAKEN_BY = (None, "llama")  # types of models
# What templates that write today's date are given, so that a run of two days has one format. It is
# what Llama 3.1's falls back to.
_DATE = "26 Jul 2024"


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt in tokens and the responses scored after it.

    Attributes:
      prompt: tokens that all branches share; at least one.
      branches: per response, all tokens after `prompt`.
      skip: per response, how many leading tokens of its branch still belong to the prompt text and
        carry no loss (where the tokenizer splits the same prompt differently before different
        responses).
    """

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    skip: tuple[int, ...]

    @property
    def row_length(self) -> int:
        """Row positions it takes: the shared part without its last token, then each branch."""
        return len(self.prompt) - 1 + sum(len(b) for b in self.branches)


class Encoder:
    """Turns (prompt, responses) into `Encoded` under one tokenizer, template and length limit.

    Of chats only the template writes control tokens: in a message that spells one it is written
    apart (`plain_text`). Plain prompts and their responses are taken as they are.

    Args:
      tokenizer: a transformers tokenizer.
      max_length: most tokens of a prompt and one response together.
      end_id: token appended to every response, or None.
      turn_end_id: the same for responses to chats; None: as end_id.
      cut_responses: cut a response that does not fit at its end; it then has no end_id.

    Attributes:
      truncated_prompts, truncated_responses: how many were cut.
      control_texts: how many chats, or responses to one, spelled a control token.
    """

    def __init__(
        self,
        tokenizer,
        *,
        max_length: int,
        end_id: int | None,
        turn_end_id: int | None = None,
        cut_responses: bool = False,
    ):
        self.tokenizer, self.max_length, self.end_id = tokenizer, max_length, end_id
        self.turn_end_id = end_id if turn_end_id is None else turn_end_id
        self.cut_responses = cut_responses
        self.truncated_prompts = self.truncated_responses = self.control_texts = 0
        self._plain = plain_text(tokenizer)
        self._cache: dict[tuple[str, str, int | None], tuple[tuple[int, ...], int]] = {}

    def prompt_text(self, prompt: records.Text, name: str = "") -> str:
        """The text in front of the response: the prompt, or the chat template's.

        Raises:
          InputError: a chat, and there is no template or it does not take this one (`name`).
        """
        if isinstance(prompt, str):
            return prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "records are chats but the tokenizer has no chat template; set one or use plain "
                "text"
            )
        plain = [{name: self._plain(text) for name, text in m.items()} for m in prompt]
        self.control_texts += plain != prompt
        return _rendered(self.tokenizer, plain, name, add_generation_prompt=True)

    def prompt_tokens(
        self, prompt: records.Text, name: str = "", *, new_tokens: int = 0
    ) -> tuple[int, ...]:
        """Tokens of a prompt alone, for generation of `new_tokens`; what does not fit before them
        is cut from the left (counted in `truncated_prompts`), as `encode` does."""
        tokens = self._tokens(self.prompt_text(prompt, name), "", None)[0]
        excess = len(tokens) - max(1, self.max_length - new_tokens)
        if excess > 0:
            self.truncated_prompts += 1
        return self._cut_left(tokens, max(0, excess))

    def response_text(self, prompt_tokens: Sequence[int], tokens: Sequence[int]) -> str:
        """Text of sampled tokens, decoded with the prompt, so that a leading space survives."""
        whole = self.tokenizer.decode([*prompt_tokens, *tokens], skip_special_tokens=True)
        return whole[len(self.tokenizer.decode(prompt_tokens, skip_special_tokens=True)) :]

    def encode(
        self, prompt: records.Text, responses: Sequence[records.Text], name: str = ""
    ) -> Encoded:
        """Tokenises prompt and each response together and finds the boundary in token space.

        Truncation cuts the prompt from the left (counted in `truncated_prompts`), and responses
        only with `cut_responses` (counted as well); otherwise one that leaves no room for a prompt
        token is an InputError naming the record.
        """
        text = self.prompt_text(prompt, name)
        found = [self._response(prompt, response) for response in responses]
        end = self.end_id if isinstance(prompt, str) else self.turn_end_id
        pairs = [self._cut_right(*self._tokens(text, response, end)) for response in found]
        longest = max(len(tokens) - n_prompt for tokens, n_prompt in pairs)
        if longest >= self.max_length:
            raise InputError(
                f"record {name}: a response has {longest} tokens, the limit with its prompt is "
                f"data.max_length={self.max_length}; raise it, or set data.too_long=drop or cut"
            )
        shared = min(_common_prefix([t for t, _ in pairs]), min(n for _, n in pairs))
        if shared == 0:
            raise InputError(
                f"record {name}: its responses change how the whole prompt is tokenised, so they "
                "share no token of it; use a tokenizer with a beginning-of-text token"
            )
        excess = max(0, max(len(tokens) for tokens, _ in pairs) - self.max_length)
        if excess:
            self.truncated_prompts += 1
        return Encoded(
            prompt=self._cut_left(pairs[0][0][:shared], excess),
            branches=tuple(tokens[shared:] for tokens, _ in pairs),
            skip=tuple(n - shared for _, n in pairs),
        )

    def _response(self, prompt: records.Text, response: records.Text) -> str:
        given = response if isinstance(response, str) else response[-1]["content"]
        if isinstance(prompt, str):
            return given
        plain = self._plain(given)
        self.control_texts += plain != given
        return plain

    def _cut_right(self, tokens: tuple[int, ...], n_prompt: int) -> tuple[tuple[int, ...], int]:
        """Prompt and response without the response's end, if that may be cut and has to be.

        The prompt keeps its length up to half of the limit.
        """
        end = n_prompt + self.max_length - min(n_prompt, self.max_length // 2)
        if not self.cut_responses or len(tokens) <= end:
            return tokens, n_prompt
        self.truncated_responses += 1
        return tokens[:end], n_prompt

    def _cut_left(self, prompt: tuple[int, ...], excess: int) -> tuple[int, ...]:
        """The prompt without `excess` tokens at its left end, after its beginning-of-text token."""
        if not excess:
            return prompt
        first = int(prompt[0] == self.tokenizer.bos_token_id and len(prompt) > excess + 1)
        return prompt[:first] + prompt[min(excess + first, len(prompt) - 1) :]

    def _tokens(self, prompt: str, response: str, end: int | None) -> tuple[tuple[int, ...], int]:
        """Tokens of prompt + response, and how many are the prompt's (one astride is not)."""
        key = (prompt, response, end)
        if key not in self._cache:
            self._cache[key] = self._tokenise(prompt, response, end)
        return self._cache[key]

    def _tokenise(self, prompt: str, response: str, end: int | None) -> tuple[tuple[int, ...], int]:
        out = self.tokenizer(  # not verbose: what is too long is our affair
            prompt + response, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        tokens, ends = list(out["input_ids"]), [end for _, end in out["offset_mapping"]]
        n_prompt = sum(map(len(prompt).__ge__, ends))
        if self.tokenizer.bos_token_id is not None and tokens[:1] != [self.tokenizer.bos_token_id]:
            tokens, n_prompt = [self.tokenizer.bos_token_id, *tokens], n_prompt + 1
        if n_prompt == 0:
            raise InputError("an empty prompt needs a tokenizer with a beginning-of-text token")
        if response and end is not None:
            tokens.append(end)
        return tuple(tokens), n_prompt


def ends(tokenizer: Any) -> tuple[int, int]:
    """Tokens that end a text, and an answer in a chat.

    Raises:
      InputError: the tokenizer names no EOS.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer names no EOS; set --config.model.stop_ids=(id,)")
    of_turn = turn_end(tokenizer)
    return end, end if of_turn is None else of_turn


def turn_end(tokenizer: Any) -> int | None:
    """The control token with which the chat template ends an answer; None where there is none,
    or where it takes no such chat.

    It need not be the tokenizer's EOS: Gemma 2 ends its turns with <end_of_turn>.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = _rendered(tokenizer, chat, "", add_generation_prompt=False)
    except InputError:
        return None
    after = text.rpartition(answer)[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer(after, add_special_tokens=False).input_ids
    return next((i for i in tokens if i in special), None)


def _rendered(
    tokenizer: Any, chat: list[dict[str, str]], name: str, *, add_generation_prompt: bool
) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE
        )
    except (jinja2.TemplateError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        roles = ", ".join(m["role"] for m in chat)
        raise InputError(
            f"{f'record {name}: ' if name else ''}the chat template does not take these messages "
            f"({roles}): {first}"
        ) from error


def plain_text(tokenizer: Any) -> Callable[[str], str]:
    """A function that writes the tokenizer's control tokens apart: <|im_end|> as < |im_end|>.

    What it gives has no control token in it, so untrusted text cannot end its turn and begin
    another. Text that spells none comes back as it was. Control tokens are those that the tokenizer
    calls special.
    """
    added = tokenizer.added_tokens_decoder.values()
    names = sorted({t.content for t in added if t.special and len(t.content) > 1}, reverse=True)
    groups = itertools.groupby(names, key=lambda name: name[0])  # searched by their first character
    spelled = [re.compile("|".join(map(re.escape, group))) for _, group in groups]

    def apart(found: re.Match) -> str:
        return f"{found[0][0]} {plain(found[0][1:])}"

    def plain(text: str) -> str:
        for names in spelled:
            text = names.sub(apart, text)
        return text

    return plain


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    first, last = min(sequences), max(sequences)
    n = 0
    while n < len(first) and n < len(last) and first[n] == last[n]:
        n += 1
    return n


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The transformers tokenizer of a folder, or of a name on the hub, without remote code.

    An adapter that has none takes its model's.
    A tokenizer of no family's class beside a Llama, or beside no model, is read by that class
    itself: AutoTokenizer would return the same, but it imports PyTorch where that is installed,
    which takes seconds. (Beside a Qwen2 it returns that family's.)

    Raises:
      InputError: there is none, or it cannot be read.
    """
    import transformers

    if model_folder.is_adapter(Path(source)):
        source = model_folder.of_tokenizer(Path(source))
    try:
        if _of_no_family(Path(source)):
            return transformers.PreTrainedTokenizerFast.from_pretrained(source)
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: no tokenizer could be loaded ({first})") from error


def _of_no_family(folder: Path) -> bool:
    """Whether the folder names a class for tokenizer.json that AutoTokenizer would take."""
    if not (folder / "tokenizer.json").is_file():
        return False
    named = _json(folder / "tokenizer_config.json").get("tokenizer_class")
    return named in _OF_NO_FAMILY and _json(folder / "config.json").get("model_type") in _TAKEN_BY


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
