"""A teacher's distribution from a few logits a token, for when a disk cannot hold hidden states.

Of the V logits of a token, K are kept: ids, values less the largest logit (float16, so that the likeliest tokens are
the most exact), and one log-sum-exp in float32, also less the largest logit.

TopK keeps the K largest, and the log-sum-exp of all others. Teacher and student are compared as distributions over
K + 1 outcomes, the last of which is "any other token"; nothing is renormalised. By the data-processing inequality that
is a lower bound of the divergence over the whole vocabulary, and equal to it where the student is right about the
shape of the tail.

Sampled keeps K draws from the teacher, and the log-sum-exp of all V logits. With c_v the number of draws of token v,
    loss = (1 / K) sum over draws (log p - log q),   gradient in the logits = q - c / K,
whose expectations are KL(p || q) and its gradient q - p over the whole vocabulary, because E[c_v] = K p_v (Random
Sampling KD, arXiv 2503.16870). The draws are systematic: one uniform number u a token, and the points (u + j) / K of
the cumulative distribution. Each c_v is then K p_v rounded down or up, which varies less than independent draws do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.losses import DIVERGENCES, Objective, Workspace, log_softmax_

LOW_BITS = 16
WIDE_BITS = 18  # two high bits an id, four of them a byte: the vocabularies of Llama 3, Qwen and Gemma


def pack_ids(ids_TK: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Ids as `ids` (T, K) of 16 bits; with vocabularies above 2^16 also `ids_high` (T, ceil(K / 4)), two bits each;
    above 2^18 as `ids` of 32 bits alone."""
    if vocab_size > 2**WIDE_BITS:
        return {"ids": ids_TK.int()}
    packed = {"ids": ids_TK.to(torch.int32).to(torch.int16)}
    if vocab_size > 2**LOW_BITS:
        high = torch.nn.functional.pad(ids_TK >> LOW_BITS, (0, -ids_TK.shape[1] % 4)).unflatten(1, (-1, 4))
        shifts = torch.arange(0, 8, 2, device=high.device)
        packed["ids_high"] = (high << shifts).sum(-1).to(torch.uint8)
    return packed


def unpack_ids(packed: dict[str, Tensor]) -> Tensor:
    """The ids (..., K), int64, of what `pack_ids` made."""
    ids = packed["ids"].long()
    if packed["ids"].dtype == torch.int16:
        ids &= 2**LOW_BITS - 1
    if "ids_high" in packed:
        shifts = torch.arange(0, 8, 2, device=ids.device)
        high = (packed["ids_high"].long()[..., None] >> shifts & 3).flatten(-2)
        ids |= high[..., : ids.shape[-1]] << LOW_BITS
    return ids


