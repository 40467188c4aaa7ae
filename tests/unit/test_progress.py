"""How far a long step has come: nested bars on a terminal, a line now and then elsewhere."""

import io
import re
import sys

import pytest

from lrec import progress
from lrec.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(monkeypatch, capsys):
    """Reads a log in which a line is due at every step."""
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    return lambda: capsys.readouterr().err


def nested():
    return [inner for _ in Progress(range(3), "quantize", "block") for inner in Progress(range(2), "b", inner=True)]


def test_a_terminal_shows_outer_and_inner_bars(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    assert nested() == [0, 1] * 3
    shown = terminal.getvalue()
    assert "quantize: 100%" in shown and "3/3" in shown and "0/2" in shown
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", shown)  # time taken, and time left


def test_a_log_gets_lines_of_the_outer_step_with_the_time_left(log):
    nested()
    told = log()
    lines = told.split("\n")[:-1]
    assert lines and "\r" not in told and "\x1b" not in told
    assert all(re.fullmatch(r"quantize: block [0-3] of 3, \S+ left", line) for line in lines), lines


def test_what_is_told_beside_a_step_stands_in_its_line(log):
    steps = Progress(total=4, desc="train", unit="step")
    steps.set_postfix({"loss": "1.25"}, refresh=False)
    steps.update(2)
    steps.close()
    assert log().splitlines()[-1] == "train: step 2 of 4, 00:00 left, loss=1.25"


def test_a_short_step_leaves_a_log_empty(capsys):
    nested()
    assert capsys.readouterr().err == ""
