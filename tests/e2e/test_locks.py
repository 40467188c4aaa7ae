"""Two runs in one directory: the second is told who is there; a run that was killed locks nothing."""

import multiprocessing
import os
import time

import pytest
from checks import tiny_model

from lrec import lock
from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("locks")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 60)
    assert run(place, "quantize", "--model", place / "M", "--method", "nf4", "--output_dir", place / "Q") == 0
    return place


def run(place, verb, *words):
    return main([verb, *map(str, words)])


def hold(directory, ready):
    with lock.held(directory):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder():
    """Starts a process that holds the lock of a directory; it is killed at the end, or by the test."""
    children = []

    def start(directory):
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        children.append(context.Process(target=hold, args=(directory, ready)))
        children[-1].start()
        assert ready.wait(60)
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.join()


VERBS = {
    "quantize": ["--model", "M", "--method", "nf4"],
    "cache": ["--model", "M", "--dataset", "text.txt", "--num_samples", "2", "--max_length", "16"],
    "train": ["--model", "Q", "--teacher", "M", "--dataset", "text.txt", "--max_steps", "1", "--max_length", "16"],
    "compare": ["--model", "M", "--dataset", "text.txt", "--test_dataset", "text.txt", "--methods", "rtn:2"],
    "export": ["--model", "Q", "--format", "merged"],
    "import": ["--model", "Q"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_second_run_in_a_directory_is_told_of_the_first(place, tmp_path, holder, capsys, verb):
    child = holder(tmp_path / "O")
    words = [place / word if word in ("M", "Q", "text.txt") else word for word in VERBS[verb]]
    capsys.readouterr()
    assert run(place, verb, *words, "--output_dir", tmp_path / "O") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"is being written by process {child.pid} (" in told and "choose another output_dir" in told
    assert not (tmp_path / "O").exists()


def test_a_killed_run_locks_nothing_and_leaves_no_file_behind_the_next(place, tmp_path, holder):
    child = holder(tmp_path / "O")
    child.kill()
    child.join()
    assert (tmp_path / ".O.lock").exists()
    assert run(place, "quantize", "--model", place / "M", "--method", "nf4", "--output_dir", tmp_path / "O") == 0
    assert not (tmp_path / ".O.lock").exists()


def test_of_several_processes_the_first_holds_the_lock_for_all(tmp_path, holder, monkeypatch):
    holder(tmp_path / "O")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with lock.held(tmp_path / "O"):
        pass
    assert (tmp_path / ".O.lock").exists()


def contend(directory, count, seconds):
    """Takes the lock `count` times, at whatever moments it is free, and notes that nobody else has it."""
    mark = directory / "inside"
    for _ in range(count):
        while True:
            try:
                with lock.held(directory):
                    descriptor = os.open(mark, os.O_CREAT | os.O_EXCL)
                    time.sleep(seconds)
                    os.close(descriptor)
                    mark.unlink()
                break
            except ValueError:
                time.sleep(0.001)


def test_nobody_else_is_inside(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=contend, args=(tmp_path, 30, 0.001)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
