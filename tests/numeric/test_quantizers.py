"""Laws of the quantizers: what holds for every one, and equality with textbook twins written here in float64."""

import dataclasses
import itertools

import pytest
import torch
from checks import assert_close

from lrec import registry
from lrec.formats import Packed
from lrec.formats.uniform import Uniform
from lrec.grid import encode, find_grid, per_column
from lrec.quantizers.gptq import GPTQ, factor, round_columns
from lrec.quantizers.rtn import RTN
from lrec.statistics import NEEDS, Collector, Statistics

EVERY = pytest.mark.parametrize("name", registry.names("quantizers"))
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
GRIDS = pytest.mark.parametrize("grid", [{"symmetric": True}, {"zero_point": "int"}, {"zero_point": "float"}], ids=str)
STORED = pytest.mark.parametrize(
    "grid",
    [
        {"symmetric": True},
        {"zero_point": "int"},
        {"zero_point": "float"},
        {"symmetric": True, "scale_bits": 8},
        {"zero_point": "int", "scale_bits": 8},
        {"zero_point": "float", "scale_bits": 8},
    ],
    ids=str,
)
# (N, K, group_size): whole groups, a ragged last group, odd sizes, the whole row.
SHAPES = pytest.mark.parametrize("shape", [(8, 128, 64), (5, 100, 32), (41, 83, 16), (7, 70, 0)], ids=str)


