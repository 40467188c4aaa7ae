"""The chunked sum equals the logits written out in float64, in value and gradient, and never makes them all."""

import pytest
import torch
from torch.nn import functional

from lrec.head import Head, head_input, output_layer, verify_head
from lrec.losses import DIVERGENCES, Objective, Targets, cross_entropy, divergence, shift_labels, token_metrics
from lrec.nn import PackedLinear
from tests.checks import assert_close, tiny_llama

T, V, H, H_TEACHER = 41, 401, 24, 40
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def problem(dtype=torch.float64, seed=0, bias=False, softcap=None, scale=1.0):
    """Student hidden, head, targets and labels with some of them masked; logits of a few units."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    student = Head(rand(V, H) / 3, rand(V) if bias else None, softcap, scale)
    teacher = Head(rand(V, H_TEACHER) / 4, None, softcap, scale)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[torch.rand(T, generator=g) < 0.3] = -100
    return rand(T, H).requires_grad_(), student, Targets(rand(T, H_TEACHER), teacher), labels


def plain_logits(hidden, head):
    z = hidden.double() @ head.weight.double().t()
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def textbook(hidden, head, targets, labels, objective):
    """The same sum with all logits at once, in float64, differentiated by autograd."""
    s, t = plain_logits(hidden, head)[labels != -100], plain_logits(targets.hidden, targets.head)[labels != -100]
    q, p = (s / objective.temperature).softmax(-1), (t / objective.temperature).softmax(-1)
    if objective.divergence == "forward_kl":
        d = (p * (p.log() - q.log())).sum()
    elif objective.divergence == "reverse_kl":
        d = (q * (q.log() - p.log())).sum()
    else:
        m = objective.beta * p + (1 - objective.beta) * q
        d = objective.beta * (p * (p / m).log()).sum() + (1 - objective.beta) * (q * (q / m).log()).sum()
    ce = functional.cross_entropy(s, labels[labels != -100], reduction="sum")
    return objective.kl_weight * d + objective.ce_weight * ce, d, ce


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}], ids=["plain", "capped"])
def test_equals_the_unchunked_sum(dtype, name, ce_weight, temperature, head):
    objective = Objective(name, 0.3, temperature, kl_weight=1.3, ce_weight=ce_weight, chunk_tokens=7)
    hidden, student, targets, labels = problem(dtype, **head)
    actual = divergence(hidden, student, targets, labels, objective)
    (gradient,) = torch.autograd.grad(2.5 * actual.loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    expected, kl, ce = textbook(wide, student, targets, labels, objective)
    (expected_gradient,) = torch.autograd.grad(2.5 * expected, wide)
    assert_close(actual.loss.detach(), expected.detach(), TOLERANCE[dtype], "loss")
    assert_close(actual.kl, kl.detach(), TOLERANCE[dtype], "kl")
    if ce_weight:
        assert_close(actual.ce, ce.detach(), TOLERANCE[dtype], "ce")
    assert_close(gradient, expected_gradient, TOLERANCE[dtype], "gradient")
    assert actual.num_tokens == int((labels != -100).sum())
    assert gradient[labels == -100].count_nonzero() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kl_weight", [0.0, 1.3])
def test_hidden_states_are_matched_per_token(dtype, kl_weight):
    hidden, student, _, labels = problem(dtype, softcap=3.0)
    other = torch.randn(T, H, dtype=torch.float64).to(dtype) * torch.logspace(-2, 2, T, dtype=dtype)[:, None]
    targets = Targets(other, student)
    objective = Objective(kl_weight=kl_weight, ce_weight=0.2, hidden_weight=0.7, chunk_tokens=6)
    actual = divergence(hidden, student, targets, labels, objective)
    (gradient,) = torch.autograd.grad(3.0 * actual.loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    rest, *_ = textbook(wide, student, targets, labels, objective)
    far = sum((wide[i] - other[i]).norm() ** 2 / other[i].double().norm() ** 2 for i in range(T) if labels[i] != -100)
    (expected,) = torch.autograd.grad(3.0 * (rest + 0.7 * far), wide)
    assert_close(actual.hidden, far.detach(), TOLERANCE[dtype], "distance")
    assert_close(actual.loss.detach(), (rest + 0.7 * far).detach(), TOLERANCE[dtype], "loss")
    assert_close(gradient, expected, TOLERANCE[dtype], "gradient")
    assert gradient[labels == -100].count_nonzero() == 0


def test_hidden_states_alone_can_be_matched_but_not_those_of_another_width():
    hidden, student, targets, labels = problem()
    only = Objective(kl_weight=0.0, hidden_weight=1.0)
    result = divergence(hidden, student, Targets(2 * hidden.detach(), student), labels, only)
    assert_close(result.loss.detach(), torch.tensor(0.25 * result.num_tokens), 1e-12)
    with pytest.raises(ValueError, match=f"width {H}, but the teacher has {H_TEACHER}"):
        divergence(hidden, student, targets, labels, only)
    with pytest.raises(ValueError, match="needs a teacher"):
        divergence(hidden, student, None, labels, only)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, T, 1000])
def test_chunk_size_changes_nothing(name, chunk_tokens):
    hidden, student, targets, labels = problem()
    one = divergence(hidden, student, targets, labels, Objective(name, ce_weight=0.1))
    other = divergence(hidden, student, targets, labels, Objective(name, ce_weight=0.1, chunk_tokens=chunk_tokens))
    assert_close(other.loss.detach(), one.loss.detach(), 1e-13)
    assert_close(torch.autograd.grad(other.loss, hidden)[0], torch.autograd.grad(one.loss, hidden)[0], 1e-13)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_model_is_at_no_distance_from_itself(name):
    hidden, student, _, labels = problem(torch.float32)
    result = divergence(hidden, student, Targets(hidden.detach(), student), labels, Objective(name))
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert abs(result.loss.item()) < 1e-6 and gradient.abs().max() < 1e-6
    if name == "forward_kl":
        assert result.loss.item() == 0 and gradient.count_nonzero() == 0


def test_a_small_kl_keeps_its_digits_in_float32():
    hidden, student, _, labels = problem(torch.float32)
    targets = Targets(hidden.detach() + 1e-3 * torch.randn(T, H), student)
    actual = divergence(hidden, student, targets, labels, Objective())
    expected, *_ = textbook(hidden, student, targets, labels, Objective())
    assert expected.item() / actual.num_tokens < 1e-5
    assert_close(actual.loss.detach(), expected.detach(), 1e-2, "kl of 1e-6 a token")


def test_masked_tokens_contribute_nothing_whatever_they_hold():
    hidden, student, targets, labels = problem()
    clean = divergence(hidden, student, targets, labels, Objective(ce_weight=0.1)).loss
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = torch.nan
    targets.hidden[labels == -100] = torch.nan
    poisoned.requires_grad_()
    result = divergence(poisoned, student, targets, labels, Objective(ce_weight=0.1)).loss
    assert result.item() == clean.item()
    assert torch.autograd.grad(result, poisoned)[0].isfinite().all()


@pytest.mark.parametrize("kept", [0, 1])
def test_no_token_and_one(kept):
    hidden, student, targets, labels = problem()
    labels[:] = -100
    labels[3 : 3 + kept] = 5
    result = divergence(hidden, student, targets, labels, Objective())
    expected, *_ = textbook(hidden, student, targets, labels, Objective())
    assert_close(result.loss.detach(), expected.detach(), 1e-10)
    assert_close(torch.autograd.grad(result.loss, hidden)[0], torch.autograd.grad(expected, hidden)[0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_and_heads_are_summed_in_float32(dtype, monkeypatch):
    monkeypatch.setattr("lrec.head.SLICE_WEIGHTS", 1000)  # several slices of the cast head, the last one short
    hidden, student, targets, labels = problem(dtype)
    hidden = hidden.detach()[:, ::2].repeat_interleave(2, 1)[:, :H].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = divergence(hidden, student, targets, labels, Objective(ce_weight=0.1)).loss
    wide = hidden.detach().double().requires_grad_()
    expected, *_ = textbook(wide, student, targets, labels, Objective(ce_weight=0.1))
    assert actual.dtype == torch.float32
    assert_close(actual.detach(), expected.detach(), 1e-6)
    gradient = torch.autograd.grad(actual, hidden)[0]
    assert gradient.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert_close(gradient, torch.autograd.grad(expected, wide)[0], rounding)


def test_cross_entropy_is_torchs():
    hidden, student, _, labels = problem()
    actual = cross_entropy(hidden, student, labels, chunk_tokens=6)
    expected = functional.cross_entropy(hidden @ student.weight.t(), labels, reduction="sum")
    assert_close(actual.loss.detach(), expected.detach(), 1e-10)
    assert_close(torch.autograd.grad(actual.loss, hidden)[0], torch.autograd.grad(expected, hidden)[0], 1e-10)


def test_shifted_labels_are_the_tokens_that_follow():
    labels = torch.tensor([[-100, 1, 2, 3], [4, 5, -100, 7]])
    assert shift_labels(labels).tolist() == [1, 2, 3, -100, 5, -100, 7, -100]


def test_token_metrics_sum_to_the_losses():
    hidden, student, targets, labels = problem()
    nll, kl, agree = token_metrics(hidden, student, targets.hidden, targets.head, labels, chunk_tokens=9)
    _, d, ce = textbook(hidden, student, targets, labels, Objective())
    assert_close(nll.sum(), ce.detach(), 1e-10)
    assert_close(kl.sum(), d.detach(), 1e-10)
    same = plain_logits(hidden, student).argmax(-1) == plain_logits(targets.hidden, targets.head).argmax(-1)
    assert torch.equal(agree, same & (labels != -100))
    assert (kl >= 0).all() and nll[labels == -100].count_nonzero() == 0
    own = token_metrics(hidden, student, hidden, student, labels)
    assert own[1].count_nonzero() == 0 and torch.equal(own[2], labels != -100)
    assert token_metrics(hidden, student, None, None, labels)[1:] == (None, None)


def test_no_tensor_of_all_logits_is_made():
    hidden, student, targets, labels = problem()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        result = divergence(hidden, student, targets, labels, Objective(ce_weight=0.1, chunk_tokens=4))
        result.loss.backward()
    largest = max(max(seen), student.weight.numel())
    assert max(4 * V, T * H) <= max(seen) and largest < T * V


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergence": "forwardkl"}, "forward_kl"),
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 1.0}, "beta"),
        ({"kl_weight": 0.0}, "one of them above"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_a_wrong_objective_says_so(changes, words):
    with pytest.raises(ValueError, match=words):
        Objective(**changes)


def test_another_vocabulary_and_a_missing_teacher_are_refused():
    hidden, student, targets, labels = problem()
    smaller = Targets(targets.hidden, Head(targets.head.weight[:-1]))
    with pytest.raises(ValueError, match=f"{V - 1} logits"):
        divergence(hidden, student, smaller, labels, Objective())
    with pytest.raises(ValueError, match="needs a teacher"):
        divergence(hidden, student, None, labels, Objective())


def granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0))


def cohere():
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.5))


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=99,
        )
    )


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(PhiConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("make", [tiny_llama, granite, cohere, gemma2, opt, phi])
def test_the_head_found_makes_the_models_logits(make):
    model = make().eval()
    head = Head.of(model)
    verify_head(model, head)
    wrong = [Head(head.weight, head.bias, None if head.softcap else 0.01, head.scale)]
    wrong += [Head(head.weight, head.bias, head.softcap, head.scale * 1.01)]
    wrong += [Head(head.weight, None, head.softcap, head.scale)] if head.bias is not None else []
    for other in wrong:
        with pytest.raises(ValueError, match="misses the model's logits"):
            verify_head(model, other)


def test_a_packed_head_is_multiplied_packed():
    from lrec.formats.uniform import Uniform

    model = tiny_llama(vocab_size=401)
    codes = torch.randint(0, 256, (401, 64))
    packed = Uniform.pack(codes, torch.rand(401, 1) / 100, torch.rand(401, 1) * 255, 8, 64)
    model.lm_head = PackedLinear(packed)
    head = Head.of(model)
    assert not isinstance(head.weight, torch.Tensor)
    verify_head(model, head)
    hidden = torch.randn(T, 64, requires_grad=True)
    targets, labels = Targets(torch.randn(T, 64), Head(torch.randn(401, 64))), torch.arange(T)
    dense = Head(model.lm_head.weight)
    gradients = [
        torch.autograd.grad(divergence(hidden, h, targets, labels, Objective()).loss, hidden)[0] for h in (head, dense)
    ]
    assert_close(gradients[0], gradients[1], 1e-5)


def test_the_hidden_states_of_all_positions_are_seen_while_one_row_of_logits_is_made():
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 11))
    with torch.no_grad():
        full = model(ids).logits
        with head_input(model, last_only=True) as seen:
            last = model(ids).logits
        assert last.shape == (2, 1, 256) and seen[0].shape == (2, 11, 64)
        assert_close(last, full[:, -1:], 1e-6)
        assert_close(Head.of(model).logits(seen[0].flatten(0, 1)), full.flatten(0, 1), 1e-6)
        assert torch.equal(model(ids).logits, full), "the hook outlived its context"


def test_an_adapter_on_the_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="target_modules"):
        Head.of(model)
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert output_layer(plain) is plain.base_model.model.lm_head
    verify_head(plain, Head.of(plain))
