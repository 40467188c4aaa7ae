"""PTQ1.61: the layer against a textbook twin, its bytes on disk, and the training of its factors."""

import math

import pytest
import torch
from safetensors.torch import save_file

from lrec.formats.salient import Salient
from lrec.quantizers import BlockView
from lrec.quantizers.ptq161 import Latent, Ptq161, salient_mask, two_branch_loss
from lrec.statistics import Statistics


def layer(N, K, seed=0):
    """A packed weight, the full one, and the maxima it was made with."""
    generator = torch.Generator().manual_seed(seed)
    w, maxima = torch.randn(N, K, generator=generator) * 0.1, torch.rand(K, generator=generator)
    return Ptq161()(w, Statistics(num_tokens=1, maxima_K=maxima)), w, maxima


@pytest.mark.parametrize(("K", "count"), [(41, 8), (401, 96), (576, 128), (4096, 832), (20, 4), (17, 3)])
def test_the_mask_marks_the_largest_maxima(K, count):
    maxima = torch.rand(K, generator=torch.Generator().manual_seed(K))
    mask = salient_mask(maxima, 0.2)
    assert mask.sum() == count
    assert maxima[mask].min() > maxima[~mask].max()


@pytest.mark.parametrize("shape", [(41, 401), (3, 41), (5, 576)])
def test_textbook_twin(shape):
    packed, w, maxima = layer(*shape)
    mask, decoded = salient_mask(maxima, 0.2), packed.unpack().double()
    for n in range(shape[0]):
        kept, rest = w[n][mask].double(), w[n][~mask].double()
        low, high = min(kept.min().item(), 0), max(kept.max().item(), 0)
        scale = float(torch.tensor((high - low) / 15).half())
        zero = min(max(round(-low / scale), 0), 15)
        codes = (kept / scale + zero).round().clamp(0, 15)
        # A weight halfway between two levels may go either way in single precision.
        assert ((decoded[n][mask] - scale * (codes - zero)).abs() < 1e-6).float().mean() > 0.97
        mu = rest.mean()
        expected = torch.where(rest > mu, 1, -1) * (rest - mu).abs().mean() + mu
        assert torch.allclose(decoded[n][~mask], expected, atol=2e-4)


def test_stored_bits_of_a_large_layer(tmp_path):
    packed, _, _ = layer(4096, 4096)
    save_file(packed.tensors(), tmp_path / "weight.safetensors")
    data = (tmp_path / "weight.safetensors").read_bytes()
    bits = 8 * (len(data) - 8 - int.from_bytes(data[:8], "little")) / 4096**2
    assert bits == packed.bits_per_weight
    assert 1.61 <= bits <= 1.65


def test_latent_weight_is_the_packed_one_and_packs_back():
    packed, _, _ = layer(9, 401)
    latent = Latent(packed)
    assert torch.allclose(latent(), packed.unpack(), atol=1e-6)
    again = latent.packed()
    assert again.spec() == packed.spec()
    assert all(torch.equal(again.tensors()[name], value) for name, value in packed.tensors().items())
    with torch.no_grad():
        for value in latent.parameters():
            value.mul_(1 + 0.2 * torch.rand_like(value))
    # fp16 factors, each off by up to 2^-11.
    assert torch.allclose(latent.packed().unpack(), latent(), rtol=3 * 2**-11, atol=1e-4)


def test_gradients_of_the_factors():
    packed, _, _ = layer(3, 41)
    latent = Latent(packed).double()
    latent.mu_N.copy_(torch.randn(3))
    upstream = torch.randn(3, 41, dtype=torch.float64)
    latent().backward(upstream)
    _, rest = packed.columns()
    up, sign = upstream[:, rest], packed.signs().double()
    s, mu, r1, r2 = latent.s_N[:, None], latent.mu_N[:, None], latent.r1_N[:, None], latent.r2_M[None]
    with torch.no_grad():
        assert torch.allclose(latent.s_N.grad, (up * r1 * r2 * sign).sum(1))
        assert torch.allclose(latent.r1_N.grad, (up * r2 * (s * sign + mu)).sum(1))
        assert torch.allclose(latent.r2_M.grad, (up * r1 * (s * sign + mu)).sum(0))


@pytest.mark.parametrize("relative", [False, True])
def test_two_branch_loss_twin(relative):
    torch.manual_seed(0)
    output, clean, drifted = torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind()
    clean[0, 0] *= 1000  # a token of massive activations
    expected = 0.0
    for target in (clean, drifted):
        for a, b in zip(target.view(-1, 8), output.view(-1, 8), strict=True):
            error = float((a - b) @ (a - b)) / (float(a @ a) if relative else 8)
            error = math.log(1 + error) if relative else error
            cosine = (a @ b / (a.norm() * b.norm())).clamp_min(1e-6)
            expected += (error - cosine.log().item()) / 10
    assert float(two_branch_loss(output, clean, drifted, relative)) == pytest.approx(expected, rel=1e-6)
    assert float(two_branch_loss(clean, clean, clean, relative)) == pytest.approx(0, abs=1e-9)