def problem(N, K, seed=0, tokens=None, dtype=torch.float32):
    """A weight and the statistics of correlated inputs whose channels differ in size, as a real layer's do."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g, dtype=torch.float64) * 0.05
    mix = torch.randn(K, K, generator=g, dtype=torch.float64) * 0.3 + torch.eye(K)
    size = torch.rand(K, generator=g, dtype=torch.float64).mul(4).exp()
    x = torch.randn(tokens or 4 * K, K, generator=g, dtype=torch.float64) @ mix * size[torch.randperm(K, generator=g)]
    collector = Collector(K, NEEDS, torch.float64)
    collector.add(x)
    return w.to(dtype), collector.result()


def quantizer(name, **settings):
    """The quantizer with its defaults, but for those of `settings` that it has."""
    cls = registry.find("quantizers", name)
    return cls(**{key: value for key, value in settings.items() if key in cls.__dataclass_fields__})


def output_error(w, q, statistics):
    """tr((W - Q) H (W - Q)^T) in float64."""
    d = w.double() - q.double()
    return float(((d @ statistics.hessian_KK.double()) * d).sum())


# Every quantizer.


@EVERY
@SHAPES
def test_returns_the_weight_packed(name, shape):
    N, K, _ = shape
    w, statistics = problem(N, K)
    packed = quantizer(name, group_size=16)(w, statistics)
    assert isinstance(packed, Packed) and packed.shape == (N, K)
    # One or two bits leave less than the weight's norm as error; an answer for another weight leaves sqrt(2) of it.
    assert_close(packed.unpack(), w, 0.9, "decoded weight")


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(name, bad):
    w, statistics = problem(8, 128)
    w[3, 5] = bad
    with pytest.raises(ValueError, match="1 of 1024 weights are NaN or infinite"):
        quantizer(name)(w, statistics)


@EVERY
def test_missing_statistics_are_refused(name):
    w, statistics = problem(8, 128)
    method = quantizer(name)
    if not method.needs:
        assert torch.equal(method(w).unpack(), method(w, statistics).unpack()), f"{name} uses what it does not need"
        return
    for missing in (None, Statistics(num_tokens=1)):
        with pytest.raises(ValueError, match=f"needs the {min(method.needs)} of the layer's inputs"):
            method(w, missing)
    with pytest.raises(ValueError, match="is of 128 input channels, but the weight has 64"):
        method(w[:, :64], statistics)


@EVERY
def test_needs_and_settings_are_declared(name):
    cls = registry.find("quantizers", name)
    assert cls.needs <= NEEDS
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), f"{name}.{field.name} has no help text"


@EVERY
def test_power_of_two_scales_through(name):
    w, statistics = problem(9, 128)
    method = quantizer(name)
    assert torch.equal(method(w * 4, statistics).unpack(), method(w, statistics).unpack() * 4)


@EVERY
def test_neither_weight_nor_statistics_are_changed(name):
    w, statistics = problem(9, 128)
    before = w.clone(), statistics.hessian_KK.clone()
    first = quantizer(name)(w, statistics)
    assert torch.equal(w, before[0]) and torch.equal(statistics.hessian_KK, before[1])
    again = quantizer(name)(w.t().contiguous().t(), statistics)
    assert torch.equal(first.unpack(), again.unpack())


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_quantized_in_float32(name, dtype):
    w, statistics = problem(9, 128)
    method, narrow = quantizer(name), w.to(dtype)
    assert torch.equal(method(narrow, statistics).unpack(), method(narrow.float(), statistics).unpack())


# The uniform grid.


@BITS
@STORED
@SHAPES
def test_rtn_codes_are_the_nearest_points_of_the_stored_grid(bits, grid, shape):
    N, K, group_size = shape
    w, _ = problem(N, K, seed=1)
    packed = RTN(bits=bits, group_size=group_size, **grid)(w)
    assert isinstance(packed, Uniform)
    assert packed.scale.dtype == (torch.uint8 if "scale_bits" in grid else torch.float16)
    group = torch.arange(K) // (group_size or K)
    scale, zero = packed.scales().double()[:, group], packed.zeros().double()[:, group]
    points = scale[..., None] * (torch.arange(2**bits).double() - zero[..., None])
    distance = (points - w.double()[..., None]).abs()
    chosen = distance.gather(-1, packed.codes().long()[..., None])[..., 0]
    # Exact but for ties, which float32 may break either way.
    assert (chosen <= distance.amin(-1) + 1e-6 * scale).all()
    assert_close(packed.unpack(), points.gather(-1, packed.codes().long()[..., None])[..., 0], 1e-6)


def weighted_error(w, weight, scale, zero, bits, group_size):
    s, z = (per_column(t, w.shape[1], group_size, torch.float64) for t in (scale, zero))
    miss = (encode(w.double(), s, z, bits) - z) * s - w.double()
    groups = torch.arange(w.shape[1]) // (group_size or w.shape[1])
    return torch.zeros(w.shape[0], scale.shape[1]).double().index_add_(1, groups, miss.square() * weight)


@BITS
@STORED
@SHAPES
def test_search_is_never_worse_than_minmax_in_any_group(bits, grid, shape):
    N, K, group_size = shape
    w, statistics = problem(N, K, seed=2)
    zero_point = "middle" if "symmetric" in grid else grid["zero_point"]
    for weight in (torch.ones(K).double(), statistics.hessian_KK.diagonal()):
        found = [
            find_grid(w, bits, group_size or K, zero_point, weight, search, grid.get("scale_bits", 16))
            for search in ("minmax", "mse")
        ]
        widest, searched = (weighted_error(w, weight, *f, bits, group_size) for f in found)
        assert (searched <= widest * (1 + 1e-5)).all()
        assert bits == 8 or searched.sum() < 0.98 * widest.sum(), "the search found nothing"


@BITS
def test_minmax_is_the_textbook_grid(bits):
    w, _ = problem(5, 100, seed=3)
    last = 2**bits - 1
    for n, g in itertools.product(range(5), range(4)):
        group = w[n, 32 * g : 32 * (g + 1)].tolist()
        low, high = min(*group, 0), max(*group, 0)
        scale, zero = (t[n, g].item() for t in find_grid(w, bits, 32, "int", search="minmax"))
        assert scale == torch.tensor((high - low) / last).half().item()
        assert zero == round(-low * last / (high - low))
        scale, zero = (t[n, g].item() for t in find_grid(w, bits, 32, "middle", search="minmax"))
        middle = 2 ** (bits - 1)
        assert scale == torch.tensor(max(high / (last - middle), -low / middle)).half().item() and zero == middle
        scale, zero = (t[n, g].item() for t in find_grid(w, bits, 32, "float", search="minmax"))
        assert scale == pytest.approx((max(group) - min(group)) / last, rel=1e-3)
        assert -zero * scale == pytest.approx(min(group), abs=0.01 * scale * last)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@BITS
@GRIDS
def test_degenerate_groups(bits, grid, search):
    w = torch.zeros(6, 80)
    w[1], w[2], w[3, 40], w[4], w[5, :32] = 0.3, -0.3, 7.0, 1e-6, 0.5
    packed = RTN(bits=bits, group_size=32, scale_search=search, **grid)(w)
    decoded = packed.unpack()
    assert decoded.isfinite().all()
    assert torch.equal(decoded[0], w[0]) and torch.equal(decoded[5, 32:], w[5, 32:]), "groups of zeros stay exact"
    # One value and zero lie on every grid, up to the rounding of its fp16 scale (a subnormal one for 1e-6).
    assert_close(decoded[:4], w[:4], 1e-3)
    assert (decoded[4] - w[4]).abs().max() <= 2.0**-24 * 2**bits


@pytest.mark.parametrize("zero_point", ["int", "float"])
def test_rows_of_very_different_size_share_an_exponent(zero_point):
    w = problem(64, 128)[0]
    # Rows 0 to 31 are one run, 32 to 63 another.
    w[1], w[2], w[3], w[32:], w[33] = 0, w[2] / 64, 1.0, w[32:] / 4096, 0
    packed = RTN(bits=4, group_size=32, zero_point=zero_point, scale_bits=8)(w)
    wide = RTN(bits=4, group_size=32, zero_point=zero_point)(w)
    assert not packed.unpack()[[1, 33]].any(), "groups of zeros stay exact"
    error, wide_error = ((p.unpack() - w).norm(dim=1) for p in (packed, wide))
    assert (error <= 1.2 * wide_error)[torch.arange(64) != 3].all()
    assert error[3] < 0.02 * w[3].norm()


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_weights_beyond_the_grid_are_refused(scale_bits):
    with pytest.raises(ValueError, match=r"weights reach 1e[+]06, which needs a scale beyond fp16"):
        RTN(scale_bits=scale_bits)(torch.full((2, 64), 1e6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits = 5 is not offered; allowed: 2, 3, 4, 8"),
        ({"zero_point": "flaot"}, "unknown zero_point 'flaot'.*Did you mean 'float'"),
        ({"scale_search": "mes"}, "unknown scale_search 'mes'.*Did you mean 'mse'"),
        ({"scale_bits": 4}, "scale_bits = 4 is not offered; allowed: 8, 16"),
        ({"symmetric": True, "zero_point": "float"}, "symmetric grid stores no zero point"),
        ({"damp_percent": -0.1}, "damp_percent = -0.1 is out of range"),
        ({"block_size": 0}, "block_size = 0 is out of range"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**settings)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_group_that_does_not_fit_is_refused(name):
    w, statistics = problem(8, 48)
    with pytest.raises(ValueError, match="group_size = 64 does not fit 48 columns"):
        quantizer(name)(w, statistics)


# GPTQ.


def twin(w, h, gptq, scale, zero):
    """Optimal Brain Quantization in a fixed order, as in its paper: no Cholesky, no blocks.

    After column k is rounded, its error moves onto all columns still free, by row k of the inverse of the free part of
    H; then one step of Gauss-Jordan elimination takes column k out of that inverse.
    """
    w = w.double().clone()
    h = h.double()
    mean = h.diagonal().mean()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    damped = h + gptq.damp_percent * mean * torch.diag((~dead).double()) + mean * torch.diag(dead.double())
    inverse = torch.linalg.inv(damped)
    order = h.diagonal().argsort(descending=True, stable=True) if gptq.act_order else torch.arange(len(h))
    codes = torch.zeros(w.shape, dtype=torch.long)
    for k in order.tolist():
        g = k // (gptq.group_size or len(h))
        s, z = scale[:, g].double(), zero[:, g].double()
        codes[:, k] = (w[:, k] / s + z).round().clamp(0, 2**gptq.bits - 1).long()
        error = (w[:, k] - s * (codes[:, k] - z)) / inverse[k, k]
        w -= torch.outer(error, inverse[k])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_size", [1, 16, 30, 128, 1000])
@STORED
@SHAPES
def test_gptq_is_the_textbook_twin(act_order, block_size, grid, shape):
    N, K, group_size = shape
    for seed, bits in ((0, 2), (1, 3), (2, 4)):
        w, statistics = problem(N, K, seed, dtype=torch.float64)
        gptq = GPTQ(bits=bits, group_size=group_size, act_order=act_order, block_size=block_size, **grid)
        packed = gptq(w, statistics)
        codes = twin(w, statistics.hessian_KK, gptq, packed.scales(), packed.zeros())
        assert torch.equal(packed.codes().long(), codes)
        group = torch.arange(K) // (group_size or K)
        scale, zero = packed.scales().double()[:, group], packed.zeros().double()[:, group]
        assert_close(scale * (packed.codes() - zero), scale * (codes - zero), 1e-9)


@STORED
def test_gptq_rounds_rows_in_slices_to_the_same_weight(grid, monkeypatch):
    w, statistics = problem(75, 130, dtype=torch.float64)
    quantizer = GPTQ(bits=2, **grid)
    whole = quantizer(w, statistics)
    monkeypatch.setattr("lrec.quantizers.gptq.SLICE_WEIGHTS_CPU", 130 * 17)
    sliced = quantizer(w, statistics)
    for name, tensor in whole.tensors().items():
        assert torch.equal(sliced.tensors()[name], tensor), name


@pytest.mark.parametrize("method", [RTN, GPTQ])
@STORED
def test_per_tensor_is_one_grid_for_all_rows(method, grid):
    w, statistics = problem(40, 130)
    quantizer = method(bits=3, group_size=0, per_tensor=True, **grid)
    packed = quantizer(w, statistics)
    assert (packed.scales() == packed.scales()[0, 0]).all() and (packed.zeros() == packed.zeros()[0, 0]).all()
    if method is RTN:
        alone = RTN(bits=3, group_size=0, **grid)(w.reshape(1, -1))
        assert torch.equal(packed.unpack().reshape(1, -1), alone.unpack())
    with pytest.raises(ValueError, match="group_size 0"):
        method(per_tensor=True)


def test_gptq_in_float32_is_almost_the_twin():
    w, statistics = problem(64, 256)
    gptq = GPTQ(bits=3)
    packed = gptq(w, statistics)
    codes = twin(w, statistics.hessian_KK, gptq, packed.scales(), packed.zeros())
    # One code that float32 rounds the other way changes those that make up for it, but not the error of the output.
    expected = per_column(packed.scale, 256, 64, torch.float64) * (
        codes - per_column(packed.zeros(), 256, 64, torch.float64)
    )
    assert (packed.codes() != codes).float().mean() < 0.01
    assert output_error(w, packed.unpack(), statistics) == pytest.approx(
        output_error(w, expected, statistics), rel=0.01
    )


def test_factor_is_unit_upper_and_restores_the_damped_hessian():
    _, statistics = problem(1, 83)
    h = statistics.hessian_KK
    r, d = factor(h, 0.01)
    assert torch.equal(r.tril(), torch.eye(83, dtype=torch.float64))
    assert_close(r * d @ r.t(), h + 0.01 * h.diagonal().mean() * torch.eye(83, dtype=torch.float64), 1e-12)


def test_channels_without_input_become_zero_and_change_nothing_else():
    w, statistics = problem(8, 128)
    dead = torch.arange(128) % 5 == 0
    h = statistics.hessian_KK.masked_fill(dead | dead[:, None], 0)
    packed = GPTQ(bits=3, symmetric=True)(w, Statistics(num_tokens=1, hessian_KK=h))
    assert not packed.unpack()[:, dead].any()
    other = GPTQ(bits=3, symmetric=True)(w.masked_fill(dead, 0), Statistics(num_tokens=1, hessian_KK=h))
    assert torch.equal(packed.unpack(), other.unpack())
    nothing = GPTQ()(w, Statistics(num_tokens=1, hessian_KK=torch.zeros_like(h)))
    assert not nothing.unpack().any()


def test_hessian_that_is_not_positive_definite_is_an_error():
    w, statistics = problem(8, 128)
    h = statistics.hessian_KK.clone()
    h[3, 3] *= -1
    with pytest.raises(ValueError, match=r"damp_percent = 0.01 is not positive definite.*such as 0.1"):
        GPTQ()(w, Statistics(num_tokens=1, hessian_KK=h))
    with pytest.raises(ValueError, match="not positive definite"):
        GPTQ()(w, Statistics(num_tokens=1, hessian_KK=h * float("nan")))


def test_fewer_tokens_than_channels_need_damping():
    w, statistics = problem(8, 128, tokens=20)
    assert GPTQ()(w, statistics).unpack().isfinite().all()
    with pytest.raises(ValueError, match=r"use a larger damp_percent, such as 0.01"):
        GPTQ(damp_percent=0.0)(w, Statistics(num_tokens=1, hessian_KK=torch.ones(128, 128)))


@pytest.mark.parametrize("seed", range(20))
def test_never_beats_the_optimum_of_tiny_problems(seed):
    bits, K = 2, 6
    w, statistics = problem(1, K, seed, dtype=torch.float64)
    h = statistics.hessian_KK
    scale, zero = (t.double() for t in find_grid(w, bits, K, "int"))
    grid = [scale * (q - zero) for q in range(2**bits)]
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=K)))
    values = torch.cat(grid, 1)[0][every]
    best = min(output_error(w, v[None], statistics) for v in values)
    r, _ = factor(h, 0.0)
    columns = [w.t().clone(), scale.expand(1, K).t().contiguous(), zero.expand(1, K).t().contiguous()]
    codes = round_columns(*columns, r, bits, 4).t()
    error = output_error(w, scale * (codes - zero), statistics)
    assert error >= best * (1 - 1e-9)
    # With uncorrelated inputs nothing can be made up for, and nearest rounding, here the optimum, must come out.
    diagonal = Statistics(num_tokens=1, hessian_KK=torch.diag(h.diagonal()))
    plain = round_columns(*columns, factor(diagonal.hessian_KK, 0.0)[0], bits, 4).t()
    best = min(output_error(w, v[None], diagonal) for v in values)
    assert output_error(w, scale * (plain - zero), diagonal) == pytest.approx(best, rel=1e-9)


def test_error_is_the_sum_of_pivots_times_squared_misses():
    """tr(E H E^T) = sum_k D_k |E R[:, k]|^2, the equation that GPTQ's rule and its grid's weights rest on."""
    w, statistics = problem(5, 83, dtype=torch.float64)
    e = w - RTN(group_size=16)(w).unpack().double()
    r, d = factor(statistics.hessian_KK, 0.0)
    assert float(((e @ r).square() * d).sum()) == pytest.approx(
        float(((e @ statistics.hessian_KK) * e).sum()), rel=1e-9
    )


def test_columns_may_come_in_any_order():
    w, statistics = problem(8, 128, dtype=torch.float64)
    shuffled = torch.randperm(128)
    h = statistics.hessian_KK[shuffled][:, shuffled]
    for settings in ({}, {"zero_point": "float"}, {"symmetric": True}):
        gptq = GPTQ(bits=3, group_size=0, **settings)
        plain = gptq(w, statistics)
        moved = gptq(w[:, shuffled], Statistics(num_tokens=1, hessian_KK=h))
        assert torch.equal(moved.codes(), plain.codes()[:, shuffled])
        assert torch.equal(moved.unpack(), plain.unpack()[:, shuffled])


def test_rows_are_quantized_independently():
    w, statistics = problem(300, 512)
    whole = GPTQ(bits=2)(w, statistics).unpack()
    part = GPTQ(bits=2)(w[250:], statistics).unpack()
    # Sums over another number of rows may round differently, and a code beside a tie may turn.
    assert (whole[250:] != part).float().mean() < 0.01
