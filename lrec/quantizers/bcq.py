"""Binary coding by least squares: greedy start, then codes and scales in turn (Xu et al., arXiv 1802.00150).

The plain baseline of binary coding; GPTQT restricts the scales and feeds errors back instead. What fits scales to
given cells stands here for both.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats.binary import MAX_PLANES, Binary, levels
from lrec.quantizers import Quantizer, setting
from lrec.quantizers.kmeans import SLICE_WEIGHTS, Sums, nearest, sensitivity
from lrec.statistics import Statistics

# Spans of the even grids that are tried as starts beside the greedy one, as a share of the range.
SPANS = (1.0, 0.75, 0.5)


@dataclass(frozen=True, kw_only=True)
class Bcq(Quantizer):
    """min over offset, alpha and signs b of sum_k H[k, k] (w[n, k] - offset - sum_p alpha_p (2 b_p - 1))^2."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    bits: int = setting(2, f"bit planes: 1 to {MAX_PLANES}")
    group_size: int = setting(
        128, "columns that share an offset and scales, 16 or more (a shorter row is one group); 0: the row"
    )
    iterations: int = setting(15, "least-squares fits, each followed by new codes")

    def __post_init__(self):
        check(self.bits, self.group_size)
        if self.iterations < 0:
            raise ValueError(f"iterations = {self.iterations}; allowed: 0 (greedy alone) or more")

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Binary:
        """Offset and scales of each group in fp16, and the nearest of its 2^bits levels for every weight."""
        N, K = w_NK.shape
        g = min(self.group_size, K) or K
        x = torch.nn.functional.pad(w_NK, (0, -K % g)).view(-1, g)
        weight_K = torch.nn.functional.pad(sensitivity(statistics.hessian_KK), (0, -K % g)).view(-1, g)
        weight = weight_K.expand(N, -1, g).reshape(-1, g)
        rows = max(1, SLICE_WEIGHTS // g)
        parts = zip(x.split(rows), weight.split(rows), strict=True)
        fits = [best_fit(a, b, self.bits, self.iterations) for a, b in parts]
        alpha, offset = (torch.cat(values).half() for values in zip(*fits, strict=True))
        codes = encode(x, alpha, offset).view(N, -1)[:, :K]
        return Binary.pack(codes, alpha.view(N, -1, self.bits), offset.view(N, -1), g)


def check(bits: int, group_size: int) -> None:
    """Raises ValueError for a number of planes or a group size that the binary format has not."""
    if not 1 <= bits <= MAX_PLANES:
        raise ValueError(f"bits = {bits} is no number of bit planes; allowed: 1 to {MAX_PLANES}")
    if group_size < 0 or 0 < group_size < 16:
        raise ValueError(f"group_size = {group_size} is too small; allowed: 16 or more, or 0 for the whole row")


def best_fit(x_RK: Tensor, weight_RK: Tensor, planes: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Scales (R, P) and offsets (R,) in float64: the best of the greedy start and even grids, each refitted."""
    sums = Sums(x_RK, weight_RK)
    alpha, offset = _greedy(x_RK.double(), weight_RK.double(), planes)
    low = torch.where(sums.weight > 0, sums.x, torch.inf).amin(1)
    high = torch.where(sums.weight > 0, sums.x, -torch.inf).amax(1)
    places = 2.0 ** torch.arange(planes, dtype=torch.float64, device=x_RK.device) / (2**planes - 1)
    grids = [(high - low)[:, None] * (span / 2) * places for span in SPANS]
    alpha = torch.stack([alpha, *grids], 1)
    offset = torch.stack([offset, *[(high + low) / 2] * len(SPANS)], 1)
    for _ in range(iterations):
        alpha, offset = refit(sums, alpha, offset)
    best = sums.gain(levels(alpha, offset).sort(-1).values).argmax(1)
    row = torch.arange(len(best), device=best.device)
    return alpha[row, best], offset[row, best]


def _greedy(x: Tensor, weight: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    total = weight.sum(1, keepdim=True).clamp_min(1e-300)
    offset = (weight * x).sum(1, keepdim=True) / total
    rest, alpha = x - offset, []
    for _ in range(planes):
        alpha.append((weight * rest.abs()).sum(1, keepdim=True) / total)
        rest = rest - torch.where(rest > 0, alpha[-1], -alpha[-1])
    return torch.cat(alpha, 1), offset[:, 0]


def refit(sums: Sums, alpha: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The scales (R, S, P) and offsets (R, S) that are best for the codes that the given ones lead to.

    Least squares over the 2^P cells. The given values weigh in by a billionth, and so stay where cells are empty.
    """
    P = alpha.shape[-1]
    value, order = levels(alpha, offset).sort(-1)
    mass, moment = sums.cells(value)
    design = torch.cat(
        [(order[..., None] >> torch.arange(P, device=order.device) & 1) * 2 - 1, order[..., None] * 0 + 1], -1
    )
    design = design.to(mass.dtype)
    weighted = design * mass[..., None]
    ridge = 1e-9 * mass.sum(-1).clamp_min(1e-300)
    given = torch.cat([alpha, offset[..., None]], -1)
    eye = torch.eye(P + 1, dtype=mass.dtype, device=mass.device)
    normal = design.mT @ weighted + ridge[..., None, None] * eye
    right = (design * moment[..., None]).sum(-2) + ridge[..., None] * given
    fitted = torch.linalg.solve(normal, right)
    return fitted[..., :P], fitted[..., P]


def encode(x_RK: Tensor, alpha_RP: Tensor, offset_R: Tensor) -> Tensor:
    """Codes sum_p b_p 2^p (R, K) of the nearest levels of rows with the scales and offset that are stored."""
    value, order = levels(alpha_RP.to(x_RK.dtype), offset_R.to(x_RK.dtype)).sort(-1)
    return order.gather(1, nearest(x_RK, value).long()).to(torch.uint8)
