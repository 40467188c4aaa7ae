"""Divergences between two language models, from their last hidden states: the logits of a batch never exist.

A vocabulary is a hundred times wider than a hidden state, so logits of shape (T, V) are what fills the memory of a
distillation step. The head is frozen, hence the only gradient wanted is the one with respect to the student's hidden
states, and that one is known as soon as the logits are: for the forward KL it is (q - p) W. So the sum below walks over
the tokens in chunks, makes the two logits of a chunk, turns them in place into the loss and into the gradient with
respect to logits, projects that back to (n, H), and forgets them. Backward only scales what forward has kept.

    L = sum over tokens with a label of
        kl_weight * D(p || q) + ce_weight * -log q_1[label] + hidden_weight * ||h - h_t||^2 / ||h_t||^2

h_t and h are the last hidden states of teacher and student (RILQ, 2412.01129), p and q their softmax(logits /
temperature), q_1 is the student at temperature 1. No factor temperature^2 is applied: fold it into
`kl_weight` to keep the gradient's size (Hinton et al., 1503.02531, section 2).
All arithmetic on logits is float32, or float64 for float64 hidden states, whatever autocast says.
"""

from dataclasses import dataclass
from math import log
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrec import registry
from lrec.head import Head

IGNORE = -100
CHUNK_LOGITS = 3 * 2**20  # 12 MB of float32: three buffers of it for a KL, one more each for CE, JSD and a soft cap


