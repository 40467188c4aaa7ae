"""Codebook quantizers: nf4 and fp4 against bitsandbytes, nf3 and nf2 against the recipe, kmeans against the optimum."""

import itertools
from statistics import NormalDist

import pytest
import torch

from lrec import registry
from lrec.formats.codebook import Codebook, dynamic_levels
from lrec.quantizers.fp4 import Fp4
from lrec.quantizers.kmeans import KMeans, Sums, cluster, sensitivity
from lrec.quantizers.nf2 import Nf2
from lrec.quantizers.nf3 import Nf3
from lrec.quantizers.nf4 import Nf4, normal_levels
from lrec.statistics import Statistics


def weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) * 0.1


def inputs(K, seed=0):
    """Statistics of 2 K random tokens with channels of very different strength."""
    x = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, K)
    return Statistics(num_tokens=len(x), hessian_KK=x.t() @ x / len(x), maxima_K=x.abs().amax(0))


@pytest.mark.parametrize("shape", [(41, 402), (33, 1271), (64, 576), (3, 64), (700, 64)])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantizer", [Nf4, Fp4])
def test_values_are_those_of_bitsandbytes_bit_for_bit(quantizer, double_quant, block_size, shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype, seed in itertools.product((torch.bfloat16, torch.float32), range(3)):
        w = weight(shape, seed).to(dtype)
        codes, state = functional.quantize_4bit(
            w, blocksize=block_size, compress_statistics=double_quant, quant_type=quantizer.__name__.lower()
        )
        state.dtype = torch.float32
        # As one row: where there is AVX-512, bitsandbytes 0.50.2 takes the wrong scale for a block that crosses rows.
        state.shape = (1, w.numel())
        packed = quantizer(block_size=block_size, double_quant=double_quant)(w)
        assert torch.equal(packed.unpack(), functional.dequantize_4bit(codes, state).view(shape))


def test_a_weight_of_zeros_stays_zero():
    for quantizer in (Nf4(), Fp4(), Nf3(), Nf2(), Nf4(double_quant=False)):
        assert not quantizer(torch.zeros(5, 64)).unpack().any()


def test_dynamic_levels_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(dynamic_levels()), functional.create_dynamic_map())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_levels_follow_the_recipe(bits):
    codes = 2**bits
    delta = (1 / (2 * codes) + 1 / (2 * codes - 2)) / 2
    quantile = NormalDist().inv_cdf
    half = codes // 2
    positive = [quantile(1 - delta + (0.5 - (1 - delta)) * i / half) for i in range(half)]
    negative = [-quantile(1 - delta + (0.5 - (1 - delta)) * i / (half - 1)) for i in range(half - 1)]
    expected = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64) / positive[0]
    assert (normal_levels(bits).double() - expected).abs().max() < 3e-7
    assert normal_levels(bits)[half - 1] == 0


@pytest.mark.parametrize("quantizer", [Nf2(double_quant=False), Nf3(double_quant=False, block_size=48)])
@pytest.mark.parametrize("shape", [(41, 401), (2, 1271)])
def test_blockwise_twin(quantizer, shape):
    w, table = weight(shape), quantizer.levels().double()
    expected = []
    for block in w.flatten().double().split(quantizer.block_size):
        x = block / block.abs().max()
        expected.append(table[(x[:, None] - table).abs().argmin(1)] * block.abs().max())
    got = quantizer(w).unpack().flatten().double()
    # A weight halfway between two levels may go either way in single precision.
    assert ((got - torch.cat(expected)).abs() < 1e-7).float().mean() > 0.9999


def optimum(x, weight, levels):
    """Least sum of weight (x - level)^2 over all ways to cut the sorted row into intervals."""
    order = x.argsort()
    x, weight = x[order].double(), weight[order].double()
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(x)), levels - 1):
        cost = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(x))):
            mean = (weight[a:b] * x[a:b]).sum() / weight[a:b].sum()
            cost += float((weight[a:b] * (x[a:b] - mean) ** 2).sum())
        best = min(best, cost)
    return best


