"""What the GPU machine runs needs no package that it lacks: trl, datasets and bitsandbytes are refused here."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("trl", "datasets", "bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""
COMMANDS = """
import pytest
from lrec.bench import gpu, kernels  # what `bench kernels --device cuda` imports
from lrec.cli import main

contenders, absent = kernels.Kernels().contenders(["uniform 2-bit"], (64, 96))
assert "No module named 'bitsandbytes'" in absent and len(contenders) > 2
assert "No module named 'bitsandbytes'" in gpu.bitsandbytes_nf4(64, 96)[1]
shape = ["--shape", "smollm2-135m", "--num_layers", "1", "--tokens", "8", "--num_steps", "1"]
assert main(["bench", "step", "--device", "cpu", *shape]) == 0
assert main(["bench", "kernels", "--device", "cuda"]) == (2 if gpu.unusable() else 0)
assert pytest.main(["-q", "--collect-only", "-m", "gpu", "tests/gpu"]) == 0
"""


def test_what_make_gpu_runs_needs_neither_trl_nor_datasets_nor_bitsandbytes():
    program = [sys.executable, "-c", WITHOUT + COMMANDS]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(program, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
