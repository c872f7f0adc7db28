"""Numbers that no command can work with: refused by its flags, before anything runs."""

import argparse

import pytest

from trace_jax import commands, compare, study
from trace_jax.evaluate import __main__ as evaluate
from trace_jax.sources import __main__ as sources


def test_whole_numbers_from_the_least_on():
    number = commands.at_least(1)
    assert [number(text) for text in ("1", " 7 ")] == [1, 7]
    for text in ("0", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} must be at least 1"):
            number(text)
    with pytest.raises(ValueError, match="invalid literal"):
        number("1.5")


ATTACKS = ["attacks", "--model=none", "--harmful=none", "--safe=none", "--out=none"]
CAPABILITY = ["capability", "--model=none", "--tasks=arc_easy", "--out=none"]
STUDY = ["make", "--system=a=none", "--system=b=none", "--policy=answers", "--out=none.html"]


@pytest.mark.parametrize(
    ("main", "command", "flag"),
    [
        (evaluate.main, ATTACKS, "--limit=-1"),
        (evaluate.main, ATTACKS, "--max-new-tokens=0"),
        (evaluate.main, ATTACKS, "--batch-rows=0"),
        (evaluate.main, CAPABILITY, "--limit=-1"),
        (evaluate.main, CAPABILITY, "--batch-rows=-8"),
        (study.main, STUDY, "--n=0"),
        (study.main, STUDY, "--seed=-1"),
        (sources.main, ["inspect", "none"], "--first=-1"),
        (sources.main, ["inspect", "none"], "--show=-1"),
        (sources.main, ["inspect", "none"], "--max-length=0"),
        (sources.main, ["convert", "none", "out"], "--first=-1"),
    ],
)
def test_a_number_that_is_too_small_is_refused_by_its_flag(main, command, flag, capsys):
    assert main([*command, flag]) == 2
    name, _, value = flag.partition("=")
    assert f"argument {name}: {value} must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--jobs=0", "--seeds=0", "--seeds=-1"])
def test_a_comparison_refuses_them_before_its_shared_stages(flag, config, tmp_path, capsys):
    run = tmp_path / "run"
    assert compare.main(["compare", f"--config={config}", f"--workdir={run}", flag]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and flag.removeprefix("--") in said[0] and not run.exists()
