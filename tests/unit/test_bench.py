"""The benches measure what they say: every sample is a weight that kernels multiply rightly, every row is complete."""

import json
import subprocess
import sys
import time

import pytest
import torch
from checks import TOLERANCE, assert_close

from lrec import kernels
from lrec.bench import gpu, keep
from lrec.bench.kernels import Kernels, measure
from lrec.bench.samples import SAMPLES, sample


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_a_weight_of_its_format(name):
    packed, x = sample(name, (41, 320), 64), torch.randn(3, 320)
    assert packed.name() == name.split()[0]
    assert_close(kernels.matmul(x, packed), x.double() @ packed.unpack().double().t(), TOLERANCE[torch.float32], name)


def test_every_contender_has_a_row_and_is_compared_with_torch():
    contenders, _ = Kernels().contenders(["uniform 2-bit", "salient"], (64, 96))
    for transpose in (False, True):
        rows = measure(contenders, (64, 96), (2, transpose), 2, time.perf_counter)
        named = [row["contender"] for row in rows]
        assert named[:2] == ["torch float32", "torch bfloat16"] and len(named) == len(set(named))
        assert any(name.startswith("uniform 2-bit") for name in named)
        assert all(row.keys() == rows[0].keys() and row["ms"] > 0 for row in rows)
        assert rows[0]["x_torch_fp32"] == 1


def test_a_wrong_format_is_refused_with_the_nearest_right_one():
    with pytest.raises(ValueError, match="Did you mean 'uniform 2-bit'"):
        Kernels(formats="uniform 2bit").run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: `make gpu` measures on it")
def test_without_a_gpu_there_is_a_reason_in_words():
    assert "finds no CUDA device" in gpu.unusable()
    with pytest.raises(ValueError, match=r"cannot be measured here: torch .+ finds no CUDA device"):
        Kernels(device="cuda").run()
    with pytest.raises(ValueError, match="allowed: cpu, cuda"):
        Kernels(device="tpu").run()


def test_reports_are_added_to_one_file(tmp_path):
    path = str(tmp_path / "new" / "gpu.json")
    first = keep(path, "kernels", {"rows": [1]})
    assert first["rows"] == [1] and first["date"]
    keep(path, "step", {"tokens": 2})
    keep(path, "step", {"tokens": 3})
    held = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert held["kernels"] == first and held["step"]["tokens"] == 3
    assert keep(None, "step", {"tokens": 4})["tokens"] == 4


def test_benches_need_neither_trl_nor_datasets_nor_bitsandbytes():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['trl', 'datasets', 'bitsandbytes']))\n"
        "from lrec.cli import main\n"
        "assert main(['bench', 'kernels', '--device', 'tpu']) == 2\n"
        "assert main(['bench', 'step', '--shape', 'smollm2-135m', '--num_layers', '1', '--tokens', '16']) == 0\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "allowed: cpu, cuda" in told.stderr and "tokens_per_s" in told.stdout
