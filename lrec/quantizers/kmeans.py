"""Sensitivity-weighted k-means (SqueezeLLM, arXiv 2306.07629): each row has a table of its own.

To second order a rounding error e of column k costs H[k, k] e^2, so levels go where sensitive weights are. In one
dimension clusters are intervals: after one sort, a step of Lloyd's algorithm is a look-up in running sums, whose cost
does not grow with the row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats.codebook import WIDTHS, Codebook
from lrec.quantizers import Quantizer, setting
from lrec.statistics import Statistics

# Weights clustered at a time: bounds the float64 workspace to about 50 bytes times this.
SLICE_WEIGHTS = 2**22


@dataclass(frozen=True, kw_only=True)
class KMeans(Quantizer):
    """min over table and codes of sum_k H[k, k] (w[n, k] - table[n, g, q[n, k]])^2, by Lloyd's algorithm."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    bits: int = setting(3, "bits per code: 2, 3, 4")
    group_size: int = setting(0, "columns that share a table of 2^bits fp16 levels; 0 for the whole row")
    iterations: int = setting(40, "steps of Lloyd's algorithm from each of three starts")

    def __post_init__(self):
        if self.bits not in WIDTHS:
            raise ValueError(f"bits = {self.bits} is no width of a codebook; allowed: 2, 3, 4")
        if self.group_size < 0 or 0 < self.group_size < 16:
            raise ValueError(
                f"group_size = {self.group_size} is too small; allowed: 16 or more, or 0 for the whole row"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations = {self.iterations}; allowed: 1 or more")

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Codebook:
        """One table per row, or per row and group, and the nearest of its levels for every weight."""
        N, K = w_NK.shape
        g = min(self.group_size, K) or K
        pad = (0, -K % g)
        x = torch.nn.functional.pad(w_NK, pad).view(-1, g)
        weight_K = torch.nn.functional.pad(sensitivity(statistics.hessian_KK), pad).view(-1, g)
        weight = weight_K.expand(N, -1, g).reshape(-1, g)
        rows = max(1, SLICE_WEIGHTS // g)
        parts = zip(x.split(rows), weight.split(rows), strict=True)
        table = torch.cat([cluster(x, w, 2**self.bits, self.iterations) for x, w in parts]).half()
        codes = nearest(x, table).view(N, -1)[:, :K]
        shape = (N, 2**self.bits) if g == K else (N, -1, 2**self.bits)
        return Codebook.pack(codes, table.view(shape), group_size=g)


def sensitivity(hessian_KK: Tensor) -> Tensor:
    """diag(H) (K,), with a floor of a millionth of its mean so that channels without input still get sound levels."""
    diagonal = hessian_KK.diagonal()
    mean = diagonal.mean()
    return diagonal.clamp_min(1e-6 * mean) if mean > 0 else torch.ones_like(diagonal)


class Sums:
    """Rows of numbers sorted, with running sums, so that the fit of any levels to them takes a few look-ups."""

    def __init__(self, x_RK: Tensor, weight_RK: Tensor | None = None):
        """Sorts x; weights default to 1. All in float64."""
        self.x, order = x_RK.double().contiguous().sort(1)
        self.weight = torch.ones_like(self.x) if weight_RK is None else weight_RK.double().gather(1, order)
        parts = (self.weight, self.weight * self.x)
        self._mass, self._moment = (torch.nn.functional.pad(part.cumsum(1), (1, 0)) for part in parts)

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (R, ..., L) of the weights, and of weight * x, over all x nearest to each of ascending levels."""
        borders = ((levels[..., 1:] + levels[..., :-1]) / 2).flatten(1)
        inner = torch.searchsorted(self.x, borders).view(*levels.shape[:-1], -1)
        edges = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=self.x.shape[1])
        flat = edges.flatten(1)
        return tuple(v.gather(1, flat).view(edges.shape).diff() for v in (self._mass, self._moment))

    def gain(self, levels: Tensor) -> Tensor:
        """sum weight x^2 less sum weight (x - nearest level)^2, (R, ...): the larger, the better levels fit."""
        mass, moment = self.cells(levels)
        return (levels * (2 * moment - levels * mass)).sum(-1)

    def refit(self, scale: Tensor, base: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and base (R, ...) that least squares gives to the cells of the levels base + scale * pattern.

        `pattern` (..., L) ascends. What the cells leave open, because all x lie in one, stays as given.
        """
        mass, moment = self.cells(base[..., None] + scale[..., None] * pattern)
        n, sp, spp = mass.sum(-1), (mass * pattern).sum(-1), (mass * pattern * pattern).sum(-1)
        sx, spx = moment.sum(-1), (moment * pattern).sum(-1)
        spread = n * spp - sp * sp
        slope = (n * spx - sp * sx) / spread
        better = (spread > 1e-12 * n * n) & (slope > 0)
        return torch.where(better, slope, scale), torch.where(better, (sx - slope * sp) / n, base)


def cluster(x_RK: Tensor, weight_RK: Tensor | None, num_levels: int, iterations: int) -> Tensor:
    """Ascending levels (R, num_levels) float64 that locally minimise sum_k weight (x - nearest level)^2 in each row.

    The best of three starts: evenly spaced, and at even steps of the weights' running sum of weight^p for p = 1 and
    p = 1/3 (the density that is best for many levels). Entries of weight 0 count for nothing.
    """
    sums = Sums(x_RK, weight_RK)
    x, weight = sums.x, sums.weight
    low = torch.where(weight > 0, x, torch.inf).amin(1, keepdim=True)
    high = torch.where(weight > 0, x, -torch.inf).amax(1, keepdim=True)
    steps = (torch.arange(num_levels, device=x.device) + 0.5) / num_levels
    starts = [low + (high - low) * steps]
    for power in (1, 1 / 3):
        running = weight.pow(power).cumsum(1)
        at = torch.searchsorted(running, running[:, -1:] * steps).clamp_max(x.shape[1] - 1)
        starts.append(x.gather(1, at))
    levels = torch.stack(starts, 1)
    for _ in range(iterations):
        mass, moment = sums.cells(levels)
        levels = torch.where(mass > 0, moment / mass, levels)
    best = sums.gain(levels).argmax(1)
    return levels[torch.arange(len(x), device=x.device), best]


def nearest(x_RK: Tensor, levels_RL: Tensor) -> Tensor:
    """Codes (R, K) of the nearest of each row's ascending levels; at a border the lower one."""
    levels = levels_RL.to(x_RK.dtype)
    return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, x_RK.contiguous(), out_int32=True)
