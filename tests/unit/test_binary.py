"""Binary coding and ternary weights: bcq against the optimum, gptqt against a textbook GPTQ with the same levels."""

import itertools

import pytest
import torch

from lrec.formats.binary import Binary, levels
from lrec.formats.ternary import Ternary as TernaryFormat
from lrec.quantizers.bcq import Bcq, best_fit, refit
from lrec.quantizers.gptqt import GPTQT, choose, step_shapes
from lrec.quantizers.kmeans import Sums
from lrec.quantizers.ternary import Ternary
from lrec.statistics import Statistics


def inputs(K, seed=0, dtype=torch.float32):
    """Statistics of correlated tokens, more of them than channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * K, K, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=generator)).double()
    x = x * torch.logspace(-0.5, 0.5, K, dtype=torch.float64)
    return Statistics(num_tokens=len(x), hessian_KK=(x.t() @ x / len(x)).to(dtype))


def cost_of(x, weight, alpha, offset):
    """Weighted squared error of each row with the nearest of its levels."""
    value = levels(alpha, offset)
    return (weight * (x[..., None] - value[:, None]).square().amin(-1)).sum(1)


def optimum(x, weight, planes):
    """Least weighted squared error of one row over all signs, each with its least-squares scales and offset."""
    K = len(x)
    codes = torch.tensor(list(itertools.product(range(2**planes), repeat=K)))
    design = torch.stack(
        [(codes >> p & 1) * 2.0 - 1 for p in range(planes)] + [torch.ones_like(codes) * 1.0], -1
    ).double()
    root = weight.sqrt()
    fitted = torch.linalg.pinv(design * root[:, None]) @ (root * x)
    return float((weight * (x - (design @ fitted[..., None])[..., 0]).square()).sum(1).min())


@pytest.mark.parametrize("planes", [1, 2])
def test_bcq_never_beats_the_optimum_and_comes_close(planes):
    torch.manual_seed(planes)
    x, weight = torch.randn(10, 6).double(), torch.rand(10, 6).double() + 0.05
    got = cost_of(x, weight, *best_fit(x, weight, planes, 15))
    best = torch.tensor([optimum(a, b, planes) for a, b in zip(x, weight, strict=True)], dtype=torch.float64)
    assert (got >= best * (1 - 1e-6) - 1e-12).all()
    assert (got <= best * (1 + 1e-6) + 1e-9).sum() >= 5
    assert got.sum() <= 1.6 * best.sum()


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_a_refit_is_least_squares_and_never_worse(planes):
    torch.manual_seed(planes)
    x, weight = torch.randn(7, 60).double(), torch.rand(7, 60).double()
    alpha, offset = torch.rand(7, 1, planes).double(), torch.randn(7, 1).double() * 0.1
    before = cost_of(x, weight, alpha[:, 0], offset[:, 0])
    codes = (x[..., None] - levels(alpha[:, 0], offset[:, 0])[:, None]).abs().argmin(-1)
    fitted, middle = refit(Sums(x, weight), alpha, offset)
    for n in range(7):
        design = torch.stack([(codes[n] >> p & 1) * 2.0 - 1 for p in range(planes)] + [torch.ones(60)], 1).double()
        root = weight[n].sqrt()[:, None]
        textbook = torch.linalg.lstsq(design * root, x[n][:, None] * root).solution[:, 0]
        error = [(design @ v - x[n]).square() @ weight[n] for v in (textbook, torch.cat([fitted[n, 0], middle[n]]))]
        assert abs(error[0] - error[1]) < 1e-7
    assert (cost_of(x, weight, fitted[:, 0], middle[:, 0]) <= before + 1e-9).all()


@pytest.mark.parametrize(("bits", "group_size", "shape"), [(1, 16, (5, 41)), (2, 0, (3, 401)), (3, 128, (4, 401))])
def test_bcq_codes_are_the_nearest_levels(bits, group_size, shape):
    torch.manual_seed(0)
    w = torch.randn(shape)
    packed = Bcq(bits=bits, group_size=group_size)(w, inputs(shape[1]))
    group = torch.arange(shape[1]) // packed.group_size
    value = levels(packed.alpha.float(), packed.offset.float())[:, group]
    distance = (w[..., None] - value).abs().amin(-1)
    assert torch.allclose((packed.unpack() - w).abs(), distance, atol=1e-6)


def textbook_gptq(w, h, nearest, order, damp_percent):
    """Frantar et al. in float64: the inverse Hessian, its upper Cholesky factor, one column after the other."""
    h = h.double() + damp_percent * h.double().diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, q = w.double().clone()[:, order], torch.zeros(w.shape, dtype=torch.float64)
    for k in range(len(order)):
        q[:, order[k]] = nearest(w[:, k], order[k])
        error = (w[:, k] - q[:, order[k]]) / upper[k, k]
        w[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
    return q


@pytest.mark.parametrize(
    ("bits", "group_size", "shape"), [(2, 16, (6, 41)), (3, 0, (5, 64)), (1, 32, (1, 97)), (2, 128, (9, 401))]
)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptqt_twin(bits, group_size, shape, act_order):
    torch.manual_seed(bits)
    w, statistics = torch.randn(shape, dtype=torch.float64), inputs(shape[1], dtype=torch.float64)
    packed = GPTQT(bits=bits, group_size=group_size, act_order=act_order, block_size=32)(w, statistics)
    value = levels(packed.alpha.double(), packed.offset.double())
    h = statistics.hessian_KK
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(h))

    def nearest(column, k):
        allowed = value[:, k // packed.group_size]
        return allowed.gather(1, (column[:, None] - allowed).abs().argmin(1, keepdim=True))[:, 0]

    expected = textbook_gptq(w, h, nearest, order.tolist(), 0.01)
    assert (packed.unpack().double() - expected).abs().max() < 1e-5


def test_block_size_changes_nothing():
    torch.manual_seed(0)
    w, statistics = torch.randn(7, 200, dtype=torch.float64), inputs(200, dtype=torch.float64)
    whole, parts = (GPTQT(block_size=size)(w, statistics) for size in (1000, 17))
    assert torch.equal(whole.qweight, parts.qweight)


def test_level_sets_lie_on_the_finer_grid():
    assert step_shapes(1, 2) == ((1.0,),)
    sevenths = {tuple(round(7 * step, 9) for step in shape) for shape in step_shapes(2, 1)[1:]}
    assert sevenths == {(2, 5), (3, 4)}
    for bits, extra in [(2, 2), (3, 1), (3, 2), (4, 1)]:
        even, *others = step_shapes(bits, extra)
        assert even == tuple(2**p / (2**bits - 1) for p in range(bits))
        last = 2 ** (bits + extra) - 1
        for shape in others:
            steps = [round(last * step) for step in shape]
            assert sum(steps) == last
            assert steps == sorted(set(steps))
            assert all(abs(last * step - whole) < 1e-9 for step, whole in zip(shape, steps, strict=True))


def test_the_choice_is_never_worse_than_the_even_grid_it_starts_from():
    torch.manual_seed(0)
    x, cost = torch.randn(40, 64).double() ** 3, torch.rand(40, 64).double()
    shapes = torch.tensor(step_shapes(2, 2), dtype=torch.float64)
    chosen = cost_of(x, cost, *choose(Sums(x, cost), shapes))
    even = cost_of(x, cost, *choose(Sums(x, cost), shapes[:1]))
    start = 0.8 * (x.amax(1) - x.amin(1))
    raw = cost_of(x, cost, start[:, None] * shapes[0] / 2, (x.amax(1) + x.amin(1)) / 2)
    assert (even <= raw * (1 + 1e-9)).all()
    assert (chosen < even * (1 - 1e-9)).any()
    # Six refits against three and three with a choice in between: both only ever go down from the same third.
    assert chosen.sum() < even.sum()


def test_channels_without_input_become_zero_levels_at_no_cost():
    torch.manual_seed(0)
    w, statistics = torch.randn(4, 64), inputs(64)
    statistics.hessian_KK[:, 5] = 0
    statistics.hessian_KK[5] = 0
    noisy = w.clone()
    noisy[:, 5] = 1000.0
    first, second = (GPTQT()(x, statistics) for x in (w, noisy))
    assert torch.equal(first.unpack(), second.unpack())


def best_ternary(x):
    """Least squared error over all of {-1, 0, 1}^K, each with its best scale."""
    trits = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=len(x)))).double()
    scale = (trits @ x) / trits.square().sum(1).clamp_min(1)
    return float((x - scale[:, None] * trits).square().sum(1).min())


def test_ternary_is_the_optimum():
    torch.manual_seed(0)
    w = torch.randn(20, 8).double()
    w[3] = 0
    packed = Ternary(group_size=0)(w)
    got = (packed.unpack().double() - w).square().sum(1)
    best = torch.tensor([best_ternary(row) for row in w], dtype=torch.float64)
    assert (got >= best - 1e-12).all()
    # The scale is rounded to fp16, which costs at most K (scale * 2^-11)^2.
    assert (got <= best + 8 * (3 * 2**-11) ** 2).all()
    assert packed.unpack()[3].abs().max() == 0


def test_ternary_groups_are_independent():
    torch.manual_seed(0)
    w = torch.randn(5, 41)
    whole = Ternary(group_size=16)(w).unpack()
    parts = [Ternary(group_size=0)(part).unpack() for part in w.split(16, 1)]
    assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bcq(bits=5), r"bits = 5 is no number of bit planes; allowed: 1 to 4"),
        (lambda: GPTQT(bits=0), r"bits = 0 is no number of bit planes"),
        (lambda: GPTQT(group_size=8), r"group_size = 8 is too small"),
        (lambda: GPTQT(extra_bits=3), r"extra_bits = 3; allowed: 1 or 2"),
        (lambda: GPTQT(damp_percent=1.0), r"damp_percent = 1.0 is out of range"),
        (lambda: Bcq(iterations=-1), r"iterations = -1"),
        (lambda: Ternary(bits=3), r"ternary has the codes -1, 0, 1, not 3 bits; leave bits out"),
        (lambda: Ternary(group_size=3), r"group_size = 3 is too small"),
        (
            lambda: Binary.pack(torch.zeros(2, 32, dtype=torch.int32), torch.ones(2, 1, 5), torch.ones(2, 1)),
            r"5 bit planes",
        ),
        (
            lambda: Binary.pack(torch.zeros(2, 32, dtype=torch.int32), torch.ones(2, 1, 2), torch.ones(2, 1), 16),
            r"need \(2, 2, 2\)",
        ),
        (lambda: TernaryFormat.pack(torch.zeros(2, 32), torch.ones(2, 1), 16), r"groups of 16 need \(2, 2\)"),
        (lambda: GPTQT()(torch.randn(2, 32)), r"needs the hessian"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
