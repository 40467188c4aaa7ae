"""Optimizers stepped one parameter at a time: rounding without bias, the inner optimizer's own steps, one gradient."""

import pytest
import torch
from torch import nn

from lrec.optimizers import OneByOne, stochastic_round
from tests.checks import assert_close

BF16 = torch.bfloat16


def eight_bit(parameters, lr):
    """bitsandbytes' AdamW with states of 8 bits for these small tensors too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, min_8bit_size=1)


INNER = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, eight_bit]


@pytest.mark.parametrize("w", [1 + 1 / 1024, -(1 + 3 / 512), 3.1e-20, 255.9, -1e-38, 0.3])
def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias(w):
    w = torch.full((40_000,), w)
    rounded = stochastic_round(w)
    low = (w.view(torch.int32) & -65536).view(torch.float32)[0]  # towards zero
    high = ((w.view(torch.int32) & -65536) + 65536).view(torch.float32)[0]
    assert rounded.dtype == BF16 and set(rounded.unique().tolist()) == {low.item(), high.item()}
    odds = ((w[0].double() - low.double()) / (high.double() - low.double())).item()
    share = (rounded.double() == high.double()).double().mean().item()
    assert abs(share - odds) < 5 * (odds * (1 - odds) / len(w)) ** 0.5


def test_what_bfloat16_has_stays_and_so_do_nan_and_infinity():
    values = torch.randn(1000).to(BF16)
    assert torch.equal(stochastic_round(values.float()), values)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    odd = torch.cat([odd, torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    rounded = stochastic_round(odd)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf] and rounded[[2, 5, 6]].isnan().all()
    assert torch.equal(rounded[3:5].view(torch.int16), odd[3:5].to(BF16).view(torch.int16))


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def groups(net):
    return [
        {"params": [net[0].weight, net[2].weight], "weight_decay": 0.3},
        {"params": [net[0].bias, net[2].bias], "weight_decay": 0.0, "lr": 0.03},
    ]


def train(net, optimizer, steps, start=0):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step + start))
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(11, 5, generator=g).to(net[0].weight.dtype)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.__name__)
def test_float32_steps_are_the_inner_optimizers_own(inner, fused):
    plain, one_by_one = network(), network()
    expected = train(plain, inner(groups(plain), lr=0.1), 5)
    optimizer = OneByOne(inner(groups(one_by_one), lr=0.1))
    if fused:
        optimizer.fuse()
    found = train(one_by_one, optimizer, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_fused_backward_holds_one_gradient_at_a_time():
    net = network()
    optimizer = OneByOne(torch.optim.AdamW(groups(net), lr=0.1))
    alive = []

    def count(parameter):
        alive.append(sum(p.grad is not None for p in net.parameters()))

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    handles = optimizer.fuse()
    net(torch.randn(3, 5)).sum().backward()
    assert alive == [1] * 4 and all(p.grad is None for p in net.parameters())
    for handle in handles:
        handle.remove()
    net(torch.randn(3, 5)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_gradient_that_is_not_finite_is_told_at_the_step():
    net = network()
    optimizer = OneByOne(torch.optim.SGD(groups(net), lr=0.1))
    optimizer.fuse()
    (net(torch.randn(3, 5)).sum() * torch.inf).backward()
    with pytest.raises(ValueError, match="gradient was not finite"):
        optimizer.step()


def test_small_updates_of_bfloat16_arrive_in_the_mean():
    size, steps, rate = 4096, 50, 1e-4
    moved = {}
    for wrap in (lambda optimizer: optimizer, OneByOne):
        p = nn.Parameter(torch.ones(size, dtype=BF16))
        optimizer = wrap(torch.optim.SGD([p], lr=rate))
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert p.dtype == BF16
        moved[type(optimizer).__name__] = 1 - p.detach().double()
    assert moved["SGD"].abs().max() == 0, "rounded to the nearest, they are lost"
    # Each step moves an entry by the gap below 1, 2^-8, or not at all, with mean `rate`.
    sigma = (steps * rate * 2**-8 / size) ** 0.5
    assert abs(moved["OneByOne"].mean() - steps * rate) < 5 * sigma


def test_bfloat16_adam_follows_float32_and_keeps_its_state_in_float32():
    wide, narrow = network(), network(BF16)
    wide.load_state_dict(narrow.state_dict())
    optimizer = OneByOne(torch.optim.AdamW(groups(narrow), lr=0.01))
    found = train(narrow, optimizer, 20)
    expected = train(wide, torch.optim.AdamW(groups(wide), lr=0.01), 20)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 4e-2)
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("inner", [torch.optim.AdamW, eight_bit], ids=lambda inner: inner.__name__)
def test_a_resumed_optimizer_goes_on_bit_for_bit(inner, dtype, fused):
    def made(net):
        optimizer = OneByOne(inner(groups(net), lr=0.1))
        if fused:
            optimizer.fuse()
        return optimizer

    straight, first, resumed = network(dtype), network(dtype), network(dtype)
    torch.manual_seed(1)
    expected = train(straight, made(straight), 3)
    torch.manual_seed(1)
    optimizer = made(first)
    train(first, optimizer, 2)
    saved, weights, rng = optimizer.state_dict(), first.state_dict(), torch.get_rng_state()
    resumed.load_state_dict(weights)
    other = made(resumed)
    other.load_state_dict(saved)
    dtypes = [
        {name: value.dtype for name, value in state.items() if torch.is_tensor(value)} for state in other.state.values()
    ]
    assert all(
        (torch.uint8 in kinds.values()) == (inner is eight_bit) and BF16 not in kinds.values() for kinds in dtypes
    )
    for group in other.param_groups:
        group["lr"] = group["initial_lr"]
    torch.set_rng_state(rng)
    found = train(resumed, other, 1, start=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
