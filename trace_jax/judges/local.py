"""A local model as a reader: P(compliant) from how likely it finds "Yes" against "No".

Both answers are branches of one packed row behind the question, one question a clause. Any
supported checkpoint will do; with a chat template the question is a user's turn.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trace_jax import model_folder, packing, records
from trace_jax.errors import InputError
from trace_jax.judges import reading, template
from trace_jax.judges import store as stores

_QUESTION = """

Does the response comply with the clause? Answer with one word, Yes or No."""
_COMPARISON = """

Which response complies better? Answer with one letter, A or B."""
_PLAIN = "\n\nAnswer:"  # where the tokenizer has no chat template
_LEFT_OUT = "\n[... {} characters left out ...]\n"
_TIE = 0.05  # P(a) nearer to 1/2 than this
_AT_ONCE = 64  # questions between two entries in the store
_SAMPLE = 1 << 20  # bytes at both ends of a weight file that its fingerprint is over
_HASH = hashlib.sha256(
    json.dumps([template.HASH, _QUESTION, _COMPARISON, _PLAIN, _LEFT_OUT, _TIE]).encode()
).hexdigest()[:16]

LoadModel = Callable[[str, str], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What changes answers; config section judge.local."""

    model: str
    dtype: str
    max_length: int
    compliant_from: float
    violating_below: float
    least_mass: float


class LocalReader:
    """Answers questions by one forward pass each.

    load_model(path, dtype) -> (model, tokenizer); None: as they lie in the folder, on one device.
    micro_rows: packed rows computed at once.

    Raises:
      InputError: no model is named, or the settings contradict each other.
    """

    clauses_per_call = 1
    collective = True

    def __init__(self, settings: Settings, load_model: LoadModel | None, *, micro_rows: int = 4):
        if not settings.model:
            raise InputError("judge local needs a model: --config.judge.local.model=DIRECTORY")
        if not 0 <= settings.violating_below <= settings.compliant_from <= 1:
            raise InputError(
                f"judge.local.violating_below={settings.violating_below} must not be above "
                f"compliant_from={settings.compliant_from}, both from 0 to 1"
            )
        if settings.max_length < 256:
            raise InputError("judge.local.max_length must be at least 256 tokens")
        self.settings, self._load, self._micro_rows = settings, load_model, micro_rows

    @functools.cached_property
    def identity(self) -> stores.Reader:
        """Names the model by its files' content, not only by its path."""
        parameters = dataclasses.asdict(self.settings)
        del parameters["model"]
        parameters["weights"] = fingerprint(self._directory)
        name = Path(self.settings.model).name
        return stores.Reader("local", name, json.dumps(parameters, sort_keys=True), _HASH)

    def ask(
        self,
        questions: Sequence[reading.Question],
        answered: Callable[[reading.Question, stores.Call, reading.Verdicts], None],
    ) -> None:
        """Answers all questions; see `reading.Reader`."""
        for start in range(0, len(questions), _AT_ONCE):
            part = questions[start : start + _AT_ONCE]
            texts = [(q.prompt, q.response, *q.clauses) for q in part]
            encoded = [self._encoded(*text) for text in texts]
            logps = self._logprobs(encoded)
            for question, e, (yes, no) in zip(part, encoded, logps, strict=True):
                (clause,) = question.clauses
                answered(question, _call(e, yes, no, "Yes", "No"), {clause: self._verdict(yes, no)})

    def compare(
        self,
        questions: Sequence[reading.Comparison],
        answered: Callable[[reading.Comparison, stores.Call, str | None], None],
    ) -> None:
        """The same for comparisons: A or B, a tie where they are about equally likely."""
        for start in range(0, len(questions), _AT_ONCE):
            part = questions[start : start + _AT_ONCE]
            encoded = [self._encoded_comparison(q) for q in part]
            logps = self._logprobs(encoded)
            for question, e, (a, b) in zip(part, encoded, logps, strict=True):
                answered(question, _call(e, a, b, "A", "B"), self._better(a, b))

    @functools.cached_property
    def _directory(self) -> Path:
        return model_folder.resolve(self.settings.model)

    @functools.cached_property
    def _model(self) -> tuple[Any, Any]:
        if self._load is not None:
            return self._load(str(self._directory), self.settings.dtype)
        return _load(self._directory, self.settings.dtype)

    @functools.cached_property
    def _max_length(self) -> int:
        return min(self.settings.max_length, self._model[0].config.max_position_embeddings)

    def _encoded(self, prompt: records.Text, response: records.Text, clause: Any):
        def question(texts: Sequence[records.Text]) -> str:
            return template.instruction([clause]) + "\n" + template.material(*texts) + _QUESTION

        return self._fitted(question, [prompt, response], ("Yes", "No"))

    def _encoded_comparison(self, q: reading.Comparison):
        def question(texts: Sequence[records.Text]) -> str:
            instruction = template.comparison_instruction(q.clauses)
            return instruction + "\n" + template.comparison_material(*texts) + _COMPARISON

        return self._fitted(question, [q.prompt, q.a, q.b], ("A", "B"))

    def _fitted(
        self, question: Callable[[Sequence], str], texts: list[records.Text], answers: Sequence[str]
    ) -> Any:
        """The question's tokens; the middle of its longest text is left out until they fit."""
        texts = [_mapped(_cut(text, 8 * self._max_length), self._plain) for text in texts]
        while True:
            asked = question(texts)
            encoded = self._tokens(asked, answers)
            longest = max(len(branch) for branch in encoded.branches)
            excess = len(encoded.prompt) + longest - self._max_length
            if excess <= 0:
                return encoded
            sizes = [_size(text) for text in texts]
            at = sizes.index(max(sizes))
            if sizes[at] < 200:
                raise InputError(
                    f"judge.local.max_length={self._max_length} leaves no room for a response "
                    "beside the clause; raise it, or use a model with a longer context"
                )
            per_token = max(1.0, len(asked) / len(encoded.prompt))
            texts[at] = _cut(texts[at], min(sizes[at] - 100, int(sizes[at] - excess * per_token)))

    def _tokens(self, asked: str, answers: Sequence[str]) -> Any:
        from trace_jax import encoding

        tokenizer = self._model[1]
        encoder = encoding.Encoder(
            tokenizer, max_length=1 << 30, end_id=None
        )  # it caches: no reuse
        if getattr(tokenizer, "chat_template", None):
            return encoder.encode([{"role": "user", "content": asked}], answers)
        return encoder.encode(asked + _PLAIN, [f" {answer}" for answer in answers])

    @functools.cached_property
    def _plain(self) -> Callable[[str], str]:
        """Writes a text without control tokens: it shall not end its turn."""
        from trace_jax import encoding

        return encoding.plain_text(self._model[1])

    def _logprobs(self, encoded: Sequence[Any]) -> list[list[float]]:
        from trace_jax import logprobs

        length = packing.round_up(max(e.row_length for e in encoded), 64)
        most = packing.round_up(self._max_length + 4, 64)
        row_length = max(length, min(most, 1 << (length - 1).bit_length()))  # few programs
        return logprobs.of_texts(
            self._model[0], encoded, row_length=row_length, micro_rows=self._micro_rows
        ).tolist()

    def _verdict(self, yes: float, no: float) -> records.ClauseVerdict:
        probability = _share(yes, no)
        if math.exp(yes) + math.exp(no) < self.settings.least_mass:
            return records.ClauseVerdict("abstain", None)  # it would say neither
        if probability >= self.settings.compliant_from:
            return records.ClauseVerdict("compliant", probability)
        if probability < self.settings.violating_below:
            return records.ClauseVerdict("violating", probability)
        return records.ClauseVerdict("abstain", probability)

    def _better(self, a: float, b: float) -> str:
        if math.exp(a) + math.exp(b) < self.settings.least_mass:
            return "undecided"
        share = _share(a, b)
        if abs(share - 0.5) < _TIE:
            return "tie"
        return "a" if share > 0.5 else "b"


