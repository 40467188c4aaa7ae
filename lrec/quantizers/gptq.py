"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): columns are rounded one by one, each making up for those before it.

The error to keep small is that of the layer's output, tr(E H E^T) with E = W - Q and H the mean of x x^T. GPTQ rounds
a column and moves its error, by the inverse of H, onto the columns not yet rounded. Written with the factors

    H = R D R^T,  R upper triangular with ones on its diagonal, D diagonal,

the same codes come out of a simpler rule (QuIP, Chee et al. 2023, arXiv 2307.13304, theorem 6), because

    tr(E H E^T) = sum_k D_k |E R[:, k]|^2,  E R[:, k] = E[:, k] + sum_{j<k} E[:, j] R[j, k]:

column k is rounded not from W[:, k] but from W[:, k] + sum_{j<k} E[:, j] R[j, k]. One Cholesky factorisation gives R
and D and no matrix is inverted, which is why float32 is enough. D_k is what an error in column k costs after all that
later columns can do about it, so D, and not the diagonal of H, weighs the search for the grid. On 28 linears of
SmolLM2-135M (2 bits, groups of 64, two-core CPU machine, 2026-11) the relative output error was, as a geometric mean,
0.0400 with min-max grids, 0.0314 with searched grids unweighted, 0.0271 weighted by diag H, 0.0256 weighted by D.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats.uniform import Uniform
from lrec.grid import per_column
from lrec.quantizers import UniformQuantizer, setting
from lrec.statistics import Statistics

# Weights rounded at a time. Rows do not depend on each other: on a CPU a slice stays in the cache and is small beside
# a block; on a GPU each step over a column is a launch, so that slices should be few.
SLICE_WEIGHTS_CPU = 2**20
SLICE_WEIGHTS_GPU = 2**24


@dataclass(frozen=True, kw_only=True)
class GPTQ(UniformQuantizer):
    """GPTQ onto a grid that is fixed before the loop (static groups), so codes keep the order of the columns.

    Input channels that were zero for every calibration token say nothing about their weights; these become zero, as
    in the original.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damp_percent: float = setting(0.01, "added to the Hessian's diagonal, as a share of its mean (0.01 is one percent)")
    act_order: bool = setting(True, "round the columns of the strongest input channels first")
    block_size: int = setting(128, "columns between two updates of all later columns; changes speed, not the result")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.damp_percent < 1:
            raise ValueError(f"damp_percent = {self.damp_percent} is out of range; allowed: 0 to below 1, such as 0.01")
        if self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size} is out of range; allowed: 1 or more, such as 128")

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Uniform:
        """The packed weight. Raises ValueError if the group size does not fit K or H is not positive definite."""
        h_KK = statistics.hessian_KK.to(w_NK)
        power_K = h_KK.diagonal()
        order_K = power_K.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(power_K))
        order_K = order_K.to(w_NK.device)
        r_KK, cost_K = factor(h_KK, self.damp_percent, order_K)
        cost_K = torch.empty_like(cost_K).index_copy_(0, order_K, cost_K)
        dead_K = power_K == 0
        w_NK = w_NK.masked_fill(dead_K, 0) if dead_K.any() else w_NK
        # Of the whole weight, since rows may share parts of a grid.
        grid = self.grid(w_NK, cost_K)
        slice_weights = SLICE_WEIGHTS_CPU if w_NK.device.type == "cpu" else SLICE_WEIGHTS_GPU
        slices = zip(*(t.split(max(1, slice_weights // len(power_K))) for t in (w_NK, *grid)), strict=True)
        return self.pack(torch.cat([self._round_rows(*rows, order_K, r_KK) for rows in slices]), *grid)

    def _round_rows(self, w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, order_K: Tensor, r_KK: Tensor) -> Tensor:
        columns = [per_column(g, len(order_K), self.group_size, w_NK.dtype) for g in (scale_NG, zero_NG)]
        in_order = [t[:, order_K].t().contiguous() for t in (w_NK, *columns)]
        del columns
        codes_KN = round_columns(*in_order, r_KK, self.bits, self.block_size)
        return torch.empty_like(codes_KN).index_copy_(0, order_K, codes_KN).t()


def factor(h_KK: Tensor, damp_percent: float, order_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """R (unit upper triangular) and D (K,) with H + damp I = R D R^T, damp = damp_percent * mean(diag H), for the
    columns of H taken in the order `order_K` (their own if None).

    A zero on the diagonal, a channel without input, counts as that mean. Raises ValueError if the damped H is not
    finite and positive definite in its dtype.
    """
    # Cholesky gives lower factors; taking the columns backwards, and turning round the result, makes it the upper one.
    back_K = (torch.arange(len(h_KK), device=h_KK.device) if order_K is None else order_K).flip(0)
    power_K = h_KK.diagonal()[back_K]
    mean = power_K.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    damped_KK = h_KK[back_K[:, None], back_K]
    damped_KK.diagonal().add_(torch.where(power_K == 0, mean, damp_percent * mean))
    lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
    del damped_KK
    if info or not lower_KK.diagonal().isfinite().all():
        raise ValueError(
            f"the Hessian with damp_percent = {damp_percent} is not positive definite (Cholesky failed); "
            f"use a larger damp_percent, such as {max(10 * damp_percent, 0.01):g}, or more calibration tokens"
        )
    upper_KK = lower_KK.flip(0, 1)
    pivot_K = upper_KK.diagonal().clone()
    return upper_KK.div_(pivot_K), pivot_K.square()


def round_columns(w_KN: Tensor, scale_KN: Tensor, zero_KN: Tensor, r_KK: Tensor, bits: int, block_size: int) -> Tensor:
    """uint8 codes (K, N) of the columns, rounded from first to last by the rule at the top of this file.

    All inputs are in the order of rounding, one row a column of W. Inside a block of `block_size` columns each one
    gathers the errors before it when its turn comes; a finished block is added to all later columns at once.
    """
    K = len(w_KN)
    q_KN = torch.empty_like(w_KN)
    error_KN = torch.empty_like(w_KN)
    target_KN = w_KN.clone()
    # error = w - scale * (q - zero) = shifted - scale * q
    shifted_KN = torch.addcmul(w_KN, scale_KN, zero_KN)
    for start in range(0, K, block_size):
        block = slice(start, start + block_size)
        rest = slice(start + block_size, K)
        error = error_KN[block]
        mix = r_KK[block, block].t().contiguous()
        rows = zip(
            *(t[block].unbind() for t in (target_KN, scale_KN, zero_KN, shifted_KN, q_KN, error_KN)), strict=True
        )
        for k, (target, scale, zero, shifted, q, miss) in enumerate(rows):
            if k:
                target = torch.addmv(target, error[:k].t(), mix[k, :k])
            torch.addcdiv(zero, target, scale, out=q).round_().clamp_(0, 2**bits - 1)
            torch.addcmul(shifted, scale, q, value=-1, out=miss)
        target_KN[rest].addmm_(r_KK[block, rest].t(), error)
    return q_KN.byte()
