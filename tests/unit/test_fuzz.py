"""The fuzz target of the readers: on its seeds, on their neighbours, and under atheris where that is installed."""

import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path

import fuzz_readers
import mutations
import pytest

SECONDS = 3.0


def test_the_seeds_are_read():
    assert len(fuzz_readers.SEEDS) == 6
    for seed in fuzz_readers.SEEDS:
        fuzz_readers.read(seed)


def test_the_neighbours_of_the_seeds_are_read_or_refused():
    chance, end, count = random.Random(0), time.monotonic() + SECONDS, 0
    ways = [mutations.cut, mutations.flipped, mutations.scribbled, mutations.repeated, mutations.torn]
    while time.monotonic() < end:
        seed = chance.choice(fuzz_readers.SEEDS)
        for _ in range(chance.randint(1, 3)):
            seed = seed[:1] + (chance.choice(ways)(seed[1:], chance) if len(seed) > 1 else b"x")
        fuzz_readers.read(seed)
        count += 1
    assert count > 50


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed; `make fuzz` does")
def test_a_short_guided_run_finds_nothing(tmp_path):
    script = Path(__file__).parents[1] / "fuzz_readers.py"
    command = [sys.executable, str(script), "-max_total_time=10", "-rss_limit_mb=4096", str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
