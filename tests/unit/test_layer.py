"""PackedLinear: the short way past the op computes what the op does, follows its buffers, and gives way to tracers."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lrec.formats.uniform import Uniform
from lrec.nn import PackedLinear


def layer(seed=0):
    """A small seeded layer with a bias."""
    torch.manual_seed(seed)
    packed = Uniform.pack(torch.randint(0, 4, (41, 200)), torch.rand(41, 4) + 0.1, None, 2, 64)
    return PackedLinear(packed, torch.randn(41))


@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 3, 200), (0, 200)])
def test_without_gradient_the_layer_returns_what_the_op_returns(shape):
    x, linear = torch.randn(shape), layer()
    through_op = linear(x.clone().requires_grad_())
    assert through_op.requires_grad
    with torch.no_grad():
        assert torch.equal(linear(x), through_op)


def test_the_weight_follows_its_buffers():
    x, linear, other = torch.randn(3, 200), layer(0), layer(1)
    before, expected = linear(x), other(x)
    twin = copy.deepcopy(linear)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear(x), expected), "copied into the buffers"
    twin.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(twin(x), expected), "put in place of the buffers"
    assert not torch.equal(before, expected)
    assert twin.double().packed.scale is twin.scale
    assert twin.packed is twin.packed


def test_a_dispatch_mode_sees_the_op():
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        layer()(torch.randn(2, 200))
    assert "lrec.matmul.default" in seen