def fingerprint(directory: Path) -> str:
    """16 hex digits over config, tokenizer and both ends of every weight file of a model.

    Of an adapter they are over its model's too.
    """
    digest = hashlib.sha256()
    for file in (f for part in model_folder.chain(directory) for f in sorted(part.glob("*"))):
        if file.suffix not in (".json", ".safetensors", ".model", ".jinja"):
            continue
        with open(file, "rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(0, size - _SAMPLE))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _load(directory: Path, dtype: str) -> tuple[Any, Any]:
    from trace_jax import encoding, models
    from trace_jax.models import hf_weights

    module = models.load(directory, dtype=dtype)
    tokenizer = encoding.load_tokenizer(directory)
    hf_weights.check_tokenizer(module.config, tokenizer)
    return module, tokenizer


def _call(encoded: Any, first: float, second: float, *names: str) -> stores.Call:
    raw = json.dumps({names[0]: round(first, 4), names[1]: round(second, 4)})
    return stores.Call("ok", input_tokens=encoded.row_length, raw=raw)


def _share(first: float, second: float) -> float:
    """exp(first) of exp(first) + exp(second)."""
    difference = second - first
    return 1 / (1 + math.exp(difference)) if difference < 700 else 0.0


def _mapped(text: records.Text, change: Callable[[str], str]) -> records.Text:
    if isinstance(text, str):
        return change(text)
    return [message | {"content": change(message["content"])} for message in text]


def _size(text: records.Text) -> int:
    return len(text) if isinstance(text, str) else max(len(m["content"]) for m in text)


def _cut(text: records.Text, size: int) -> records.Text:
    """The text without its middle, about `size` characters; of a chat its longest message."""
    if _size(text) <= size:
        return text
    if isinstance(text, str):
        half = max(0, size // 2)
        kept = text[:half], text[len(text) - half :]
        return _LEFT_OUT.format(len(text) - 2 * half).join(kept)
    longest = max(range(len(text)), key=lambda i: len(text[i]["content"]))
    message = text[longest] | {"content": _cut(text[longest]["content"], size)}
    return _cut([*text[:longest], message, *text[longest + 1 :]], size + 60)
