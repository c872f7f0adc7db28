"""No pickle, no remote code, no shell, nothing evaluated; how an audit of dependencies ends."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Modules that make objects, or programs, of what they read.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path",
    "runpy.run_module", "torch.load", "pandas.read_pickle", "pd.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
}  # fmt: skip
STARTS = ("os.exec", "os.spawn", "os.posix_spawn")
LOADERS = {"yaml.load", "yaml.load_all"}
FLAGS = {"shell", "trust_remote_code", "allow_pickle"}  # of any call: False, or left out


def _dangers(source: str) -> list[str]:
    """What of the source is forbidden, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names if _is_forbidden(alias.name)]
            case ast.ImportFrom():
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name for name in whole if _is_forbidden(name)]
            case ast.Call():
                names = _of_call(node)
            case _:
                continue
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


def _is_forbidden(name: str) -> bool:
    return name.split(".")[0] in MODULES or name in CALLS | LOADERS or name.startswith(STARTS)


def _of_call(node: ast.Call) -> list[str]:
    name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
    safe = name in LOADERS and "Safe" in ast.unparse(node)
    found = [name] if _is_forbidden(name) and not safe else []
    for flag in FLAGS & given.keys():
        if ast.unparse(given[flag]) != "False":
            found.append(f"{flag}={ast.unparse(given[flag])}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import dill as d", "from joblib import load", "import os, marshal",
        "from os import system", "os.system(text)", "os.execvp(a, b)", "eval(text)", "exec(text)",
        "subprocess.run(text, shell=True)", "f(x, shell=flag)", "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "yaml.load(text)", "torch.load(p)",
        "yaml.load(text, Loader=yaml.Loader)", "from yaml import unsafe_load",
    ],
)  # fmt: skip
def test_what_is_forbidden_is_found(source):
    assert len(_dangers(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(text)", "yaml.safe_load(text)", "step.lower(x).compile()",
        "yaml.load(text, Loader=yaml.SafeLoader)", "f(p, trust_remote_code=False)",
        "loads(text)", "subprocess.run([program, text])",
    ],
)  # fmt: skip
def test_what_is_not_is_left_alone(source):
    assert _dangers(source) == []


def test_the_package_and_its_configs_do_nothing_of_it():
    files = [p for folder in ("trace_jax", "configs") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    dangers = {str(p.relative_to(ROOT)): _dangers(p.read_text(encoding="utf-8")) for p in files}
    assert {name: found for name, found in dangers.items() if found} == {}


@pytest.mark.parametrize(
    ("said", "code", "ends", "told"),
    [
        ("No known vulnerabilities found", 0, 0, "No known vulnerabilities found"),
        ("Found 2 known vulnerabilities in 1 package\nName Version ID", 1, 1, "Name Version ID"),
        ("ERROR:pip_audit._cli:Could not connect to the service", 1, 3, "could not be reached"),
        ("python: No module named pip_audit", 1, 3, "could not be reached"),
    ],
)
def test_an_audit_tells_a_vulnerability_from_no_answer(tmp_path, said, code, ends, told):
    python = tmp_path / "python"
    asked = "-m pip_audit -r constraints.txt --no-deps --disable-pip"
    python.write_text(
        f'#!/bin/sh\n[ "$*" = "{asked}" ] || exit 9\necho "{said}" >&2\nexit {code}\n'
    )
    python.chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "audit", python], capture_output=True, text=True)
    assert done.returncode == ends and told in done.stdout + done.stderr
    assert "Could not connect" not in said or said in done.stderr


def test_make_and_a_release_audit():
    for name in ("Makefile", ".ci/release"):
        assert ".ci/audit" in (ROOT / name).read_text()
    for name in ("audit", "release"):
        subprocess.run(["bash", "-n", str(ROOT / ".ci" / name)], check=True)