def id_bytes(k: int, vocab_size: int) -> int:
    """Bytes that `pack_ids` spends on a token."""
    return 4 * k if vocab_size > 2**WIDE_BITS else 2 * k + (-(-k // 4) if vocab_size > 2**LOW_BITS else 0)


def largest(logits_TV: Tensor, k: int) -> dict[str, Tensor]:
    """What TopK stores of logits: values and ids (T, K), lse (T,). Raises ValueError unless 1 <= k < V."""
    check_k(k, logits_TV.shape[1])
    values, ids = logits_TV.topk(k, dim=1)
    top = values[:, :1]
    rest = logits_TV.scatter(1, ids, -torch.inf)
    lse = rest.logsumexp(1) - top[:, 0]
    return {"values": (values - top).half(), **pack_ids(ids, logits_TV.shape[1]), "lse": lse.float()}


def draws(logits_TV: Tensor, k: int, uniform_T: Tensor) -> dict[str, Tensor]:
    """What Sampled stores of logits: values and ids (T, K), lse (T,), from one number in [0, 1) a token."""
    check_k(k, logits_TV.shape[1])
    top = logits_TV.amax(1, keepdim=True)
    weights = (logits_TV - top).double().exp()
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    points = (uniform_T.double()[:, None] + torch.arange(k, device=logits_TV.device)) / k * total
    # Rounding may bring the last point up to the total, behind every token that has a probability.
    points = points.minimum(total.nextafter(total.new_zeros(())))
    ids = torch.searchsorted(cumulative, points, right=True)
    values = logits_TV.gather(1, ids) - top
    return {"values": values.half(), **pack_ids(ids, logits_TV.shape[1]), "lse": total[:, 0].log().float()}


def check_k(k: int, vocab_size: int) -> None:
    """Raises ValueError unless 1 <= k < V."""
    if not 1 <= k < vocab_size:
        raise ValueError(f"top_k = {k} must be at least 1 and below the vocabulary of {vocab_size}")


@dataclass(frozen=True, eq=False)
class TopK:
    """Targets of T tokens: the K largest logits, and the rest as one outcome; see the top of this file."""

    values: Tensor
    ids: Tensor
    lse: Tensor
    hidden: ClassVar[None] = None  # last-hidden matching has nothing to match

    def divergence(
        self, logits_nV: Tensor, rows_n: Tensor, objective: Objective, space: Workspace
    ) -> tuple[Tensor, Tensor]:
        """As `Targets.divergence`, over K + 1 outcomes. The student's logit of the last is its tail's log-sum-exp,
        whose derivative is the softmax inside the tail. Raises ValueError for another temperature than 1."""
        self.check(objective)
        values_nK, ids_nK, lse_n = self.rows(rows_n, logits_nV)
        t_nJ = torch.cat([values_nK, lse_n[:, None]], 1)
        s_nK = logits_nV.gather(1, ids_nK)
        tail_nV = logits_nV.scatter_(1, ids_nK, -torch.inf)
        top = tail_nV.amax(1, keepdim=True)
        tail_nV = tail_nV.sub_(top).exp_()
        total = tail_nV.sum(1, keepdim=True)
        s_nJ = torch.cat([s_nK, top + total.log()], 1)
        small = Workspace(s_nJ, *s_nJ.shape)
        compare = DIVERGENCES[objective.divergence]
        value, grad_nJ = compare(t_nJ.log_softmax(1), s_nJ.log_softmax(1), objective.beta, small)
        grad_nV = tail_nV.mul_(grad_nJ[:, -1:] / total)
        return value, grad_nV.scatter_(1, ids_nK, grad_nJ[:, :-1])

    @staticmethod
    def check(objective: Objective) -> None:
        """Raises ValueError for another temperature than 1: what is not stored would change by an unknown factor."""
        if objective.temperature != 1:
            raise ValueError(
                f"temperature = {objective.temperature} needs all logits, but the cache holds a few; "
                "use 1, or a hidden cache or a live teacher"
            )

    def rows(self, rows_n: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values (n, K), ids (n, K) and lse (n,) of some tokens, on the device of `like` and in its dtype."""
        values, ids, lse = (t[rows_n.to(t.device)].to(like.device) for t in (self.values, self.ids, self.lse))
        return values.to(like.dtype), ids, lse.to(like.dtype)


@dataclass(frozen=True, eq=False)
class Sampled(TopK):
    """Targets of T tokens: K draws from the teacher; see the top of this file."""

    def divergence(
        self, logits_nV: Tensor, rows_n: Tensor, objective: Objective, space: Workspace
    ) -> tuple[Tensor, Tensor]:
        """As `Targets.divergence`, in expectation over the draws; a value may be below zero.

        Raises ValueError for another divergence than forward_kl or another temperature than 1."""
        self.check(objective)
        values_nK, ids_nK, lse_n = self.rows(rows_n, logits_nV)
        log_q = log_softmax_(logits_nV, space)
        value = (values_nK - lse_n[:, None] - log_q.gather(1, ids_nK)).mean(1)
        share = log_q.new_tensor(-1 / ids_nK.shape[1]).expand(ids_nK.shape)
        return value, log_q.exp_().scatter_add_(1, ids_nK, share)

    @staticmethod
    def check(objective: Objective) -> None:
        """Raises ValueError for what draws give no unbiased gradient of."""
        TopK.check(objective)
        if objective.divergence != "forward_kl":
            raise ValueError(
                f"sampled targets are unbiased for forward_kl alone, not for {objective.divergence}; "
                "use forward_kl, or a cache without --sampling"
            )
