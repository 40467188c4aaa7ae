"""Laws of the input statistics: they are sums over tokens, however the tokens come."""

import pytest
import torch
from checks import assert_close

from lrec.statistics import NEEDS, Collector, Statistics, matched


def collected(batches, K, needs=NEEDS, dtype=torch.float32):
    collector = Collector(K, needs, dtype)
    for x in batches:
        collector.add(x)
    return collector.result()


def inputs(T, K, seed=0, dtype=torch.float32):
    # Channels of very different size, as real activations have.
    scale = torch.logspace(-2, 2, K)
    return (torch.randn(T, K, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_equals_the_definition(dtype, given):
    x = inputs(401, 41, dtype=given)
    result = collected([x], 41, dtype=dtype)
    wide = x.double()
    expected = torch.stack([torch.outer(row, row) for row in wide]).mean(0)
    assert result.num_tokens == 401
    assert result.hessian_KK.dtype == result.maxima_K.dtype == dtype
    assert_close(result.hessian_KK, expected, 1e-6 if dtype == torch.float32 else 1e-14, "hessian")
    assert torch.equal(result.maxima_K.double(), wide.abs().amax(0))


def test_batches_of_any_shape_sum_up_to_the_same():
    x = inputs(120, 41)
    whole = collected([x], 41)
    strided = torch.empty(41, 20).copy_(x[100:].t()).t()
    parts = collected([x[:1], x[1:1], x[1:100].view(3, 33, 41), strided], 41)
    assert not strided.is_contiguous()
    assert parts.num_tokens == whole.num_tokens
    assert_close(parts.hessian_KK, whole.hessian_KK, 1e-6, "hessian")
    assert torch.equal(parts.maxima_K, whole.maxima_K)


def test_many_small_batches_lose_nothing_in_float32():
    x = inputs(20000, 41)
    result = collected(x.split(7), 41)
    assert_close(result.hessian_KK, x.double().t() @ x.double() / 20000, 1e-6, "hessian")


def test_only_what_is_needed_is_collected():
    x = inputs(5, 41)
    assert collected([x], 41, {"maxima"}).hessian_KK is None
    assert collected([x], 41, {"hessian"}).maxima_K is None
    assert collected([x], 41, ()).num_tokens == 5


def test_every_need_is_a_field_of_the_result():
    x = inputs(5, 41)
    for need in NEEDS:
        held = {k: v for k, v in vars(collected([x], 41, {need})).items() if isinstance(v, torch.Tensor)}
        assert [name.rpartition("_")[0] for name in held] == [need]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_refused_and_not_added(bad):
    collector = Collector(41, NEEDS)
    collector.add(inputs(10, 41))
    before = collector.result()
    x = inputs(3, 41)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 41 channels"):
        collector.add(x)
    after = collector.result()
    assert after.num_tokens == 10 and torch.equal(after.hessian_KK, before.hessian_KK)


def test_float16_inputs_whose_squares_leave_float16_are_fine():
    x = torch.full((2, 16), 60000.0, dtype=torch.float16)
    assert torch.equal(collected([x], 16).hessian_KK, torch.full((16, 16), 60000.0**2))


def test_collector_leaves_no_graph_behind():
    x = inputs(4, 41).requires_grad_()
    assert not collected([x], 41).hessian_KK.requires_grad


def test_wrong_use_is_refused_in_words():
    with pytest.raises(ValueError, match=r"unknown statistic 'hesian'.*Did you mean 'hessian'"):
        Collector(41, {"hesian"})
    with pytest.raises(ValueError, match="allowed: float32, float64"):
        Collector(41, NEEDS, torch.bfloat16)
    with pytest.raises(ValueError, match=r"40 channels.*of 41"):
        Collector(41, NEEDS).add(torch.zeros(3, 40))
    with pytest.raises(ValueError, match="no calibration tokens"):
        Collector(41, NEEDS).result()


def test_result_is_frozen():
    with pytest.raises(AttributeError):
        Statistics(num_tokens=1).num_tokens = 2


def test_cross_is_the_mean_of_full_times_drifted():
    x, y = inputs(300, 41), inputs(300, 41, seed=1)
    collector = Collector(41, NEEDS, torch.float64)
    for part in (slice(0, 7), slice(7, 300)):
        collector.add(x[part], y[part])
    result = collector.result()
    expected = torch.stack([torch.outer(a, b) for a, b in zip(y.double(), x.double(), strict=True)]).mean(0)
    assert_close(result.cross_KK, expected, 1e-14, "cross")
    assert_close(result.hessian_KK, x.double().t() @ x.double() / 300, 1e-14, "hessian")
    assert not torch.allclose(result.cross_KK, result.cross_KK.t())


@pytest.mark.parametrize("T", [9, 200])
def test_matched_is_the_ridge_regression_of_full_outputs_on_drifted_inputs(T):
    x, y = (inputs(T, 41, seed, torch.float64) for seed in (0, 1))
    y = x + 0.3 * y
    w = torch.randn(5, 41, dtype=torch.float64)
    collector = Collector(41, NEEDS, torch.float64)
    collector.add(x, y)
    seen = collector.result()
    ridge = (T * 0.02 * seen.hessian_KK.diagonal().mean()).sqrt() * torch.eye(41, dtype=torch.float64)
    twin = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, ridge]) @ w.t()).solution.t()
    assert_close(matched(w, seen, damping=0.02), twin, 1e-8, "matched weight")
    assert_close(matched(w, seen, 0.25, damping=0.02), w + (twin - w) / 4, 1e-8, "a quarter of the way")


def test_matched_to_inputs_that_did_not_drift_is_the_weight():
    w = torch.randn(5, 41)
    assert torch.equal(matched(w, collected([inputs(300, 41)], 41)), w)
    assert torch.equal(matched(w, collected([torch.zeros(3, 41)], 41)), w)
