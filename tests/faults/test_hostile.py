"""Hostile input of every kind: no traceback, no hang, no wrong verdict.

TRACE_SOAK_INPUTS says how many inputs there are in all (make soak: 100,000).
"""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import sqlite3
import struct
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import yaml

from faults import mutations
from trace_jax import config as config_lib
from trace_jax import models, overrides, policy, sources, validation
from trace_jax.errors import InputError
from trace_jax.judges import gemini_reply
from trace_jax.judges import store as stores
from trace_jax.models import hf_weights

KINDS = 14
EACH = int(os.environ.get("TRACE_SOAK_INPUTS", "1600")) // KINDS
HANG_S = 20


@contextlib.contextmanager
def _no_longer_than(seconds: float):
    def late(*_):
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _all(name: str, make, attempt) -> None:
    """make(chance) -> an input; attempt(input) may raise InputError, and nothing else."""
    refused = 0
    for number in range(EACH):
        given = make(random.Random(f"{name} {number}"))
        try:
            with _no_longer_than(HANG_S):
                attempt(given)
        except InputError as error:
            refused += 1
            assert 0 < len(str(error)) < 2000, (number, given)
        except Exception as error:
            raise AssertionError(f"{name} {number}: {error!r} for {given!r:.600}") from error
    assert 0 < refused or EACH < 100, f"{name}: nothing was refused"


ROWS = [
    {"prompt": "Say hello", "chosen": "Hello!", "rejected": "No."},
    {"id": "b", "prompt": "Q", "chosen": "A", "rejected": "B", "labels": {"chosen": {"x": True}}},
    {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"prompt": "P", "response_0": "a", "response_1": "b", "is_response_0_safe": True,
     "is_response_1_safe": False, "better_response_id": 0, "safer_response_id": 0},
]  # fmt: skip


def _lines(chance: random.Random) -> bytes:
    return "\n".join(json.dumps(row) for row in _rows(chance)).encode()


def _rows(chance: random.Random) -> list:
    rows = [chance.choice(ROWS)] * 2 if chance.random() < 0.8 else ROWS
    if chance.random() < 0.6:
        rows = mutations.of_json(chance, rows)
    return rows if isinstance(rows, list) else [rows]


def _table(_: random.Random) -> bytes:
    return b'prompt,chosen,rejected\n"a ""b""",c,d\ne,f,"g\nh"\n'


def _gzip(chance: random.Random) -> bytes:
    return gzip.compress(_lines(chance), mtime=0)


def _parquet(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    rows = [row for row in _rows(chance) if isinstance(row, dict)]
    try:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, buffer, write_page_checksum=chance.random() < 0.5)
    except (pyarrow.ArrowException, OverflowError, TypeError, UnicodeError):  # a column of two
        text = [str(row).encode(errors="replace") for row in rows]
        table = pyarrow.table({"prompt": text, "chosen": text, "rejected": [b"no"] * len(text)})
        pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _dialogues(chance: random.Random) -> bytes:
    """Turns of HH: missing, empty, twice, with markers inside and at odd places."""
    pieces = ("\n\nHuman:", "\n\nAssistant:", "\n\nHuman: Hi", "\n\nAssistant: Yes", " ", "\n",
              "Human:", "\n\nAssistant", "No", "\u2028\n\nHuman:", "\r\n\r\nHuman: Hi")  # fmt: skip

    def dialogue() -> str:
        return "".join(chance.choices(pieces, k=chance.randint(0, 6)))

    start = "\n\nHuman: Hi\n\nAssistant:" if chance.random() < 0.8 else dialogue()
    if chance.random() < 0.5:  # the beginning that both share
        start += " Yes" + dialogue() + "\n\nHuman: Go on\n\nAssistant:"
    row = {name: start + chance.choice((f" {name}", dialogue())) for name in ("chosen", "rejected")}
    return json.dumps(row).encode()


# ending, form, what makes a file, how often its bytes are changed afterwards
FILES = {
    "jsonl": ("jsonl", "auto", _lines, 0.5),
    "csv": ("csv", "auto", _table, 1.0),
    "json": ("json", "auto", lambda chance: json.dumps(_rows(chance)).encode(), 0.5),
    "gzip": ("jsonl.gz", "auto", _gzip, 0.8),
    "parquet": ("parquet", "auto", _parquet, 0.5),
    "hh": ("jsonl", "hh", _dialogues, 0.2),
}


