"""The closed form is the optimum that a textbook whitened SVD finds, and lands in peft's adapters unchanged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrec import lowrank
from tests.checks import assert_close, tiny_llama

SHAPES = [(41, 64), (64, 41), (48, 48), (9, 401)]


def problem(N, K, seed=0, tokens=None):
    """A residual and the Hessian of inputs with a few strong channels; fewer tokens than K make it singular."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * K, K, generator=g, dtype=torch.float64)
    x[:, ::7] *= 9
    return torch.randn(N, K, generator=g, dtype=torch.float64), x.t() @ x


def damped(hessian, damping):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def textbook(residual, rank, r_KK, root):
    """U Sig V^T = svd(D S); BA = U_r Sig_r V_r^T S^-1, with the root S asked for."""
    if root == "cholesky":
        s = torch.linalg.cholesky(r_KK)
    else:
        values, vectors = torch.linalg.eigh(r_KK)
        s = vectors * values.sqrt() if root == "eigen" else (vectors * values.sqrt()) @ vectors.t()
    u, sig, vt = torch.linalg.svd(residual @ s, full_matrices=False)
    return (u[:, :rank] * sig[:rank]) @ vt[:rank] @ torch.linalg.inv(s)


def weighted(error, r_KK):
    return float(((error @ r_KK) * error).sum().clamp_min(0).sqrt())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("root", ["cholesky", "eigen", "symmetric"])
@pytest.mark.parametrize("rank", [1, 8])
def test_equals_the_whitened_svd_with_any_root(shape, root, rank):
    residual, hessian = problem(*shape)
    a, b = lowrank.factor(residual, rank, hessian, damping=0.05)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    assert_close(b.double() @ a.double(), textbook(residual, rank, damped(hessian, 0.05), root), 1e-6, "BA")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_hessian_it_is_the_svd(shape):
    residual, _ = problem(*shape)
    a, b = lowrank.factor(residual.float(), 5)
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    assert_close(b.double() @ a.double(), (u[:, :5] * s[:5]) @ vt[:5], 1e-6, "BA")
    assert_close(a.norm(dim=1), s[:5].sqrt().float(), 1e-6, "sizes")


@pytest.mark.parametrize("weigh", [True, False])
def test_the_first_components_are_the_answer_for_a_smaller_rank(weigh):
    residual, hessian = problem(48, 64)
    hessian = hessian if weigh else None
    a, b = lowrank.factor(residual, 12, hessian)
    for rank in (1, 5, 11):
        small_a, small_b = lowrank.factor(residual, rank, hessian)
        assert_close(b[:, :rank] @ a[:rank], small_b @ small_a, 1e-5, f"rank {rank}")