class Block(torch.nn.Module):
    """Two linears with a nonlinearity and a residual connection."""

    def __init__(self, K=96, inner=160):
        super().__init__()
        self.up, self.down = torch.nn.Linear(K, inner, bias=False), torch.nn.Linear(inner, K, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def block_and_packed():
    """A block, its layers packed one by one, both models' hidden states before it, and the view that refining has."""
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    # Columns of different size, as in real layers: what r2 is for.
    block.up.weight.mul_(torch.logspace(-0.5, 0.5, 96)[torch.randperm(96)])
    block.down.weight.mul_(torch.logspace(-0.5, 0.5, 160)[torch.randperm(160)])
    full = {"up": block.up.weight, "down": block.down.weight}
    strength = torch.linspace(0.2, 3, 96)
    cleans = [torch.randn(1, 16, 96) * strength for _ in range(6)]
    ours = [clean + 0.02 * torch.randn_like(clean) for clean in cleans]
    maxima = {"up": strength, "down": torch.rand(160)}
    packed = {name: Ptq161()(w, Statistics(num_tokens=1, maxima_K=maxima[name])) for name, w in full.items()}

    def run(weights, i):
        return torch.func.functional_call(block, {f"{name}.weight": w for name, w in weights.items()}, (ours[i],))

    return packed, BlockView(weights=full, targets=[block(clean) for clean in cleans], run=run), block, ours


def test_refining_a_block_brings_its_outputs_closer_and_changes_factors_alone():
    packed, view, _, _ = block_and_packed()

    def loss(some):
        weights = {name: p.unpack() for name, p in some.items()}
        parts = [
            two_branch_loss(view.run(weights, i), view.targets[i], view.run(view.weights, i), True) for i in range(6)
        ]
        return float(torch.stack(parts).mean())

    method = Ptq161(refine_epochs=30, scale_lr=2e-3, factor_lr=5e-3)
    refined, history = method.refine(packed, view)
    before, after = loss(packed), loss(refined)
    assert len(history) == 30
    assert history[0] == pytest.approx(before, rel=0.2)
    assert after == pytest.approx(history[-1], rel=0.1)
    assert after < 0.7 * before
    for name, new in refined.items():
        assert isinstance(new, Salient)
        for tensor in ("qweight", "mask", "salient", "salient_scale", "salient_zero"):
            assert torch.equal(new.tensors()[tensor], packed[name].tensors()[tensor])
        assert not torch.equal(new.column, packed[name].column)
        assert new.nbytes == packed[name].nbytes
    again, _ = method.refine(packed, view)
    assert all(torch.equal(again[name].unpack(), new.unpack()) for name, new in refined.items())


@pytest.mark.parametrize("relative", [False, True])
def test_the_first_step_is_that_of_a_float64_twin(relative):
    packed, view, block, ours = block_and_packed()
    view = BlockView(weights=view.weights, targets=view.targets[:1], run=view.run)
    rates = {"scale_lr": 0.01, "factor_lr": 0.05}
    refined, _ = Ptq161(refine_epochs=1, relative_error=relative, **rates).refine(packed, view)
    twin, weights = {}, {}
    for name, old in packed.items():
        salient, rest = old.columns()
        s, mu = old.scale.double().requires_grad_(), old.offset.double()
        r1, r2 = torch.ones_like(s).requires_grad_(), old.column.double().requires_grad_()
        w = torch.zeros(old.shape, dtype=torch.float64)
        w[:, salient] = old.salient_weight().double()
        signs = old.signs().double()
        w[:, rest] = r1[:, None] * r2 * (s[:, None] * signs + mu[:, None])
        twin[name], weights[name] = (s, r1, r2, mu), w
    x, clean = ours[0].double(), view.targets[0].double()
    inner = torch.nn.functional.silu(x @ weights["up"].t())
    drifted = block.double()(x)
    loss = 0.0
    for target in (clean, drifted):
        out = x + inner @ weights["down"].t()
        cosine = (target * out).sum(-1) / (target.norm(dim=-1) * out.norm(dim=-1))
        error = ((target - out) ** 2).mean(-1)
        error = (1 + error / (target**2).mean(-1)).log() if relative else error
        loss = loss + error.mean() - cosine.log().mean()
    loss.backward()

    def first(parameter, rate):
        """Adam's first step, in which both moments are those of one gradient."""
        return (parameter - rate * parameter.grad / (parameter.grad.abs() + 1e-8)).detach()

    for name, (s, r1, r2, mu) in twin.items():
        new_r1 = first(r1, rates["factor_lr"])
        expected = {
            "scale": new_r1 * first(s, rates["scale_lr"]),
            "offset": new_r1 * mu,
            "column": first(r2, rates["factor_lr"]),
        }
        for tensor, value in expected.items():
            assert torch.allclose(refined[name].tensors()[tensor].double(), value, rtol=2e-3, atol=1e-4), (name, tensor)


def test_a_loss_that_is_not_finite_stops_the_training():
    packed, view, _, _ = block_and_packed()

    def run(weights, i):
        return view.run(weights, i) * (float("nan") if i == 3 else 1.0)

    with pytest.raises(ValueError, match=r"the loss of epoch 1 is nan; .* lower scale_lr"):
        Ptq161().refine(packed, BlockView(weights=view.weights, targets=view.targets, run=run))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ptq161(bits=2), r"ptq161 has 1 bit for most columns and 4 for salient ones, not 2"),
        (lambda: Ptq161(salient_share=1.0), r"salient_share = 1.0; allowed: above 0 and below 1"),
        (lambda: Ptq161()(torch.randn(4, 32)), r"needs the maxima"),
        (lambda: Ptq161(refine_epochs=-1), r"refine_epochs = -1; allowed: 0"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