@pytest.mark.parametrize("kind", FILES)
def test_record_files(tmp_path, kind):
    ending, form, write, changed = FILES[kind]
    path, reading = tmp_path / f"pairs.{ending}", sources.Reading(form=form)

    def make(chance: random.Random) -> bytes:
        data = write(chance)
        return mutations.of_bytes(chance, data) if chance.random() < changed else data

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        for record in sources.read_records(str(path), reading)[0]:
            json.dumps(record.to_json(), ensure_ascii=False).encode()  # what records.jsonl holds

    _all(f"records {kind}", make, attempt)


def test_policy_files():
    shipped = [(policy._folder() / f"{name}.yaml").read_text() for name in policy.shipped()]

    def make(chance: random.Random) -> str:
        text = chance.choice(shipped)
        if chance.random() < 0.5:
            changed = mutations.of_json(chance, yaml.safe_load(text))
            with contextlib.suppress(yaml.YAMLError, UnicodeError):
                return yaml.safe_dump(changed, allow_unicode=True)
        return mutations.of_bytes(chance, text.encode()).decode("utf-8", "replace")

    def attempt(text: str) -> None:
        found = policy.parse(text)
        assert found.clauses and found.hash

    _all("policy", make, attempt)


CLAUSES = [policy.Clause(name, "tier", "a requirement") for name in ("kind", "true")]


def _response(text: str, finish: str = "STOP"):
    part = types.SimpleNamespace(text=text, thought=False)
    candidate = types.SimpleNamespace(
        content=types.SimpleNamespace(parts=[part]), finish_reason=finish
    )
    return types.SimpleNamespace(candidates=[candidate], prompt_feedback=None)


def test_judge_replies():
    """What is taken for a verdict says so itself, clause by clause; all else is asked again."""
    answers = [{"clause": c.id, "verdict": "compliant", "confidence": 0.9} for c in CLAUSES]
    good = {"reason": "because", "answers": answers}

    def make(chance: random.Random) -> str:
        if chance.random() < 0.6:
            return json.dumps(mutations.of_json(chance, good))
        return mutations.of_bytes(chance, json.dumps(good).encode()).decode("utf-8", "replace")

    def attempt(text: str) -> None:
        try:
            _, _, verdicts = gemini_reply.verdicts(_response(text), CLAUSES)
        except gemini_reply.Malformed as error:
            raise InputError(str(error)) from error
        said = {a["clause"]: a["verdict"] for a in json.loads(text)["answers"]}
        meant = {"compliant": "compliant", "violating": "violating", "unsure": "abstain"}
        assert {c.id: v.status for c, v in verdicts.items()} == {
            k: meant[v] for k, v in said.items()
        }
        for verdict in verdicts.values():
            assert verdict.probability is None or 0 <= verdict.probability <= 1

    _all("reply", make, attempt)


def test_config_overrides():
    base = config_lib.base_config()
    keys = list(config_lib.flatten(base))

    def make(chance: random.Random) -> dict[str, str]:
        chosen = chance.sample(keys, chance.randint(1, 3))
        if chance.random() < 0.1:
            chosen[0] += chance.choice((".x", "x", "."))
        return {key: str(chance.choice(mutations.NASTY)) for key in chosen}

    def attempt(changes: dict[str, str]) -> None:
        found = config_lib.resolved(config_lib.with_overrides(base, changes))
        validation.validate(found)

    _all("config", make, attempt)


def test_override_files(tmp_path):
    path = tmp_path / "overrides.jsonl"
    rows = [{"id": "a", "action": "INVERT"}, {"id": "b", "chosen": "compliant"}]

    def make(chance: random.Random) -> bytes:
        changed = mutations.of_json(chance, rows)
        changed = changed if isinstance(changed, list) else [changed]
        data = "\n".join(json.dumps(row) for row in changed).encode()
        return mutations.of_bytes(chance, data) if chance.random() < 0.3 else data

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        overrides.read(path, {"a", "b"})

    _all("overrides", make, attempt)


def test_judgement_stores(tmp_path):
    """A damaged store is refused, or gives the verdicts that it was given."""
    path = tmp_path / "store.sqlite"
    reader = stores.Reader("judge", "model", "template", "settings")
    statuses = ("compliant", "violating", "abstain")
    store = stores.Store(path)
    truth = {}
    for i in range(40):
        verdict = policy_verdict(statuses[i % 3])
        store.add(reader, f"p{i}", "r", stores.Call("ok"), dict.fromkeys(CLAUSES, verdict))
        truth[stores.item_hash(f"p{i}", "r")] = verdict.status
    store.close()
    whole = path.read_bytes()

    def make(chance: random.Random) -> bytes:
        if chance.random() < 0.5:
            return mutations.of_bytes(chance, whole)
        return whole[: chance.randrange(len(whole))]

    def attempt(data: bytes) -> None:
        for beside in tmp_path.glob("store.sqlite*"):
            beside.unlink()
        path.write_bytes(data)
        found = stores.Store(path)
        try:
            for item, answers in found.find(reader, CLAUSES, list(truth)).items():
                for answer in answers.values():
                    assert answer.verdict.status == truth[item]
        finally:
            with contextlib.suppress(sqlite3.Error):
                found.close()

    _all("store", make, attempt)


