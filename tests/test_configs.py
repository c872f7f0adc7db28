"""Every experiment builds and validates; every command in the README is one that is taken."""

import importlib.util
import shlex
from pathlib import Path

import pytest

from trace_jax import compare, launch, policy, validation
from trace_jax import config as config_lib
from trace_jax.errors import InputError

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
        ("impact.path", "vjp", "one of jvp"),
        ("evaluate.splits", ("train",), "one of test"),
        ("data.source", "csv", "one of file, jsonl"),
    ],
)
def test_a_value_out_of_range_is_one_clear_line(key, value, said):
    c = config_lib.with_overrides(_config(ROOT / "configs" / "quickstart.py"), {key: value})
    with pytest.raises(InputError, match=said):
        validation.validate(c)


def _readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [shlex.split(line) for line in lines if line.startswith("python -m trace_jax.")]


def test_the_commands_of_the_readme_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = _readme_commands()
    assert len(commands) >= 3
    for command in commands:
        module, *arguments = command[2:]
        define = {
            "trace_jax.launch": launch.define_flags,
            "trace_jax.compare": compare.define_flags,
        }
        argv = [module, *arguments]
        values = define[module](argv)
        launch.parse_flags(values, argv)
        validation.validate(values.config, planning="--plan" in arguments)
