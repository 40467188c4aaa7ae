"""A x for all adapters that see the same x, as those of q, k and v do, in one product.

Nobody says who they are. An A that is asked for with the x of another one joins it, and from the next x on the first to
ask has the products of all made by one pass over x, and one cast of it where dtypes differ. An x is known by being the
same tensor in the same version. What is held for those that will ask are values without a history, taken once each and
let go with x, so autograd and checkpointing see what they would see without, and each keeps a slice of one tensor.

Few rows are not worth it: the A's would have to be copied beside each other, which takes more than reading x again.

The first pass finds out who joins, and its products may differ from later ones in the last bit. So passes without a
gradient only find out: what a model answers must not depend on what it was asked before. Training that must repeat bit
for bit lets some tokens through the model before its first step, as LrecTrainer does to verify the head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lrec.kernels import slices


@dataclass
class _Seen:
    """An x that was asked with: its version, the dtype of products, the A that came first, products not yet taken."""

    version: int
    dtype: torch.dtype
    first_RK: Tensor
    left: dict[Tensor, Tensor]


_SEEN = WeakTensorKeyDictionary()  # x -> _Seen
_JOINED = WeakTensorKeyDictionary()  # A -> weak references to those that joined it


def project(x: Tensor, a_RK: Tensor, dtype: torch.dtype) -> Tensor:
    """x A^T (T, R) in `dtype` for x of shape (..., K), made when it was first asked for with this x if A has joined
    another; no gradient flows through it."""
    x_TK = x.detach().reshape(-1, x.shape[-1])
    if len(x_TK) < 2 or x.is_inference():  # such tensors have no version
        return product(x_TK, [a_RK], dtype)
    seen = _SEEN.get(x)
    anew = seen is None or (seen.version, seen.dtype) != (x._version, dtype) or a_RK is seen.first_RK
    if not anew and a_RK not in seen.left:
        _join(seen.first_RK, a_RK)
        return product(x_TK, [a_RK], dtype)
    if anew:
        together = [a_RK, *_followers(a_RK)]
        if not torch.is_grad_enabled() or len(x_TK) <= sum(map(len, together)):
            together = [a_RK]
        parts = product(x_TK, together, dtype).split([len(a) for a in together], 1)
        seen = _SEEN[x] = _Seen(x._version, dtype, a_RK, dict(zip(together, parts, strict=True)))
    return seen.left.pop(a_RK)


def product(x_TK: Tensor, a_RK: list[Tensor], dtype: torch.dtype) -> Tensor:
    """x times each A^T, beside each other (T, sum of R), in `dtype`; what has to be cast of x is cast by rows."""
    stacked_RK = torch.cat([a.detach().to(dtype) for a in a_RK]) if len(a_RK) > 1 else a_RK[0].detach().to(dtype)
    t_TR = x_TK.new_empty(len(x_TK), len(stacked_RK), dtype=dtype)
    for rows in slices(x_TK, dtype):
        torch.mm(x_TK[rows].to(dtype), stacked_RK.t(), out=t_TR[rows])
    return t_TR


def _join(first_RK: Tensor, a_RK: Tensor) -> None:
    known = _JOINED.setdefault(first_RK, [])
    if not any(reference() is a_RK for reference in known):
        known.append(TensorWeakRef(a_RK))


def _followers(a_RK: Tensor) -> list[Tensor]:
    """Those that joined, live and can be multiplied with it: one that is sharded and not here has another shape."""
    alive = [reference() for reference in _JOINED.get(a_RK, [])]
    like = (a_RK.dtype, a_RK.device, a_RK.shape[1:])
    return [a for a in alive if a is not None and (a.dtype, a.device, a.shape[1:]) == like]
