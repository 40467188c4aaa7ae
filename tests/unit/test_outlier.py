"""The gap code of outlier positions, and ICQuant against a textbook twin and the optimum."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrec.formats import unpack_codes
from lrec.formats.outlier import TILE, Outlier, encode_positions, expected_index_bits, golden_stride
from lrec.quantizers.icquant import IcQuant, fit_grid
from lrec.statistics import Statistics


def textbook_stream(flat, index_bits, tile):
    """Symbols of each tile, one position after the other."""
    jump = 2**index_bits - 1
    tiles = []
    for start in range(0, len(flat), tile):
        symbols, at = [], start - 1
        for position in range(start, min(start + tile, len(flat))):
            if flat[position]:
                while position - at > jump:
                    symbols.append(jump)
                    at += jump
                symbols.append(position - at - 1)
                at = position
        tiles.append(symbols)
    return tiles


masks = st.tuples(
    st.integers(1, 9), st.integers(16, 90), st.sampled_from([0.0, 0.005, 0.05, 0.5, 1.0]), st.integers(0, 2**31 - 1)
)


@settings(max_examples=150, deadline=None)
@given(masks, st.sampled_from([4, 5, 6, 7]), st.integers(1, 200))
def test_gap_code_says_every_mask(mask, index_bits, tile):
    N, K, share, seed = mask
    outlier = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < share
    index, starts = encode_positions(outlier, index_bits, tile)
    tiles = textbook_stream(outlier.flatten().tolist(), index_bits, tile)
    symbols = [symbol for part in tiles for symbol in part]
    assert starts.tolist() == [0, *itertools.accumulate(len(part) for part in tiles)]
    assert unpack_codes(index, index_bits, len(symbols)).tolist() == symbols
    assert index.numel() == -(-len(symbols) // 32) * index_bits
    zeros = torch.zeros(N, K, dtype=torch.int32)
    packed = Outlier.pack(zeros, outlier, torch.zeros(N, 2, 4), 2, index_bits, tile)
    assert torch.equal(packed.outliers().bool(), outlier)
    for start, stop in itertools.combinations(range(N + 1), 2):
        assert torch.equal(packed.outliers(slice(start, stop)).bool(), outlier[start:stop])


@pytest.mark.parametrize(("index_bits", "published"), [(5, 0.317), (6, 0.313), (7, 0.351)])
def test_index_costs_what_the_formula_says(index_bits, published):
    assert abs(expected_index_bits(0.05, index_bits) - published) < 6e-4
    torch.manual_seed(0)
    N, K = 512, 4096
    outlier = torch.zeros(N, K, dtype=torch.bool).scatter_(1, torch.rand(N, K).topk(round(0.05 * K)).indices, True)
    packed = Outlier.pack(torch.zeros(N, K, dtype=torch.uint8), outlier, torch.zeros(N, 2, 4), 2, index_bits)
    assert abs(packed.index_bits_per_weight / expected_index_bits(0.05, index_bits) - 1) < 0.02
    bits = 8 * (packed.index.numel() + packed.starts.numel()) * 4 / (N * K)
    assert packed.index_bits_per_weight == pytest.approx(bits, rel=1e-12)
    assert packed.starts.numel() == math.ceil(N * K / TILE) + 1


def test_crowded_columns_cost_no_more_than_even_ones():
    torch.manual_seed(0)
    N, K, count = 576, 576, 28
    crowd = torch.linspace(0.3, 1, K).log()
    noise = -(-torch.rand(N, K).log()).log()
    outlier = torch.zeros(N, K, dtype=torch.bool).scatter_(1, (noise + 3 * crowd).topk(count).indices, True)
    packed = Outlier.pack(torch.zeros(N, K, dtype=torch.uint8), outlier, torch.zeros(N, 2, 4), 2, 6)
    expected = expected_index_bits(count / K, 6)
    assert packed.index_bits_per_weight < 1.02 * expected
    index, _ = encode_positions(outlier, 6, TILE)
    assert 32 * index.numel() / (N * K) > 1.03 * expected, "not crowded enough to be a test"


@pytest.mark.parametrize("K", [1, 2, 16, 41, 576, 1536, 4096, 14336])
def test_the_walk_visits_every_column_once(K):
    assert sorted(i * golden_stride(K) % K for i in range(K)) == list(range(K))


def textbook_minmax(w, gamma, bits):
    """ICQuant with full-range grids: which weights are outliers, and the decoded rows."""
    N, K = w.shape
    count, half = max(1, int(gamma * K)), 2 ** (bits - 1)
    out, decoded = torch.zeros(N, K, dtype=torch.bool), torch.zeros(N, K, dtype=torch.float64)
    for n in range(N):
        ranked = sorted(range(K), key=lambda k: -abs(float(w[n, k])))
        inside = torch.tensor([float(w[n, k]) for k in ranked[count:]], dtype=torch.float64)
        tails = torch.tensor([abs(float(w[n, k])) for k in ranked[:count]], dtype=torch.float64)
        half16 = lambda value: float(torch.tensor(float(value)).half())  # noqa: E731
        low, step = half16(inside.min()), half16((inside.max() - inside.min()) / (2 * half - 1))
        base, stride = half16(tails.min()), half16(max((tails.max() - tails.min()) / (half - 1), 1e-6))
        for rank, k in enumerate(ranked):
            x = float(w[n, k])
            if rank < count:
                m = min(max(round((abs(x) - base) / stride), 0), half - 1)
                out[n, k], decoded[n, k] = True, math.copysign(base + stride * m, x)
            else:
                decoded[n, k] = low + step * min(max(round((x - low) / step), 0), 2 * half - 1)
    return out, decoded


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("shape", "gamma"), [((5, 401), 0.05), ((3, 41), 0.1), ((4, 16), 0.05)])
def test_minmax_twin(bits, shape, gamma):
    torch.manual_seed(bits)
    w = torch.randn(shape)
    packed = IcQuant(bits=bits, gamma=gamma, scale_search="minmax")(w)
    out, decoded = textbook_minmax(w, gamma, bits)
    assert torch.equal(packed.outliers().bool(), out)
    # A weight halfway between two levels may go either way in single precision.
    assert ((packed.unpack().double() - decoded).abs() < 1e-5).float().mean() > 0.998


def best_even_grid(x, weight, levels):
    """Least weighted squared error over all even grids: every way to give ascending codes to the sorted row."""
    x, order = x.double().sort()
    weight = weight[order]
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), levels - 1):
        q = torch.zeros(len(x), dtype=torch.float64)
        for cut in cuts:
            q[cut:] += 1
        design = torch.stack([q, torch.ones_like(q)], 1)
        root = weight.sqrt()
        fitted = design @ (torch.linalg.pinv(design * root[:, None]) @ (x * root))
        best = min(best, float(((x - fitted).square() * weight).sum()))
    return best


@pytest.mark.parametrize("weighted", [False, True])
def test_mse_grids_never_beat_the_optimum_and_come_close(weighted):
    torch.manual_seed(3)
    x = torch.randn(8, 12)
    weight = torch.rand(8, 12, dtype=torch.float64) ** 2 + 0.01 if weighted else torch.ones(8, 12, dtype=torch.float64)
    cost = {}
    for search in ("minmax", "mse"):
        scale, base = fit_grid(x, 4, search, weight if weighted else None)
        levels = base[:, None] + scale[:, None] * torch.arange(4)
        errors = (x.double()[..., None] - levels[:, None]).square().amin(-1)
        cost[search] = (errors * weight).sum(1)
    best = torch.tensor([best_even_grid(*row, 4) for row in zip(x, weight, strict=True)], dtype=torch.float64)
    assert (cost["mse"] >= best * (1 - 1e-9)).all()
    assert (cost["mse"] <= cost["minmax"] * (1 + 1e-9)).all()
    assert cost["mse"].sum() <= 1.25 * best.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("inner", ["rtn", "kmeans"])
def test_outliers_are_the_largest_weights_and_decode_to_their_own_grid(bits, inner):
    torch.manual_seed(0)
    w = torch.randn(9, 401) ** 3
    statistics = Statistics(num_tokens=1, hessian_KK=torch.diag(torch.rand(401) + 0.1))
    packed = IcQuant(bits=bits, inner=inner)(w, statistics)
    out = packed.outliers().bool()
    assert (out.sum(1) == 20).all()
    assert (torch.where(out, w.abs(), torch.inf).amin(1) >= torch.where(out, 0, w.abs()).amax(1)).all()
    levels = packed.levels()
    for n, part in itertools.product(range(9), (0, 1)):
        inside = out[n] == bool(part)
        x, q = w[n, inside], packed.unpack()[n, inside]
        # Outliers on an even grid keep their sign: the nearest level among those of that sign.
        allowed = levels[n, part].expand(len(x), -1)
        if part and inner == "rtn":
            allowed = torch.where(allowed.sign() == x.sign()[:, None], allowed, torch.inf)
        assert torch.allclose((x - q).abs(), (x[:, None] - allowed).abs().amin(1), atol=1e-6)


def test_report_measures_ranges_and_index():
    w = torch.full((2, 40), 0.5)
    w[:, ::2] = -0.5
    w[0, 3], w[0, 4], w[1, 5], w[1, 20] = 2.0, -2.0, 4.0, -4.0
    packed = IcQuant(gamma=0.05, scale_search="mse")(w)
    told = IcQuant().measure(packed, w)
    assert told["inlier_range"] == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert told["outliers"] == pytest.approx(0.05)
    assert told["index_bits_per_weight"] == packed.index_bits_per_weight
    assert told["expected_index_bits"] == pytest.approx(expected_index_bits(0.05, 6))


def test_constant_and_zero_rows_decode_to_themselves():
    w = torch.zeros(3, 64)
    w[1] = 0.25
    for inner in ("rtn", "kmeans"):
        statistics = Statistics(num_tokens=1, hessian_KK=torch.eye(64))
        assert torch.allclose(IcQuant(inner=inner)(w, statistics).unpack(), w, atol=1e-5)


def test_only_weighted_choices_need_statistics():
    for choice in ({}, {"inner": "kmeans"}, {"inner": "kmeans", "scale_search": "mse"}):
        assert IcQuant(**choice).needs == {"hessian"}
        with pytest.raises(ValueError, match=r"needs the hessian"):
            IcQuant(**choice)(torch.randn(4, 64))
    for search in ("mse", "minmax"):
        assert not IcQuant(scale_search=search).needs
        assert IcQuant(scale_search=search)(torch.randn(4, 64)).unpack().isfinite().all()


def test_weights_move_the_grids_towards_what_is_sensitive():
    torch.manual_seed(0)
    w, strong = torch.randn(16, 400), torch.arange(400) % 10 == 0
    statistics = Statistics(num_tokens=1, hessian_KK=torch.diag(torch.where(strong, 100.0, 0.01)))
    plain, weighted = (IcQuant(scale_search=s)(w, statistics).unpack() for s in ("mse", "weighted"))
    errors = [(w - q)[:, strong].square().sum() for q in (plain, weighted)]
    assert errors[1] < errors[0] and not torch.equal(plain, weighted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"bits = 5 is no width of the outlier format"),
        ({"gamma": 0.0}, r"gamma = 0.0 .* above 0, below 0.5"),
        ({"gamma": 0.6}, r"gamma = 0.6"),
        ({"index_bits": 8}, r"index_bits = 8 .* allowed: \(4, 5, 6, 7\)"),
        ({"inner": "kmean"}, r"unknown inner 'kmean'.* Did you mean 'kmeans'"),
        ({"scale_search": "max"}, r"unknown scale_search 'max'"),
    ],
)
def test_errors_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        IcQuant(**changes)
