"""ICQuant (arXiv 2505.00850): take out the outliers of each row, and both parts fit a grid of one bit less.

The largest |w| of a row, a share gamma of 5 %, span about half its range. They get a grid of their own (a sign, and
bits - 1 bits for the magnitude), the rest another, and a gap code says where they stand, at 0.31 bits per weight.
What an error costs weighs in, unless the search is `mse` or `minmax`, which need no text: a weak channel should not set
the grid of a row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec import registry
from lrec.formats.outlier import INDEX_BITS, WIDTHS, Outlier, expected_index_bits, span
from lrec.quantizers import Quantizer, setting
from lrec.quantizers.kmeans import SLICE_WEIGHTS, Sums, cluster, nearest, sensitivity
from lrec.statistics import Statistics

INNER = ("rtn", "kmeans")
SEARCHES = ("minmax", "mse", "weighted")
RATIOS = 6
REFITS = 8
KMEANS_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class IcQuant(Quantizer):
    """Two quantizers per row: one for the floor(gamma * K) largest |w| (at least one), one for the others."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    bits: int = setting(2, "bits per code, the index not counted: 2, 3, 4")
    gamma: float = setting(0.05, "share of each row's weights that are outliers, above 0 and below 0.5")
    index_bits: int = setting(6, "bits of a symbol of the gap code: 4, 5, 6, 7")
    inner: str = setting("rtn", "quantizer of each part: rtn (even grid) or kmeans (levels weighted by diag H)")
    scale_search: str = setting(
        "weighted",
        "how rtn spans its grids: weighted (least squares, by diag H), or without a text mse (unweighted) or minmax",
    )

    def __post_init__(self):
        if self.bits not in WIDTHS:
            raise ValueError(f"bits = {self.bits} is no width of the outlier format; allowed: {WIDTHS}")
        if self.index_bits not in INDEX_BITS:
            raise ValueError(f"index_bits = {self.index_bits} is no width of an outlier index; allowed: {INDEX_BITS}")
        if not 0 < self.gamma < 0.5:
            raise ValueError(
                f"gamma = {self.gamma} is no share of outliers; allowed: above 0, below 0.5; 0.05 as a rule"
            )
        for value, allowed, what in ((self.inner, INNER, "inner"), (self.scale_search, SEARCHES, "scale_search")):
            if value not in allowed:
                raise ValueError(registry.nearest(value, allowed, what))
        if self.inner == "rtn" and self.scale_search != "weighted":
            object.__setattr__(self, "needs", frozenset())

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Outlier:
        """Codes, positions of outliers and levels of `w_NK`."""
        (N, K), num_outliers = w_NK.shape, max(1, int(self.gamma * w_NK.shape[1]))
        outlier_NK = torch.zeros_like(w_NK, dtype=torch.bool)
        outlier_NK.scatter_(1, w_NK.abs().topk(num_outliers).indices, True)
        # Every row has as many outliers, so that both parts are matrices.
        masks = (~outlier_NK, outlier_NK)
        inliers, outliers = (w_NK[mask].view(N, -1) for mask in masks)
        weights = [None, None]
        if self.needs:
            weights = [sensitivity(statistics.hessian_KK).expand(N, K)[mask].view(N, -1) for mask in masks]
        if self.inner == "rtn":
            codes, levels = self._grids((inliers, outliers), weights)
        else:
            parts = [self._clusters(x, weight) for x, weight in zip((inliers, outliers), weights, strict=True)]
            codes = [c for c, _ in parts]
            levels = torch.stack([table for _, table in parts], 1)
        codes_NK = torch.empty_like(w_NK, dtype=torch.int32)
        for mask, part in zip(masks, codes, strict=True):
            codes_NK[mask] = part.int().flatten()
        return Outlier.pack(codes_NK, outlier_NK, levels, self.bits, self.index_bits)

    def measure(self, packed: Outlier, w_NK: Tensor) -> dict[str, float]:
        """What taking out outliers gained and cost on this layer.

        inlier_range: mean over rows of (range of inliers) / (range of all), 0.5 being worth one bit;
        outliers: their share; index_bits_per_weight: as stored; expected_index_bits: by the formula for even positions.
        """
        outlier = packed.outliers().bool()
        inlier = torch.where(outlier, 0, w_NK)
        range_of = [x.amax(1) - x.amin(1) for x in (inlier, w_NK)]
        share = float(outlier.float().mean())
        return {
            "inlier_range": float((range_of[0] / range_of[1].clamp_min(1e-30)).mean()),
            "outliers": share,
            "index_bits_per_weight": packed.index_bits_per_weight,
            "expected_index_bits": expected_index_bits(share, packed.index_bits),
        }

    def _clusters(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, SLICE_WEIGHTS // x.shape[1])
        pairs = zip(x.split(rows), weight.split(rows), strict=True)
        table = torch.cat([cluster(a, b, 2**self.bits, KMEANS_STEPS) for a, b in pairs]).half()
        return nearest(x, table), table

    def _grids(
        self, parts: tuple[Tensor, Tensor], weights: list[Tensor | None]
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        half, (inliers, outliers) = 2 ** (self.bits - 1), parts
        magnitudes = outliers.abs()
        fits = [
            fit_grid(x, num_levels, self.scale_search, weight)
            for x, num_levels, weight in zip((inliers, magnitudes), (2 * half, half), weights, strict=True)
        ]
        scale, base = (torch.stack(values, 1).half() for values in zip(*fits, strict=True))
        levels = span(scale[..., None].float(), base[..., None].float(), self.bits)
        magnitude = nearest(magnitudes, levels[:, 1, half:])
        return [nearest(inliers, levels[:, 0]), magnitude + half * (outliers > 0)], (scale, base)


def fit_grid(x_RK: Tensor, num_levels: int, search: str, weight_RK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and base (R,) of the even grid base + scale * q, q < num_levels, nearest to each row.

    `minmax` spans the row; the others start from that range and narrower ones and alternate rounding with the least
    squares fit of scale and base to the codes, weighted by `weight_RK` (ones if None), and keep the best.
    """
    low, high = x_RK.amin(1).double(), x_RK.amax(1).double()
    # A row of equal weights has no range; any positive step then serves.
    step = ((high - low) / (num_levels - 1)).clamp_min(1e-6)
    if search == "minmax":
        return step, low
    rows = max(1, SLICE_WEIGHTS // x_RK.shape[1])
    weights = (torch.ones_like(x_RK) if weight_RK is None else weight_RK).split(rows)
    parts = zip(x_RK.split(rows), weights, step.split(rows), low.split(rows), strict=True)
    scale, base = zip(*(_refit(Sums(x, w), s, b, num_levels) for x, w, s, b in parts), strict=True)
    return torch.cat(scale), torch.cat(base)


def _refit(sums: Sums, step: Tensor, low: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    q = torch.arange(num_levels, dtype=torch.float64, device=step.device)
    ratio = torch.linspace(1, 0.4, RATIOS, dtype=torch.float64, device=step.device)
    scale = step[:, None] * ratio
    base = low[:, None] + (step[:, None] - scale) * (num_levels - 1) / 2
    for _ in range(REFITS):
        scale, base = sums.refit(scale, base, q)
    best = sums.gain(base[..., None] + scale[..., None] * q).argmax(1, keepdim=True)
    return scale.gather(1, best)[:, 0], base.gather(1, best)[:, 0]
