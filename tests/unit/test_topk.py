"""Targets of a few logits a token: the bucketed divergence against float64, the bound, unbiased draws, packed ids."""

import pytest
import torch

from lrec.head import Head
from lrec.losses import DIVERGENCES, Objective, Targets, divergence
from lrec.topk import Sampled, TopK, draws, id_bytes, largest, pack_ids, unpack_ids
from tests.checks import assert_close

T, V, H, K = 23, 101, 16, 7


def problem(seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) for n in (T, V))
    teacher = spread * torch.randn(T, V, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[::5] = -100
    return hidden.requires_grad_(), Head(weight / 4), teacher, labels


def targets_of(kind, logits, *args):
    stored = {"topk": largest, "sampled": draws}[kind](logits, *args)
    ids = unpack_ids({name: t for name, t in stored.items() if name.startswith("ids")})
    return {"topk": TopK, "sampled": Sampled}[kind](stored["values"], ids, stored["lse"])


def compared(p, q, name, beta):
    if name == "forward_kl":
        return (p * (p / q).log()).sum()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_it_is_the_divergence_over_k_tokens_and_any_other(name, ce_weight):
    hidden, head, logits, labels = problem()
    targets = targets_of("topk", logits, K)
    objective = Objective(name, 0.3, ce_weight=ce_weight, chunk_tokens=5)
    actual = divergence(hidden, head, targets, labels, objective)
    (gradient,) = torch.autograd.grad(actual.loss, hidden)
    # The textbook: probabilities of the K tokens that are really the largest, and one minus their sum.
    q, kept = (hidden @ head.weight.t()).softmax(-1), labels != -100
    ids = logits.argsort(-1, descending=True)[:, :K]
    p = torch.cat([targets.values.double(), targets.lse.double()[:, None]], 1).softmax(-1)[kept]
    q_K = q.gather(1, ids)
    q_J = torch.cat([q_K, 1 - q_K.sum(1, keepdim=True)], 1)[kept]
    ce = -q.log().gather(1, labels.clamp_min(0)[:, None])[kept].sum()
    expected = compared(p, q_J, name, 0.3) + ce_weight * ce
    assert_close(actual.loss.detach(), expected.detach(), 1e-10, "loss")
    assert_close(gradient, torch.autograd.grad(expected, hidden)[0], 1e-10, "gradient")
    assert gradient[~kept].count_nonzero() == 0


def test_what_is_stored_is_the_distribution_to_half_precision():
    _, _, logits, _ = problem(spread=3.0)
    targets = targets_of("topk", logits.float(), K)
    p = torch.cat([targets.values.double(), targets.lse.double()[:, None]], 1).softmax(-1)
    true = logits.softmax(-1).sort(-1, descending=True).values
    assert_close(p[:, :K], true[:, :K], 1e-3, "largest")
    assert_close(p[:, K], true[:, K:].sum(-1), 2e-3, "all others")


def test_it_bounds_the_full_kl_from_below_and_reaches_it():
    hidden, head, logits, labels = problem()
    full = divergence(hidden, head, Targets(logits, Head(torch.eye(V).double())), labels, Objective()).loss
    found = [divergence(hidden, head, targets_of("topk", logits, k), labels, Objective()).loss for k in (1, 7, 50)]
    assert found[0] < found[1] < found[2] < full
    # With one token left, "any other" is that token; fp16 values are all that is lost.
    last = divergence(hidden, head, targets_of("topk", logits, V - 1), labels, Objective()).loss
    assert_close(last.detach(), full.detach(), 1e-3)


def test_a_tail_that_float32_cannot_hold_stays_finite():
    logits = torch.zeros(2, V)
    logits[:, 3] = 200.0
    hidden, head, labels = torch.zeros(2, H, requires_grad=True), Head(torch.ones(V, H)), torch.zeros(2).long()
    sharp = Head(torch.zeros(V, H), bias=logits[0])
    for h in (head, sharp):
        result = divergence(hidden, h, targets_of("topk", logits, 2), labels, Objective()).loss
        assert result.isfinite() and torch.autograd.grad(result, hidden)[0].isfinite().all()


def test_draws_are_unbiased_by_enumeration():
    """Over M equally spaced u the points (u + j) / K are K M equally spaced ones, so shares miss p by < 1 / (K M)."""
    M = 400
    hidden, head, logits, labels = problem(spread=2.0)
    labels[:] = 0
    p, q = logits.softmax(-1), (hidden @ head.weight.t()).softmax(-1)
    shares, grads, losses = torch.zeros(T, V).double(), torch.zeros(T, H).double(), 0.0
    for m in range(M):
        targets = targets_of("sampled", logits, K, torch.full((T,), (m + 0.5) / M))
        counts = torch.zeros(T, V).double().scatter_add_(1, targets.ids, torch.ones(T, K).double())
        assert ((counts - K * p).abs() < 1 + 1e-9).all(), "a count is K p rounded down or up"
        shares += counts / K / M
        loss = divergence(hidden, head, targets, labels, Objective(chunk_tokens=6)).loss
        losses += loss.item() / M
        grads += torch.autograd.grad(loss, hidden)[0] / M
    assert (shares - p).abs().max() <= 1 / (K * M) + 1e-12
    full = divergence(hidden, head, Targets(logits, Head(torch.eye(V).double())), labels, Objective()).loss
    assert_close(grads, torch.autograd.grad(full, hidden)[0], 1e-2, "expected gradient")
    bound = V * head.weight.abs().max() / (K * M)
    assert ((grads - ((q - p) @ head.weight)).abs() <= bound).all()
    assert abs(losses - full.item()) < 2e-3 * full.item()


def test_a_draw_never_meets_a_token_of_no_probability():
    logits = torch.full((1, V), -torch.inf)
    logits[0, 5:7] = 0.0
    for u in (0.0, 0.3, 1 - 2**-53):
        ids = targets_of("sampled", logits, K, torch.tensor([u], dtype=torch.float64)).ids
        assert set(ids.flatten().tolist()) == {5, 6}


@pytest.mark.parametrize(
    ("vocab_size", "bytes_per_id"), [(256, 2), (2**16, 2), (2**16 + 1, 2.25), (2**18, 2.25), (2**18 + 1, 4)]
)
def test_packed_ids_come_back(vocab_size, bytes_per_id):
    for k in (1, 4, 6, 64):
        ids = torch.randint(0, vocab_size, (3, 5, k))
        ids[0, 0, 0], ids[-1, -1, -1] = 0, vocab_size - 1
        packed = {n: t.unflatten(0, (3, 5)) for n, t in pack_ids(ids.flatten(0, 1), vocab_size).items()}
        assert torch.equal(unpack_ids(packed), ids)
        assert sum(t.nbytes for t in packed.values()) == 15 * id_bytes(k, vocab_size)
    assert id_bytes(64, vocab_size) == 64 * bytes_per_id


def test_what_it_cannot_give_is_refused():
    hidden, head, logits, labels = problem()
    topk, sampled = targets_of("topk", logits, K), targets_of("sampled", logits, K, torch.rand(T))
    with pytest.raises(ValueError, match="temperature = 2"):
        divergence(hidden, head, topk, labels, Objective(temperature=2.0))
    with pytest.raises(ValueError, match="unbiased for forward_kl alone"):
        divergence(hidden, head, sampled, labels, Objective("jsd"))
    with pytest.raises(ValueError, match="holds none"):
        divergence(hidden, head, topk, labels, Objective(hidden_weight=0.1))
    for k in (0, V):
        with pytest.raises(ValueError, match="top_k"):
            largest(logits, k)
