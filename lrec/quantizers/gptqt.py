"""GPTQT (arXiv 2407.02891): quantize twice, first to an even grid of more bits, then to binary codes on that grid.

The 2^q levels of a group are sums of q steps of the grid with signs. Which steps, and how wide the grid is, is chosen
by the error in the layer's output, since the least-squares fit to the weights alone overfits; codes then follow
column by column with GPTQ's feedback of errors. Both steps fuse: what is stored are q bit planes, q scales and an
offset, and nothing of the grid. The paper has no published code. Reconstructed here are the search, in three steps
(width of the even grid, choice of steps, width again), and that errors are weighed by D of H = R D R^T (see gptq).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, compress, pairwise, product
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats.binary import Binary, levels
from lrec.quantizers import Quantizer, bcq, setting
from lrec.quantizers.gptq import factor
from lrec.quantizers.kmeans import Sums
from lrec.statistics import Statistics

# Where the search starts, as a share of a group's range, and rounds of refitting before and after the choice of steps.
WIDTH = 0.8
REFITS = 3
# How uneven a level set may be: widest over narrowest gap between neighbouring levels.
MAX_GAP = 3
# Weights fitted at a time; each group has up to 56 candidates of 16 levels in work.
SLICE_WEIGHTS = 2**19


@dataclass(frozen=True, kw_only=True)
class GPTQT(Quantizer):
    """GPTQ onto the binary-coded level sets of each group.

    Input channels that were zero for every calibration token count as in gptq: their weights become zero beforehand.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    bits: int = setting(2, "bit planes: 1 to 4")
    group_size: int = setting(
        128, "columns that share an offset and scales, 16 or more (a shorter row is one group); 0: the row"
    )
    extra_bits: int = setting(2, "bits of the even grid beyond `bits`: 1 or 2")
    damp_percent: float = setting(0.01, "added to the Hessian's diagonal, as a share of its mean (0.01 is one percent)")
    act_order: bool = setting(True, "round the columns of the strongest input channels first")
    block_size: int = setting(128, "columns between two updates of all later columns; changes speed, not the result")

    def __post_init__(self):
        bcq.check(self.bits, self.group_size)
        if self.extra_bits not in (1, 2):
            raise ValueError(f"extra_bits = {self.extra_bits}; allowed: 1 or 2")
        if not 0 <= self.damp_percent < 1:
            raise ValueError(f"damp_percent = {self.damp_percent} is out of range; allowed: 0 to below 1, such as 0.01")
        if self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size} is out of range; allowed: 1 or more, such as 128")

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Binary:
        """The packed weight. Raises ValueError if H, damped, is not positive definite."""
        K, h_KK = w_NK.shape[1], statistics.hessian_KK.to(w_NK)
        g = min(self.group_size, K) or K
        power_K = h_KK.diagonal()
        w_NK = w_NK.masked_fill(power_K == 0, 0)
        group_K = torch.arange(K, device=w_NK.device) // g
        order_K = (
            power_K.argsort(descending=True, stable=True) if self.act_order else torch.arange(K, device=w_NK.device)
        )
        r_KK, cost_K = factor(h_KK, self.damp_percent, order_K)
        alpha, offset = self.level_sets(w_NK, torch.empty_like(cost_K).index_copy_(0, order_K, cost_K), g)
        value, codes = levels(alpha.to(w_NK.dtype), offset.to(w_NK.dtype)).sort(-1)
        in_order = (w_NK[:, order_K].t().contiguous(), value.permute(1, 2, 0).contiguous(), group_K[order_K])
        rank_KN = round_columns(*in_order, r_KK, self.block_size)
        rank_NK = torch.empty_like(rank_KN).index_copy_(0, order_K, rank_KN).t()
        codes_NK = codes.flatten(1).gather(1, group_K * 2**self.bits + rank_NK)
        return Binary.pack(codes_NK, alpha, offset, g)

    def level_sets(self, w_NK: Tensor, cost_K: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Scales (N, G, P) and offsets (N, G) in fp16 of each group's best level set, errors weighed by `cost_K`."""
        N, K = w_NK.shape
        pad = (0, -K % group_size)
        x = torch.nn.functional.pad(w_NK, pad).view(-1, group_size)
        cost = torch.nn.functional.pad(cost_K, pad).view(1, -1, group_size).expand(N, -1, -1).reshape(x.shape)
        shapes = torch.tensor(step_shapes(self.bits, self.extra_bits), dtype=torch.float64, device=w_NK.device)
        rows = max(1, SLICE_WEIGHTS // group_size)
        parts = zip(x.split(rows), cost.split(rows), strict=True)
        fits = [choose(Sums(a, b), shapes) for a, b in parts]
        alpha, offset = (torch.cat(values).half() for values in zip(*fits, strict=True))
        return alpha.view(N, -1, self.bits), offset.view(N, -1)


@lru_cache
def step_shapes(bits: int, extra_bits: int) -> tuple[tuple[float, ...], ...]:
    """The ways to go from end to end of the grid of bits + extra_bits bits in `bits` ascending steps, as shares.

    First comes the even one, 1 : 2 : 4 and so on, which is the grid of `bits` bits itself. Others are left out when
    the widest gap between their levels exceeds MAX_GAP times the narrowest: hardly any group would choose them.
    """
    even = tuple(2**p / (2**bits - 1) for p in range(bits))
    last = 2 ** (bits + extra_bits) - 1
    kept = [even]
    for steps in combinations(range(1, last + 1), bits):
        if sum(steps) == last:
            level = sorted(sum(compress(steps, chosen)) for chosen in product((0, 1), repeat=bits))
            gaps = [b - a for a, b in pairwise(level)]
            shape = tuple(step / last for step in steps)
            if max(gaps) <= MAX_GAP * min(gaps) and shape != even:
                kept.append(shape)
    return tuple(kept)


def choose(sums: Sums, shapes_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (R, P) and offsets (R,) of the best level set: width of the even grid, then steps, then width again."""
    low = torch.where(sums.weight > 0, sums.x, torch.inf).amin(1)
    high = torch.where(sums.weight > 0, sums.x, -torch.inf).amax(1)
    spread_SL = levels(shapes_SP / 2, shapes_SP.new_zeros(len(shapes_SP))).sort(-1).values
    # A group of equal weights has no range; any positive width then serves.
    width, middle = WIDTH * (high - low).clamp_min(1e-6), (high + low) / 2
    for _ in range(REFITS):
        width, middle = sums.refit(width, middle, spread_SL[0])
    shape = sums.gain(middle[:, None, None] + width[:, None, None] * spread_SL).argmax(1)
    for _ in range(REFITS):
        width, middle = sums.refit(width, middle, spread_SL[shape])
    return width[:, None] * shapes_SP[shape] / 2, middle


def round_columns(w_KN: Tensor, value_GLN: Tensor, group_K: Tensor, r_KK: Tensor, block_size: int) -> Tensor:
    """uint8 ranks (K, N) of the levels picked, column by column, by the rule at the top of gptq.py.

    Inputs are in the order of rounding; column k rounds to the ascending levels value_GLN[group_K[k]].
    """
    border_GMN = (value_GLN[:, 1:] + value_GLN[:, :-1]) / 2
    K = len(w_KN)
    rank_KN = torch.empty_like(w_KN, dtype=torch.uint8)
    error_KN = torch.empty_like(w_KN)
    target_KN = w_KN.clone()
    groups = group_K.tolist()
    for start in range(0, K, block_size):
        block, rest = slice(start, min(start + block_size, K)), slice(start + block_size, K)
        error = error_KN[block]
        mix = r_KK[block, block].t().contiguous()
        for i, k in enumerate(range(block.start, block.stop)):
            target = torch.addmv(target_KN[k], error[:i].t(), mix[i, :i]) if i else target_KN[k]
            rank = (target > border_GMN[groups[k]]).sum(0, keepdim=True)
            torch.sub(w_KN[k], value_GLN[groups[k]].gather(0, rank)[0], out=error[i])
            rank_KN[k] = rank[0]
        target_KN[rest].addmm_(r_KK[block, rest].t(), error)
    return rank_KN
