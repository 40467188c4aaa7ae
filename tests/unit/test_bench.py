"""The benches measure what they say: every sample is a weight that kernels multiply rightly, every row is complete."""

import time

import pytest
import torch
from checks import TOLERANCE, assert_close

from lrec import kernels
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
