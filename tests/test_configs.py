"""Every experiment builds and validates; every command in the README is one that is taken."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from trace_jax import compare, launch, policy, study, validation
from trace_jax import config as config_lib
from trace_jax.errors import InputError
from trace_jax.evaluate import __main__ as evaluate
from trace_jax.models import lora

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def _config(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_experiment_builds_and_validates(path, tmp_path):
    c = _config(path)
    if c.data.source != "synth":
        (tmp_path / "config.json").write_text("{}")
        c.model.path = str(tmp_path)
    if c.data.source == "file" and not c.data.path:
        (tmp_path / "pairs.jsonl").touch()
        c.data.path = str(tmp_path / "pairs.jsonl")
    validation.validate(c)
    assert policy.load(c.policy.old).clauses and policy.load(c.policy.new).clauses
    with pytest.raises(AttributeError):
        c.train.learning_rat = 1.0  # locked


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.method", "grpo", "one of trace"),
        ("train.warmup_steps", 10**6, "must be below"),
        ("train.beta", 0.0, "greater than 0"),
        ("model.attention_block", -2, "a number of queries"),
        ("train.layer_rows", -1, "at least 0"),
        ("model.head_chunk", -3, "at least 0"),
        ("data.row_length", -5, "at least 0"),
        ("data.row_length", 150, "no room for a pair of data.max_length=96 .*row_length=192"),
        ("impact.micro_rows", 0, "greater than 0"),
        ("evaluate.micro_rows", 0, "greater than 0"),
        ("evaluate.temperature", -1.0, "at least 0"),
        ("correct.samples_per_round", 0, "greater than 0"),
        ("train.alpha_kl", -1.0, "at least 0"),
        ("train.alpha_nll", float("nan"), "at least 0"),
        ("train.b2", 1.0, "below 1"),
        ("impact.path", "vjp", "one of jvp"),
        ("impact.strength", 1.5, "a share"),
        ("evaluate.splits", ("train",), "one of test"),
        ("data.source", "csv", "one of file, jsonl"),
    ],
)
def test_a_value_out_of_range_is_one_clear_line(key, value, said):
    c = config_lib.with_overrides(_config(ROOT / "configs" / "quickstart.py"), {key: value})
    with pytest.raises(InputError, match=said):
        validation.validate(c)


@pytest.mark.parametrize("planning", [False, True])
@pytest.mark.parametrize("source", ["synth", "self_sampled"])
@pytest.mark.parametrize("key", ["data.path", "data.prompts_path"])
def test_a_file_that_no_source_would_read_is_one_clear_line(key, source, planning):
    changes = {"data.source": source, key: "mine.jsonl"}
    c = config_lib.with_overrides(_config(ROOT / "configs" / "quickstart.py"), changes)
    said = f"{key} is given, but data.source='{source}' reads none: add --config.data.source=file"
    with pytest.raises(InputError, match=re.escape(said)):
        validation.validate(c, planning=planning)


def test_a_parent_may_follow_runs_on_files(tmp_path):
    """It gives data.path itself, and the config file of the run before may name prompts."""
    (tmp_path / "config.json").write_text("{}")
    changes = {"data.source": "parent", "data.path": str(tmp_path), "parent": str(tmp_path),
               "data.prompts_path": "prompts.jsonl", "model.path": str(tmp_path)}  # fmt: skip
    c = config_lib.with_overrides(_config(ROOT / "configs" / "quickstart.py"), changes)
    validation.validate(c)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("rank", 0, "greater than 0"), ("targets", "q_proj,v_proj", "q is PEFT's q_proj")],
)
def test_bad_adapters_are_found_before_anything_is_paid_for(key, value, said):
    changes = {"train.adapters": "lora", f"train.lora.{key}": value}
    c = config_lib.with_overrides(_config(ROOT / "configs" / "quickstart.py"), changes)
    with pytest.raises(InputError, match=said):
        validation.validate(c)


def test_targets_of_adapters_are_those_that_the_model_has():
    assert validation.LORA_TARGETS == lora.TARGETS


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("evaluation", "methods", "replication"))]


def _commands(page: str) -> list[list[str]]:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [shlex.split(line) for line in lines if line.startswith("python -m trace_jax.")]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_pages_parse(monkeypatch, page):
    monkeypatch.chdir(ROOT)
    found = _commands(page)
    assert len(found) >= {"README.md": 3, "docs/methods.md": 0}.get(page, 2)
    flagged = {"launch": launch.define_flags, "compare": compare.define_flags}
    parsers = {"evaluate": evaluate._parser, "study": study._parser}
    for command in found:
        module, *arguments = command[2:]
        name = module.removeprefix("trace_jax.")
        if name in parsers:
            parsers[name]().parse_args(arguments)
            continue
        argv = [module, *arguments]
        values = flagged[name](argv)
        launch.parse_flags(values, argv)
        validation.validate(config_lib.resolved(values.config), planning=page != "README.md"
                            or "--plan" in arguments)  # fmt: skip