class Workspace:
    """Buffers for the logits of a chunk, (rows, V), made at first use and used again for every chunk.

    A fresh allocation per chunk would do too, were it not that malloc keeps a varying number of freed ones.
    """

    def __init__(self, like: Tensor, rows: int, vocab_size: int):
        self.like, self.shape = like, (rows, vocab_size)
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        """The first `rows` rows of the buffer of this name, holding whatever they held."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.shape, dtype=self.dtype)
        return self.buffers[name][:rows]


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float, space: Workspace) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q) per row, and its gradient q - p in the logits of q; uses its arguments up."""
    p = torch.exp(log_p, out=space("spare", len(log_p)))
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    grad = log_q.exp_().sub_(p)
    # sum(q - p) is zero but for rounding: it cancels the error that a log-sum-exp brings to every log q of a row alike.
    return value + grad.sum(-1), grad


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float, space: Workspace) -> tuple[Tensor, Tensor]:
    """R = KL(q || p) = sum q (log q - log p) per row, and q (log q - log p - R); uses its arguments up."""
    q = torch.exp(log_q, out=space("spare", len(log_q)))
    ratio = log_q.sub_(log_p)
    value = torch.mul(q, ratio, out=log_p).sum(-1)
    return value, ratio.sub_(value[:, None]).mul_(q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float, space: Workspace) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, per row, and its gradient
    (1 - beta) q (log q - log m - KL(q || m)); uses its arguments up. Agarwal et al., 2306.13649, equation 1."""
    n = len(log_p)
    log_m = torch.logaddexp(log_p.add_(log(beta)), log_q.add_(log(1 - beta)), out=space("mixture", n))
    weight = torch.exp(log_p, out=space("spare", n))
    value = log_p.sub_(log_m).sub_(log(beta)).mul_(weight).sum(-1)
    torch.exp(log_q, out=weight)
    ratio = log_q.sub_(log_m).sub_(log(1 - beta))
    other = torch.mul(weight, ratio, out=log_p).sum(-1)
    return value + other, ratio.sub_(other[:, None] / (1 - beta)).mul_(weight)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


@dataclass(frozen=True)
class Objective:
    """What is summed, and how: see the equation at the top. `beta` is jsd's; `chunk_tokens` None means 12 MB of logits.

    Raises ValueError for an unknown divergence or numbers out of range.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    chunk_tokens: int | None = None

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise ValueError(registry.nearest(self.divergence, DIVERGENCES, "divergence"))
        weights = (self.kl_weight, self.ce_weight, self.hidden_weight)
        rules = {
            f"beta = {self.beta} must lie between 0 and 1, both excluded": 0 < self.beta < 1,
            f"temperature = {self.temperature} must be above 0": self.temperature > 0,
            f"kl_weight, ce_weight and hidden_weight = {weights} must be at least 0, one of them above": (
                min(weights) >= 0 and sum(weights) > 0
            ),
            f"chunk_tokens = {self.chunk_tokens} must be at least 1, or None": (
                self.chunk_tokens is None or self.chunk_tokens >= 1
            ),
        }
        wrong = [rule for rule, holds in rules.items() if not holds]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the teacher."""
        return self.kl_weight + self.hidden_weight > 0


@dataclass(frozen=True, eq=False)
class Targets:
    """What a teacher says about T tokens: its last hidden states (T, H') and the head that makes logits of them.

    The loss calls `divergence`, and reads `hidden` if it matches hidden states: see `lrec.topk` for targets without.
    """

    hidden: Tensor
    head: Head

    def divergence(
        self, logits_nV: Tensor, rows_n: Tensor, objective: Objective, space: Workspace
    ) -> tuple[Tensor, Tensor]:
        """D between teacher and student at the tokens `rows_n`, (n,), and its gradient in the student's logits (n, V).

        The student's logits are used up; the buffers of `space` but "student", "slope" and "ce" are free to use."""
        t_nV = self.logits(rows_n, logits_nV, space)
        if objective.temperature != 1:
            t_nV, logits_nV = t_nV.div_(objective.temperature), logits_nV.div_(objective.temperature)
        log_p, log_q = log_softmax_(t_nV, space), log_softmax_(logits_nV, space)
        value, grad = DIVERGENCES[objective.divergence](log_p, log_q, objective.beta, space)
        return value, grad if objective.temperature == 1 else grad.div_(objective.temperature)

    def logits(self, rows_n: Tensor, student_nV: Tensor, space: Workspace) -> Tensor:
        """The teacher's logits (n, V) where the student's are, on its device and in its dtype.

        Raises ValueError if the vocabularies differ."""
        if self.head.weight.shape[0] != student_nV.shape[1]:
            raise ValueError(
                f"the teacher has {self.head.weight.shape[0]} logits, but the student {student_nV.shape[1]}; "
                "choose a teacher with the student's vocabulary"
            )
        hidden = self.hidden[rows_n.to(self.hidden.device)].to(student_nV.dtype)
        out = space("teacher", len(rows_n))
        if hidden.device == out.device:
            return self.head.logits(hidden, out)
        return out.copy_(self.head.logits(hidden))


def log_softmax_(z: Tensor, space: Workspace) -> Tensor:
    """log softmax of each row of z, in place of z; uses the buffer "spare"."""
    top = z.amax(-1, keepdim=True)
    total = torch.sub(z, top, out=space("spare", len(z))).exp_().sum(-1, keepdim=True)
    return z.sub_(total.log_().add_(top))


class LossSum(NamedTuple):
    """A loss summed over tokens: `loss` carries the gradient; `kl`, `ce`, `hidden` are its unweighted parts without."""

    loss: Tensor
    kl: Tensor
    ce: Tensor
    hidden: Tensor
    num_tokens: int


def divergence(
    hidden_TH: Tensor, head: Head, targets: Targets | None, labels_T: Tensor, objective: Objective
) -> LossSum:
    """The sum L at the top of this file over the tokens whose label is not -100; the caller divides.

    hidden_TH: the student's last hidden states, the only thing that gets a gradient; labels_T: the token that follows
    each position (`shift_labels`). Without `targets` kl_weight and hidden_weight must be 0. Raises ValueError if the
    teacher's vocabulary is another, or if hidden states are to be matched that the targets lack or have another width.
    """
    if targets is None and objective.needs_teacher:
        raise ValueError("kl_weight or hidden_weight > 0 needs a teacher's targets; give them, or set both to 0")
    if objective.hidden_weight and (targets.hidden is None or targets.hidden.shape[1] != hidden_TH.shape[1]):
        found = "holds none" if targets.hidden is None else f"has {targets.hidden.shape[1]}"
        raise ValueError(
            f"hidden_weight > 0 needs hidden states of the student's width {hidden_TH.shape[1]}, but the teacher "
            f"{found}; use the student's own full-precision model, live or by a hidden cache, or set it to 0"
        )
    index = (labels_T != IGNORE).nonzero().flatten()
    loss = kl = ce = far = hidden_TH.new_zeros((), dtype=torch.promote_types(hidden_TH.dtype, torch.float32))
    if objective.kl_weight or objective.ce_weight:
        loss, kl, ce = _ChunkedSum.apply(hidden_TH, head, targets, labels_T, index, objective)
    if objective.hidden_weight:
        far = hidden_distance(hidden_TH[index], targets.hidden[index.to(targets.hidden.device)])
        loss = loss + objective.hidden_weight * far
    return LossSum(loss, kl, ce, far.detach(), len(index))


def cross_entropy(hidden_TH: Tensor, head: Head, labels_T: Tensor, chunk_tokens: int | None = None) -> LossSum:
    """The sum of -log q[label], by the same chunks and without a teacher."""
    return divergence(hidden_TH, head, None, labels_T, Objective(kl_weight=0, ce_weight=1, chunk_tokens=chunk_tokens))


def shift_labels(labels_BL: Tensor) -> Tensor:
    """(B*L,): at each position the token that follows it; the last of each row has none, -100."""
    return nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORE).flatten()


