"""A x of adapters that share x: one product from the second pass on, and every value and gradient as without."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrec import kernels, shared_inputs
from lrec.formats.uniform import Uniform
from lrec.kernels import reference
from lrec.lora import lora_linear
from lrec.nn import PackedLinear
from tests.checks import TOLERANCE, assert_close

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
K, RANKS, WIDTHS = 41, (3, 2, 5), (29, 7, 12)


class Branches(nn.Module):
    """Three packed layers under adapters of different ranks that see the same x, with dropout `p`."""

    def __init__(self, dtype, p=0.0):
        super().__init__()
        g, self.p = torch.Generator().manual_seed(3), p
        for i, (R, N) in enumerate(zip(RANKS, WIDTHS, strict=True)):
            codes = torch.randint(0, 4, (N, K), generator=g, dtype=torch.int32)
            packed = Uniform.pack(codes, torch.rand(N, 2, generator=g) / 9, torch.rand(N, 2, generator=g), 2, 32)
            self.add_module(f"base{i}", PackedLinear(packed))
            for name, shape in (("a", (R, K)), ("b", (N, R))):
                value = (torch.randn(shape, generator=g) * 0.3).to(BF16).to(dtype)
                self.register_parameter(f"{name}{i}", nn.Parameter(value))

    def forward(self, x):
        parts = [(getattr(self, f"base{i}"), getattr(self, f"a{i}"), getattr(self, f"b{i}")) for i in range(3)]
        return torch.cat([lora_linear(x, base, a, b, 0.5, self.p) for base, a, b in parts], -1)

    def exact(self, x):
        """The same in float64, of torch's own operations."""
        found = []
        for i in range(3):
            a, b = (getattr(self, f"{name}{i}").double() for name in "ab")
            found.append(x @ getattr(self, f"base{i}").packed.unpack().double().t() + 0.5 * (x @ a.t()) @ b.t())
        return torch.cat(found, -1)


@pytest.fixture
def stacked(monkeypatch):
    """How many A's each product was made of."""
    counts, product = [], shared_inputs.product

    def counting(x_TK, a_RK, dtype):
        counts.append(len(a_RK))
        return product(x_TK, a_RK, dtype)

    monkeypatch.setattr(shared_inputs, "product", counting)
    return counts


def gradients(run, module, x, upstream):
    """Output, and gradients of x and of all parameters."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "autocast"), [(FP64, FP64, None), (FP32, FP32, None), (BF16, BF16, None), (BF16, FP32, None),
                                       (FP32, FP32, BF16)], ids=str,
)  # fmt: skip
def test_values_and_gradients_are_those_of_float64(stacked, monkeypatch, x_dtype, dtype, autocast, reentrant):
    monkeypatch.setattr(kernels, "CAST_ELEMENTS", 10 * K)
    module = Branches(dtype)
    run = module if reentrant is None else lambda x: checkpoint(module, x, use_reentrant=reentrant)
    tolerance = 4 * max(TOLERANCE[t] for t in (x_dtype, dtype, autocast or dtype))
    for step in range(3):
        x = torch.randn(3, 11, K).to(BF16).to(x_dtype)
        upstream = torch.randn(3, 11, sum(WIDTHS)).to(BF16)
        with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
            found = gradients(run, module, x, upstream)
        expected = gradients(module.exact, module, x.double(), upstream.double())
        assert found.keys() == expected.keys() and len(found) == 8
        for name, value in found.items():
            assert_close(value, expected[name], tolerance, f"{name} in step {step}")
    # A reentrant checkpoint makes its first pass without gradients.
    assert stacked == {None: [1] * 3 + [3] * 2, False: [1] * 3 + [3] * 5, True: [1, 1, 1, 3] * 3}[reentrant]


def test_few_rows_and_dropout_do_without(stacked):
    module, x = Branches(FP32), torch.randn(sum(RANKS), K)
    for _ in range(2):
        module(x.clone())
    assert stacked == [1] * 6
    Branches(FP32, p=0.5)(x)
    assert stacked == [1] * 6


def test_an_x_or_an_adapter_that_changed_is_seen(stacked):
    module, x = Branches(FP64), torch.randn(20, K, dtype=FP64)
    changes = [lambda: None, lambda: x.mul_(2), lambda: module.a1.data.add_(1), lambda: module.a0.data.add_(1)]
    for change in itertools.chain(changes, [lambda: None]):
        change()
        assert_close(module(x).detach(), module.exact(x).detach(), 1e-12)
    assert stacked[:3] == [1] * 3 and set(stacked[3:]) == {3}
    module.a1.requires_grad_(False)  # nothing of an A depends on who else learns
    module.zero_grad()
    module(x.clone()).sum().backward()
    assert module.a1.grad is None and module.a0.grad is not None


def test_answers_do_not_depend_on_earlier_ones(stacked):
    module, x = Branches(FP32), torch.randn(20, K)
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
    assert stacked == [1] * 6
    module(x)
    assert stacked[6:] == [3], "the pass without gradients has found out who shares"
    with torch.no_grad():
        assert torch.equal(module(x), first)


def test_nothing_is_held_when_x_is_gone(stacked):
    module = Branches(FP32)
    for _ in range(2):
        module(torch.randn(20, K))
    assert stacked[-1] == 3 and not len(shared_inputs._SEEN)


def test_a_step_makes_no_tensor_of_the_weights_size(monkeypatch):
    monkeypatch.setattr(reference, "SLICE_WEIGHTS", 2**18)  # where no compiler was found, it serves
    N, K, T, R = 1024, 768, 64, 16
    codes = torch.randint(0, 4, (N, K), dtype=torch.int32)
    base = PackedLinear(Uniform.pack(codes, torch.rand(N, 6), torch.rand(N, 6), 2, 128))
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((R, K), (N, R)))
    x = torch.randn(T, K, requires_grad=True)
    lora_linear(x, base, a, b, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        lora_linear(x, base, a, b, 1.0).sum().backward()
    made = [event.self_cpu_memory_usage for event in seen.events()]
    assert T * N * 4 <= max(made) < N * K * 4 / 2