@given(seed=st.integers(0, 10**6), N=st.integers(2, 24), K=st.integers(2, 24), data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_worse_than_plain_svd_or_any_other_choice_in_the_weighted_norm(seed, N, K, data):
    rank = data.draw(st.integers(1, min(N, K)))
    residual, hessian = problem(N, K, seed, tokens=data.draw(st.integers(1, 2 * K)))
    r = damped(hessian, 0.01)
    a, b = (t.double() for t in lowrank.factor(residual, rank, hessian))
    best = weighted(residual - b @ a, r)
    plain_a, plain_b = (t.double() for t in lowrank.factor(residual, rank))
    slack = 1e-5 * weighted(residual, r)
    assert best <= weighted(residual - plain_b @ plain_a, r) + slack
    nudged = b @ a + 1e-2 * torch.randn(N, 1, dtype=torch.float64) @ a[:1]
    assert best <= weighted(residual - nudged, r) + slack
    singular_values = torch.linalg.svdvals(residual @ torch.linalg.cholesky(r))
    assert abs(best - float(singular_values[rank:].norm())) <= slack


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weigh", [True, False])
def test_the_spectrum_tells_what_factors_of_each_rank_leave(shape, weigh):
    residual, hessian = problem(*shape)
    r = damped(hessian, 0.01) if weigh else torch.eye(shape[1], dtype=torch.float64)
    left = lowrank.left_by_rank(residual, hessian if weigh else None)
    assert len(left) == min(shape) + 1 and left[0] == 1 and left[-1] == 0
    for rank in (1, 3, 8):
        a, b = (t.double() for t in lowrank.factor(residual, rank, hessian if weigh else None))
        found = weighted(residual - b @ a, r) ** 2 / weighted(residual, r) ** 2
        assert abs(float(left[rank]) - found) < 1e-6, rank
    assert lowrank.left_by_rank(torch.zeros(3, 5)).tolist() == [0] * 4


def test_the_full_rank_gives_the_residual_back_and_zero_gives_zero():
    residual, hessian = problem(12, 20)
    a, b = lowrank.factor(residual, 12, hessian)
    assert_close((b @ a).double(), residual, 1e-6)
    a, b = lowrank.factor(torch.zeros(12, 20), 4, hessian)
    assert a.count_nonzero() == 0 and b.count_nonzero() == 0


def test_the_factors_are_balanced_and_do_not_know_the_scale_of_the_hessian():
    residual, hessian = problem(41, 64)
    a, b = lowrank.factor(residual, 6, hessian)
    assert_close(a.norm(dim=1), b.norm(dim=0), 1e-6, "norms of a_r and b_r")
    for factor in (1e-6, 1e6):
        other_a, other_b = lowrank.factor(residual, 6, factor * hessian)
        assert_close(other_b @ other_a, b @ a, 1e-6)
        assert_close(other_a.norm(dim=1), a.norm(dim=1), 1e-6)


def test_dead_inputs_without_damping_are_no_obstacle():
    residual, hessian = problem(16, 24, tokens=10)
    hessian[:, 5] = hessian[5] = 0
    a, b = lowrank.factor(residual, 10, hessian, damping=0)
    assert weighted(residual - (b @ a).double(), hessian) <= 1e-5 * weighted(residual, hessian)


def test_bad_input_is_refused():
    residual, hessian = problem(8, 12)
    with pytest.raises(ValueError, match="allowed: 1 to 8"):
        lowrank.factor(residual, 9, hessian)
    with pytest.raises(ValueError, match="NaN"):
        lowrank.factor(residual * torch.nan, 2, hessian)


def adapted(rank=4, alpha=12, **changes):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    return get_peft_model(tiny_llama(), config)


def factors_of(model, rank=6):
    linears = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    return {n: lowrank.factor(torch.randn(m.out_features, m.in_features), rank) for n, m in linears.items()}


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=["alpha/r", "alpha/sqrt(r)"])
def test_the_adapter_adds_exactly_the_closed_form(changes):
    model = adapted(**changes)
    factors = factors_of(model)
    lowrank.initialise(model, factors)
    for name, (a, b) in factors.items():
        layer = model.get_base_model().get_submodule(name)
        assert layer.scaling["default"] != 1
        assert_close(layer.get_delta_weight("default").detach(), b[:, :4] @ a[:4], 1e-6, name)
        sizes = layer.lora_A["default"].weight.norm(dim=1).detach(), layer.lora_B["default"].weight.norm(dim=0).detach()
        assert_close(*sizes, 1e-5)


def test_layers_that_do_not_fit_are_all_named_and_nothing_is_changed():
    model = adapted(rank=4)
    factors = factors_of(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    missing, small, turned = list(factors)[:3]
    del factors[missing]
    factors[small] = tuple(f[:2] if i == 0 else f[:, :2] for i, f in enumerate(factors[small]))
    factors[turned] = (factors[turned][0][:, :-1], factors[turned][1])
    with pytest.raises(ValueError) as error:
        lowrank.initialise(model, factors)
    message = str(error.value)
    assert f"{missing}: no factors" in message and f"{small}: factors have rank 2, but the adapter 4" in message
    assert f"{turned}: factors of a weight of shape" in message and message.count("\n") == 3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="no LoRA adapter named 'other'"):
        lowrank.initialise(model, factors, "other")


def test_dora_is_refused():
    model = adapted(use_dora=True)
    with pytest.raises(ValueError, match="not plain LoRA"):
        lowrank.initialise(model, factors_of(model))


def test_a_file_gives_back_the_halves_and_a_damaged_one_an_error(tmp_path):
    factors = {"a.b": lowrank.factor(torch.randn(8, 12), 3), "c": lowrank.factor(torch.randn(5, 4), 2)}
    path = tmp_path / "f.safetensors"
    lowrank.save(factors, path)
    loaded = lowrank.load(path)
    assert loaded.keys() == factors.keys()
    for name, pair in factors.items():
        assert all(torch.equal(x, y.half()) for x, y in zip(loaded[name], pair, strict=True))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"f\.safetensors"):
        lowrank.load(path)
    with pytest.raises(ValueError, match=r"missing\.safetensors"):
        lowrank.load(tmp_path / "missing.safetensors")
