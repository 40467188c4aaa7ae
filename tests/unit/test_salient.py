"""PTQ1.61: the layer against a textbook twin, its bytes on disk, and the training of its factors."""

import pytest
import torch
from safetensors.torch import save_file

from lrec.formats.salient import Salient
from lrec.quantizers.ptq161 import Latent, Ptq161, Refinement, refine, salient_mask, two_branch_loss
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
    up, sign = upstream[:, rest], latent.signs_NM
    s, mu, r1, r2 = latent.s_N[:, None], latent.mu_N[:, None], latent.r1_N[:, None], latent.r2_M[None]
    with torch.no_grad():
        assert torch.allclose(latent.s_N.grad, (up * r1 * r2 * sign).sum(1))
        assert torch.allclose(latent.r1_N.grad, (up * r2 * (s * sign + mu)).sum(1))
        assert torch.allclose(latent.r2_M.grad, (up * r1 * (s * sign + mu)).sum(0))


def test_two_branch_loss_twin():
    torch.manual_seed(0)
    output, clean, drifted = torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind()
    expected = 0.0
    for target in (clean, drifted):
        expected += float((target - output).square().mean())
        cosines = [
            float(a @ b / (a.norm() * b.norm())) for a, b in zip(target.view(-1, 8), output.view(-1, 8), strict=True)
        ]
        expected -= sum(torch.tensor(c).clamp_min(1e-6).log().item() for c in cosines) / len(cosines)
    assert float(two_branch_loss(output, clean, drifted)) == pytest.approx(expected, rel=1e-6)
    assert float(two_branch_loss(clean, clean, clean)) == pytest.approx(0, abs=1e-9)


class Block(torch.nn.Module):
    """Two linears with a nonlinearity and a residual connection."""

    def __init__(self, K=96, inner=160):
        super().__init__()
        self.up, self.down = torch.nn.Linear(K, inner, bias=False), torch.nn.Linear(inner, K, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def block_and_packed():
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    # Columns of different size, as in real layers: what r2 is for.
    block.up.weight.mul_(torch.logspace(-0.5, 0.5, 96)[torch.randperm(96)])
    block.down.weight.mul_(torch.logspace(-0.5, 0.5, 160)[torch.randperm(160)])
    full = {name: value.detach() for name, value in block.named_parameters()}
    strength = torch.linspace(0.2, 3, 96)
    states = [(torch.randn(2, 16, 96) * strength,) * 2 for _ in range(6)]
    states = [(clean, clean + 0.02 * torch.randn_like(clean)) for clean, _ in states]
    maxima = {"up.weight": strength, "down.weight": torch.rand(160)}
    packed = {name: Ptq161()(w, Statistics(num_tokens=1, maxima_K=maxima[name])) for name, w in full.items()}
    return block, full, packed, states


def test_refining_a_block_brings_its_outputs_closer_and_changes_factors_alone():
    block, full, packed, states = block_and_packed()

    def run(weights, i, state):
        return torch.func.functional_call(block, weights, (state,))

    def loss(weights):
        with torch.no_grad():
            parts = [
                two_branch_loss(run(weights, i, b), run(full, i, a), run(full, i, b)) for i, (a, b) in enumerate(states)
            ]
        return float(torch.stack(parts).mean())

    refined, history = refine(packed, full, run, states, Refinement(epochs=30, scale_lr=2e-3, factor_lr=5e-3))
    before, after = (loss({name: p.unpack() for name, p in some.items()}) for some in (packed, refined))
    assert history[0] == pytest.approx(before, rel=0.2)
    assert after == pytest.approx(history[-1], rel=0.1)
    assert after < 0.7 * before
    for name, new in refined.items():
        assert isinstance(new, Salient)
        for tensor in ("qweight", "mask", "salient", "salient_scale", "salient_zero"):
            assert torch.equal(new.tensors()[tensor], packed[name].tensors()[tensor])
        assert not torch.equal(new.column, packed[name].column)
        assert new.nbytes == packed[name].nbytes
    again, _ = refine(packed, full, run, states, Refinement(epochs=30, scale_lr=2e-3, factor_lr=5e-3))
    assert all(torch.equal(again[name].unpack(), new.unpack()) for name, new in refined.items())


def test_a_loss_that_is_not_finite_stops_the_training():
    block, full, packed, states = block_and_packed()

    def run(weights, i, state):
        return torch.func.functional_call(block, weights, (state,)) * (float("nan") if i == 3 else 1.0)

    with pytest.raises(ValueError, match=r"the loss of epoch 1 is nan; .* lower scale_lr"):
        refine(packed, full, run, states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ptq161(bits=2), r"ptq161 has 1 bit for most columns and 4 for salient ones, not 2"),
        (lambda: Ptq161(salient_share=1.0), r"salient_share = 1.0; allowed: above 0 and below 1"),
        (lambda: Ptq161()(torch.randn(4, 32)), r"needs the maxima"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