def test_kmeans_never_beats_the_optimum_and_comes_close():
    torch.manual_seed(0)
    x, weights = torch.randn(12, 11), torch.rand(12, 11) ** 3 + 1e-3
    levels = cluster(x, weights, 4, 40)
    costs = (weights.double() * (x.double()[..., None] - levels[:, None]).square().amin(-1)).sum(1)
    best = torch.tensor([optimum(a, b, 4) for a, b in zip(x, weights, strict=True)], dtype=torch.float64)
    assert (costs >= best * (1 - 1e-9)).all()
    assert (costs <= best * (1 + 1e-9)).sum() >= 6
    assert costs.sum() <= 1.2 * best.sum()


@pytest.mark.parametrize(("bits", "group_size", "shape"), [(2, 0, (7, 41)), (3, 0, (5, 401)), (2, 32, (5, 401))])
def test_kmeans_is_a_fixed_point_of_lloyd(bits, group_size, shape):
    N, K = shape
    w, statistics = weight(shape).double(), inputs(K)
    h = sensitivity(statistics.hessian_KK).double()
    packed = KMeans(bits=bits, group_size=group_size, iterations=200)(w, statistics)
    got = packed.unpack().double()
    g = group_size or K
    table = packed.table.double().view(N, -1, 2**bits)
    for n, group in itertools.product(range(N), range(table.shape[1])):
        columns = slice(group * g, (group + 1) * g)
        x, q, cost = w[n, columns], got[n, columns], h[columns]
        distance = (x[:, None] - table[n, group]).abs()
        assert torch.allclose((x - q).abs(), distance.amin(1), atol=1e-9), "codes are not the nearest levels"
        level = cluster(x[None], cost[None], 2**bits, 200)[0]
        assert torch.equal(table[n, group], level.half().double())
        cell = (x[:, None] - level).abs().argmin(1)
        for i in cell.unique():
            mean = (cost[cell == i] * x[cell == i]).sum() / cost[cell == i].sum()
            assert abs(mean - level[i]) < 1e-9, "a level is not the mean of its cell"


def test_gain_is_what_levels_explain():
    torch.manual_seed(1)
    x, weights, levels = torch.randn(3, 50).double(), torch.rand(3, 50).double(), torch.randn(3, 2, 5).double()
    levels = levels.sort(-1).values
    cost = (weights[:, None] * (x[:, None, :, None] - levels[:, :, None]).square().amin(-1)).sum(-1)
    total = (weights * x * x).sum(1, keepdim=True)
    assert torch.allclose(Sums(x, weights).gain(levels), total - cost, atol=1e-12)


def test_dead_channels_cost_nothing_and_break_nothing():
    w, statistics = weight((4, 64)), inputs(64)
    statistics.hessian_KK[:, 10] = 0
    statistics.hessian_KK[10] = 0
    w[:, 10] = 100.0
    error = KMeans(bits=2)(w, statistics).unpack() - w
    w[:, 10] = 0.0
    alive = KMeans(bits=2)(w, statistics).unpack() - w
    keep = torch.arange(64) != 10
    cost = [(e[:, keep].square() * statistics.hessian_KK.diagonal()[keep]).sum() for e in (error, alive)]
    assert error.isfinite().all()
    assert cost[0] < 4 * cost[1]
    nothing = Statistics(num_tokens=1, hessian_KK=torch.zeros(64, 64))
    assert KMeans(bits=2)(w, nothing).unpack().isfinite().all()


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"nf4 has 4 bits, not 3; leave bits out"):
        Nf4(bits=3)
    with pytest.raises(ValueError, match=r"block_size = 8 is too small"):
        Nf2(block_size=8)
    with pytest.raises(ValueError, match=r"bits = 5 is no width of a codebook; allowed: 2, 3, 4"):
        KMeans(bits=5)
    with pytest.raises(ValueError, match=r"needs the hessian"):
        KMeans()(torch.randn(4, 32))
    with pytest.raises(ValueError, match=r"a table has 5 levels; allowed: 4, 8, 16"):
        Codebook.pack(torch.zeros(2, 16, dtype=torch.int32), torch.randn(5))
    with pytest.raises(ValueError, match=r"table has shape \(3, 4\)"):
        Codebook.pack(torch.zeros(2, 16, dtype=torch.int32), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"blocks of 16 need \(2,\)"):
        Codebook.pack(torch.zeros(2, 16, dtype=torch.int32), torch.randn(4), scale=torch.ones(3), block_size=16)
    assert {"nf4", "fp4", "nf3", "nf2", "kmeans"} <= set(registry.names("quantizers"))