def policy_verdict(status: str):
    from trace_jax import records

    return records.ClauseVerdict(status, None if status == "abstain" else 0.75)


def test_safetensors_headers(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    path = tmp_path / "model.safetensors"

    def make(chance: random.Random) -> bytes:
        changed = mutations.of_json(chance, header) if chance.random() < 0.7 else header
        text = json.dumps(changed).encode()
        data = struct.pack("<Q", len(text)) + text + bytes(32)
        return mutations.of_bytes(chance, data) if chance.random() < 0.5 else data

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.ExitStack() as files:
            for tensor in hf_weights._open(tmp_path, files).values():
                if tensor.shape in ((2, 3), (4,)):  # those that a model would have
                    read = tensor.read(*(slice(0, n) for n in tensor.shape))
                    assert read.shape == tensor.shape

    _all("safetensors", make, attempt)


def test_adapters(tmp_path):
    """adapter_config.json and what its factors are called: an adapted model, or one line."""
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "lora_alpha": 4,
        "bias": "none", "alpha_pattern": {"layers.0.self_attn.q_proj": 8}, "use_rslora": True,
        "init_lora_weights": True, "use_dora": False,
    }  # fmt: skip
    weight = "model.layers.0.self_attn.q_proj.weight"
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    shapes = {f"{module}.lora_A.weight": (2, 6), f"{module}.lora_B.weight": (4, 2)}
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(
        {weight: np.ones((4, 6), np.float32)}, tmp_path / "base/model.safetensors"
    )
    (tmp_path / "base/config.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def make(chance: random.Random) -> tuple[bytes, dict]:
        changed = mutations.of_json(chance, config) if chance.random() < 0.8 else config
        with contextlib.suppress(ValueError):
            data = json.dumps(changed).encode()
            if chance.random() < 0.3:
                data = mutations.of_bytes(chance, data)
            named = dict(shapes)
            if chance.random() < 0.3:
                key = chance.choice(sorted(named))
                shape = tuple(chance.randrange(4) for _ in range(chance.randrange(4)))
                named[key + chance.choice(["", "x", ".A"])] = shape
            return data, named
        return b"{", shapes

    def attempt(made: tuple[bytes, dict]) -> None:
        data, named = made
        (adapter / "adapter_config.json").write_bytes(data)
        tensors = {key: np.ones(shape, np.float32) for key, shape in named.items()}
        safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
        with contextlib.ExitStack() as files:
            read = hf_weights._open(adapter, files)[weight].read(slice(0, 4))
            assert read.shape == (4, 6) and np.isfinite(read).all()

    _all("adapter", make, attempt)


MODELS = [models.ModelConfig(61, 24, 40, 2, 4, 2, 6, 64, eos_token_ids=(2,), family=family).to_hf()
          for family in ("llama", "qwen2")]  # fmt: skip
MODELS += [
    MODELS[0] | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
                 "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 32}},
    MODELS[0] | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
                 "layer_types": ["sliding_attention", "full_attention"]},
]  # fmt: skip

NUMBERS = (0, 3, 2**31, 10**400, -1, 0.5, 1e308, float("inf"), float("nan"))


def test_model_configs(tmp_path):
    """config.json of a model: what is accepted is a model that can be laid out."""

    def make(chance: random.Random) -> bytes:
        changed = dict(chance.choice(MODELS))
        if chance.random() < 0.5:
            sizes = [key for key, value in changed.items() if type(value) in (int, float)]
            changed[chance.choice(sizes)] = chance.choice(NUMBERS)
        else:
            changed = mutations.of_json(chance, changed)
        with contextlib.suppress(ValueError):  # an integer of 400 digits and more
            data = json.dumps(changed).encode()
            return mutations.of_bytes(chance, data) if chance.random() < 0.3 else data
        return b"1" * 5000

    def attempt(data: bytes) -> None:
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_bytes(data)
        found = hf_weights.read_config(tmp_path)
        assert 0 < found.forward_flops(found.max_position_embeddings) < float("inf")
        assert found.query_scale > 0 and found.num_hidden_layers < 2**31
        again = models.ModelConfig.from_hf(json.loads(json.dumps(found.to_hf())))
        assert again == found

    _all("model config", make, attempt)
