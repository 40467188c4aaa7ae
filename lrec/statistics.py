"""What a linear's inputs look like over the calibration tokens: all that a quantizer may know about the data.

Linears that see the same input share one `Collector`. A quantizer declares in `needs` which statistics it wants, by
their names in `NEEDS`; only those are collected, and the others are None in the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrec import processes, registry

NEEDS = frozenset({"hessian", "maxima", "cross"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Statistics:
    """Statistics of `num_tokens` inputs x of a linear with K input channels; what was not asked for is None.

    hessian_KK: mean over tokens of x x^T; half the Hessian, in one row of W, of the mean squared output error.
    maxima_K:   max over tokens of |x_k|.
    cross_KK:   mean over tokens of y x^T, y being what the full-precision model has in the place of x.
    """

    num_tokens: int
    hessian_KK: Tensor | None = None
    maxima_K: Tensor | None = None
    cross_KK: Tensor | None = None


def matched(w_NK: Tensor, seen: Statistics, strength: float = 1.0, damping: float = 0.01) -> Tensor:
    """The weight that makes of the quantized model's inputs x what W makes of the full-precision model's inputs y:

        W* = W + strength * W (C - R) (R + damping * mean(diag R) I)^-1,  R = E x x^T, C = E y x^T,

    in w's dtype. With strength 1 and for any Q, E ||W y - Q x||^2 = tr (W* - Q) R (W* - Q)^T + what no Q changes, but
    for the damping; so a quantizer, or a low-rank fit, of W* under R is one of W that makes up for errors upstream.
    GPTAQ (2504.02692) and QEP (2504.09629, which names the strength) correct for the same mismatch.
    """
    r_KK = seen.hessian_KK.to(w_NK)
    mean = r_KK.diagonal().mean()
    damped_KK = r_KK.clone()
    damped_KK.diagonal().add_(torch.where(mean > 0, damping * mean, 1))
    shift_NK = w_NK @ (seen.cross_KK.to(w_NK) - r_KK)
    return w_NK + strength * torch.cholesky_solve(shift_NK.t(), torch.linalg.cholesky(damped_KK)).t()


class Collector:
    """Sums the statistics of inputs that come in batches of any size, on the device where they are."""

    def __init__(self, K: int, needs: Iterable[str], dtype: torch.dtype = torch.float32):
        """Collects `needs` (names of `NEEDS`) for K channels in `dtype`, float32 or float64.

        Raises ValueError for a need that does not exist or a narrower dtype.
        """
        self.needs = frozenset(needs)
        for need in sorted(self.needs - NEEDS):
            raise ValueError(registry.nearest(need, NEEDS, "statistic"))
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"statistics in {dtype} would lose the small channels; allowed: float32, float64")
        self.K, self.dtype = K, dtype
        self.num_tokens = 0
        self._gram_KK: Tensor | None = None
        self._cross_KK: Tensor | None = None
        self._maxima_K: Tensor | None = None

    def add(self, x_TK: Tensor, full_TK: Tensor | None = None, weight_T: Tensor | None = None) -> None:
        """Adds inputs of shape (..., K), all leading dimensions being tokens; `full_TK` are the full-precision model's
        of the same tokens, the same ones if not given, and `weight_T` what a token counts for in means, 1 if not given.

        Raises ValueError if x has not K channels or holds NaN or infinity; then nothing is added.
        """
        if x_TK.shape[-1] != self.K:
            raise ValueError(f"inputs have {x_TK.shape[-1]} channels, but these statistics are of {self.K}")
        x_TK = x_TK.detach().reshape(-1, self.K).to(self.dtype)
        if not len(x_TK):
            return
        maxima_K = torch.linalg.vector_norm(x_TK, torch.inf, 0)
        bad = int((~maxima_K.isfinite()).sum())
        if bad:
            raise ValueError(
                f"calibration inputs hold NaN or infinity in {bad} of {self.K} channels "
                f"(tokens {self.num_tokens} to {self.num_tokens + len(x_TK)}); statistics need finite activations: "
                "run the model in bfloat16 or float32, and check its weights"
            )
        self.num_tokens += len(x_TK)
        weighed_TK = x_TK if weight_T is None else x_TK * weight_T.to(x_TK)[:, None]
        if "hessian" in self.needs:
            if self._gram_KK is None:
                self._gram_KK = x_TK.new_zeros(self.K, self.K)
            self._gram_KK.addmm_(weighed_TK.t(), x_TK)
        if "cross" in self.needs:
            y_TK = x_TK if full_TK is None else full_TK.detach().reshape(-1, self.K).to(self.dtype)
            if self._cross_KK is None:
                self._cross_KK = x_TK.new_zeros(self.K, self.K)
            self._cross_KK.addmm_(y_TK.t(), weighed_TK)
        if "maxima" in self.needs:
            known = self._maxima_K
            self._maxima_K = maxima_K if known is None else torch.maximum(known, maxima_K)

    def pool(self) -> "Collector":
        """Adds what all other processes have collected of this input, each of which must call this; returns itself."""
        if processes.count() > 1:
            device = processes.state().device
            self.num_tokens = int(processes.total(torch.tensor(self.num_tokens, device=device)))
            for need, name, reduce in (
                ("hessian", "_gram_KK", processes.total),
                ("cross", "_cross_KK", processes.total),
                ("maxima", "_maxima_K", processes.largest),
            ):
                held = getattr(self, name)
                if need in self.needs and held is None:
                    # No token of this process has reached the input, as may be with an expert's.
                    shape = (self.K,) if need == "maxima" else (self.K, self.K)
                    held = torch.zeros(shape, dtype=self.dtype, device=device)
                setattr(self, name, held if held is None else reduce(held))
        return self

    def result(self) -> Statistics:
        """The statistics of everything added so far. Raises ValueError if that is nothing."""
        if not self.num_tokens:
            raise ValueError("no calibration tokens reached this input; give more or longer samples")
        hessian_KK, cross_KK = (
            None if total_KK is None else total_KK / self.num_tokens for total_KK in (self._gram_KK, self._cross_KK)
        )
        return Statistics(num_tokens=self.num_tokens, hessian_KK=hessian_KK, maxima_K=self._maxima_K, cross_KK=cross_KK)
