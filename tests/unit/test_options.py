"""Settings: defaults < YAML < flags; what does not parse or is unknown is an error that helps."""

from dataclasses import dataclass
from typing import Literal

import pytest

from lrec import options
from lrec.options import setting


@dataclass(frozen=True, kw_only=True)
class Run:
    model: str
    bits: int = setting(2, "bits")
    rate: float = 1e-3
    symmetric: bool = False
    rank: int | None = 16
    mode: Literal["fast", "best"] = "fast"


def fill(*argv):
    return options.fill(options.settings(list(argv)), Run)[0]


def test_flags_take_underscores_dashes_and_equals():
    assert fill("--model", "m", "--bits=3", "--rate", "1e-5") == Run(model="m", bits=3, rate=1e-5)
    assert fill("--model=a=b").model == "a=b"


@pytest.mark.parametrize(
    ("words", "value"), [(["--symmetric"], True), (["--symmetric", "false"], False), (["--no_symmetric"], False)]
)
def test_bools_stand_alone_are_given_or_negated(words, value):
    assert fill("--model", "m", *words).symmetric is value


def test_none_is_a_value_where_it_is_allowed():
    assert fill("--model", "m", "--rank", "none").rank is None
    with pytest.raises(ValueError, match="--bits is 'none', but must be int"):
        fill("--model", "m", "--bits", "none")


def test_yaml_lies_between_defaults_and_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: yaml\nbits: 4\nrate: 1e-5\nmode: best\n")
    assert fill("--config", str(path), "--bits", "3") == Run(model="yaml", bits=3, rate=1e-5, mode="best")


def test_an_instance_gives_the_defaults():
    assert options.fill({"bits": "4"}, Run(model="m", rank=8))[0] == Run(model="m", bits=4, rank=8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m", "--bit", "3"], r"unknown setting 'bit'.*Did you mean 'bits'"),
        (["--model", "m", "--bits", "two"], "--bits is 'two', but must be int"),
        (["--model", "m", "--bits", "2.5"], "--bits is '2.5', but must be int"),
        (["--model", "m", "--bits"], "--bits is True, but must be int"),
        (["--model", "m", "--mode", "bets"], "Did you mean 'best'"),
        (["--bits", "3"], "missing --model"),
        (["stray"], "unexpected argument 'stray'"),
        (["--model", "m", "--model", "n"], "--model is given twice"),
        (["--config", "/nowhere.yaml"], "cannot be read .No such file"),
        (["--config", "/dev/zero"], "no ordinary file"),
    ],
)
def test_what_is_wrong_is_said(words, message):
    with pytest.raises(ValueError, match=message):
        fill(*words)


def test_yaml_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        fill("--config", str(path))