def _space(hidden_TH: Tensor, head: Head, chunk_tokens: int | None) -> Workspace:
    vocab_size = head.weight.shape[0]
    rows = chunk_tokens or max(16, CHUNK_LOGITS // vocab_size)
    return Workspace(hidden_TH, min(rows, len(hidden_TH)) or 1, vocab_size)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, head, targets, labels_T, index, objective):
        space = _space(hidden_TH, head, objective.chunk_tokens)
        kl_T, ce_T = hidden_TH.new_zeros(2, len(index), dtype=space.dtype)
        grad_TH = torch.zeros_like(hidden_TH) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for start in range(0, len(index), space.shape[0]):
                part = slice(start, start + space.shape[0])
                rows = index[part]
                logits = head.logits(hidden_TH[rows], space("student", len(rows)))
                slope = head.slope(logits, space("slope", len(rows)) if head.softcap else None)
                kl_T[part], ce_T[part], grad = _chunk(logits, rows, targets, labels_T, objective, space)
                if grad_TH is not None:
                    grad_TH[rows] = head.backward(grad.mul_(slope)).to(grad_TH.dtype)
        ctx.save_for_backward(*([] if grad_TH is None else [grad_TH]))
        kl, ce = kl_T.sum(), ce_T.sum()
        ctx.mark_non_differentiable(kl, ce)
        return objective.kl_weight * kl + objective.ce_weight * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        (grad_TH,) = ctx.saved_tensors
        return grad_TH * grad_loss.to(grad_TH.dtype), None, None, None, None, None


def hidden_distance(hidden_nH: Tensor, target_nH: Tensor) -> Tensor:
    """The sum over tokens of ||h - h_t||^2 / ||h_t||^2, in float32 or wider, whatever autocast says; differentiable."""
    dtype = torch.promote_types(hidden_nH.dtype, torch.float32)
    target_nH = target_nH.to(hidden_nH.device, dtype)
    # Elementwise: autocast, which lowers products to half precision, leaves all of it alone.
    return ((hidden_nH.to(dtype) - target_nH).square().sum(1) / target_nH.square().sum(1)).sum()


def _chunk(
    logits: Tensor, rows: Tensor, targets: Targets | None, labels_T: Tensor, objective: Objective, space: Workspace
) -> tuple[Tensor | float, Tensor | float, Tensor]:
    kl = ce = 0.0
    grads = []
    if objective.ce_weight:
        labels = labels_T[rows, None]
        log_q = log_softmax_(space("ce", len(rows)).copy_(logits), space)
        ce = -log_q.gather(1, labels)[:, 0]
        grad = log_q.exp_().scatter_add_(1, labels, -log_q.new_ones(len(rows), 1))
        grads.append(grad.mul_(objective.ce_weight))
    if objective.kl_weight:
        kl, grad = targets.divergence(logits, rows, objective, space)
        grads.append(grad.mul_(objective.kl_weight))
    return kl, ce, grads[0] if len(grads) == 1 else grads[0].add_(grads[1])


@torch.no_grad()
def token_metrics(
    student_hidden_TH: Tensor,
    student_head: Head,
    teacher_hidden_TH: Tensor | None,
    teacher_head: Head | None,
    labels_T: Tensor,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per token: -log q[label] (T,), KL(p || q) (T,) and whether the likeliest tokens agree (T,) bool; by chunks.

    Tokens labelled -100 have zeros. Without a teacher the last two are None.
    """
    index = (labels_T != IGNORE).nonzero().flatten()
    space = _space(student_hidden_TH, student_head, chunk_tokens)
    nll_T = student_hidden_TH.new_zeros(len(labels_T), dtype=space.dtype)
    kl_T, agree_T = torch.zeros_like(nll_T), torch.zeros_like(labels_T, dtype=torch.bool)
    targets = None if teacher_hidden_TH is None else Targets(teacher_hidden_TH, teacher_head)
    for rows in index.split(space.shape[0]):
        log_q = log_softmax_(student_head.logits(student_hidden_TH[rows], space("student", len(rows))), space)
        nll_T[rows] = -log_q.gather(1, labels_T[rows, None])[:, 0]
        if targets is not None:
            top_q = log_q.argmax(-1)
            log_p = log_softmax_(targets.logits(rows, log_q, space), space)
            agree_T[rows] = top_q == log_p.argmax(-1)
            kl_T[rows] = forward_kl(log_p, log_q, 0, space)[0]
    return (nll_T, None, None) if targets is None else (nll_T, kl_T, agree_T)
