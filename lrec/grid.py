"""The grid of evenly spaced levels that fits a group of weights best: its scale and zero, as they are stored."""

import torch
from torch import Tensor

from lrec import eight_bits

# What the mse search tries, in this order: clip ratios (the full range first, so that it wins a tie), zero points
# shifted by that many steps either way, and rounds of refitting the scale (and a float zero) to the codes.
CLIP_RATIOS = tuple(1 - 0.09 * i for i in range(8))
ZERO_SHIFTS = {"middle": (), "int": (1, -1), "float": (0.25, -0.25)}
REFITS = 3
# Rows are searched in slices of about this many weights, so that the trials stay inside the cache.
SLICE_WEIGHTS = 2**17
# A float zero beyond this many steps would lose its fraction in fp16 (8 bits hold fewer still). Groups so narrow and
# so far from zero that the min-max grid came to half of it get the range from zero on instead, as with an integer zero.
ZERO_LIMIT = 2048


def encode(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, clamp(round(w / scale + zero), 0, 2^bits - 1), as floats of w's dtype."""
    return torch.addcdiv(zero, w, scale).round_().clamp_(0, 2**bits - 1)


def per_column(grid_NG: Tensor, K: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """A grid's scales or zeros spread over the columns, (N, K) in `dtype`."""
    return grid_NG.to(dtype).repeat_interleave(group_size or K, 1)[:, :K]


def find_grid(
    w_NK: Tensor,
    bits: int,
    group_size: int,
    zero_point: str,
    weight_K: Tensor | None = None,
    search: str = "mse",
    scale_bits: int = 16,
) -> tuple[Tensor, Tensor]:
    """scale_NG and zero_NG, both float16, exactly as they are stored, of the grid scale * (code - zero) of each group.

    `zero_point` is "middle" (2^(bits-1)), "int" (0 to 2^bits - 1) or "float". With search "minmax" the grid spans the
    group's range (and zero, unless float); "mse" minimises, from there on,
        sum over the group's columns k of weight_K[k] * (w - scale * (encode(w) - zero))^2,
    weight_K being ones if not given; every trial is scored with the rounded values that are stored, so the result is
    never worse than minmax by that sum. A group of zeros decodes to exact zeros. With `scale_bits` 8 scales and float
    zeros are those that `Uniform` holds in 8 bits; 32 rows share an exponent, that of their widest min-max grid.

    Raises ValueError if a scale exceeds fp16.
    """
    N, K = w_NK.shape
    pad = -K % group_size
    if weight_K is None:
        weight_K = w_NK.new_ones(K)
    # A short last group is filled up with columns that neither widen its range nor weigh anything.
    weight_GC = torch.nn.functional.pad(weight_K.to(w_NK), (0, pad)).view(-1, group_size)
    step = max(1, SLICE_WEIGHTS // K)
    if scale_bits == 8:
        step = -(-step // eight_bits.RUN) * eight_bits.RUN
    found = []
    for rows_NK in w_NK.split(step):
        w_NGC = torch.cat([rows_NK, rows_NK[:, -1:].expand(-1, pad)], 1).view(-1, *weight_GC.shape)
        trial = _Search(w_NGC, weight_GC, bits, zero_point, scale_bits)
        if search == "mse":
            trial.improve()
        found.append((trial.scale_NG, trial.zero_NG))
    scale_NG, zero_NG = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not scale_NG.isfinite().all():
        raise ValueError(
            f"weights reach {float(w_NK.abs().max()):.3g}, which needs a scale beyond fp16 (65504); "
            "weights of that size are not those of a trained model: check the checkpoint"
        )
    return scale_NG.half(), zero_NG.half()


class _Search:
    """The best grid found so far for each group of some rows; starts as the min-max grid."""

    def __init__(self, w_NGC: Tensor, weight_GC: Tensor, bits: int, zero_point: str, scale_bits: int):
        self.w_NGC, self.weight_GC, self.bits, self.zero_point = w_NGC, weight_GC, bits, zero_point
        low, high = w_NGC.aminmax(dim=2)
        last = 2**bits - 1
        limit = ZERO_LIMIT // 2 if scale_bits == 16 else 1.25 * 2**bits
        far = (high - low) * limit < torch.maximum(high, -low) * last
        with_zero = far if zero_point == "float" else torch.ones_like(far)
        low = torch.where(with_zero, low.clamp(max=0), low)
        high = torch.where(with_zero, high.clamp(min=0), high)
        unit = 1.0
        self.exponent_R = None
        if scale_bits == 8:
            self.exponent_R = eight_bits.exponents(self._widest(low, high))
            unit = eight_bits.power_of_two(eight_bits.per_row(self.exponent_R, len(low))).to(low)
        # Only a group of zeros has no range now; any range from zero up keeps its zeros exact.
        high = torch.where(low == high, last * unit, high)
        self.widest_NG = self._widest(low, high)
        self.low_NG, self.center_NG = low, (low + high) / 2
        self.scale_NG, self.zero_NG = self._stored(self.widest_NG, self._zero(self.widest_NG))
        self.error_NG = self._error(self.scale_NG, self.zero_NG)

    def _widest(self, low_NG: Tensor, high_NG: Tensor) -> Tensor:
        last, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        if self.zero_point == "middle":
            return torch.maximum(high_NG / (last - middle), -low_NG / middle)
        return (high_NG - low_NG) / last

    def improve(self) -> None:
        """Tries the clip ratios, the zero shifts and the refits."""
        for ratio in CLIP_RATIOS[1:]:
            scale = self.widest_NG * ratio
            self._offer(scale, self._zero(scale))
        for shift in ZERO_SHIFTS[self.zero_point]:
            self._offer(self.scale_NG, self.zero_NG + shift)
        for _ in range(REFITS):
            self._offer(*self._refit())

    def _zero(self, scale_NG: Tensor) -> Tensor:
        # A float zero keeps the clipped range centred; an integer one stays where the full range puts it.
        if self.zero_point == "middle":
            return torch.full_like(scale_NG, 2 ** (self.bits - 1))
        if self.zero_point == "int":
            return -self.low_NG / self.widest_NG
        return (2**self.bits - 1) / 2 - self.center_NG / scale_NG

    def _stored(self, scale_NG: Tensor, zero_NG: Tensor) -> tuple[Tensor, Tensor]:
        scale_NG = self._stored_scale(scale_NG)
        if self.zero_point != "float":
            return scale_NG, zero_NG.round().clamp_(0, 2**self.bits - 1)
        if self.exponent_R is not None:
            return scale_NG, eight_bits.round_zeros(zero_NG, self.bits)
        return scale_NG, zero_NG.clamp(-ZERO_LIMIT, ZERO_LIMIT).half().to(scale_NG)

    def _stored_scale(self, scale_NG: Tensor) -> Tensor:
        if self.exponent_R is not None:
            scale_NG = eight_bits.round_scales(scale_NG, self.exponent_R)
        # 2^-24 is fp16's smallest positive number.
        return scale_NG.half().to(scale_NG).clamp_(min=2**-24)

    def _error(self, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        scale, zero = scale_NG[..., None], zero_NG[..., None]
        miss = encode(self.w_NGC, scale, zero, self.bits).sub_(zero).mul_(scale).sub_(self.w_NGC)
        return miss.square_().mul_(self.weight_GC).sum(2)

    def _offer(self, scale_NG: Tensor, zero_NG: Tensor) -> None:
        scale_NG, zero_NG = self._stored(scale_NG, zero_NG)
        error_NG = self._error(scale_NG, zero_NG)
        better = error_NG < self.error_NG
        for name, value in (("error_NG", error_NG), ("scale_NG", scale_NG), ("zero_NG", zero_NG)):
            setattr(self, name, torch.where(better, value, getattr(self, name)))

    def _refit(self) -> tuple[Tensor, Tensor]:
        """The weighted least-squares scale (and zero, if float) for the codes of the best grid so far."""
        q_NGC = encode(self.w_NGC, self.scale_NG[..., None], self.zero_NG[..., None], self.bits)
        total = self.weight_GC.sum(1)
        if self.zero_point == "float":
            q_mean = (q_NGC * self.weight_GC).sum(2) / total
            w_mean = (self.w_NGC * self.weight_GC).sum(2) / total
        else:
            q_mean, w_mean = self.zero_NG, torch.zeros_like(self.zero_NG)
        q_NGC -= q_mean[..., None]
        weighted = q_NGC * self.weight_GC
        scale_NG = (weighted * (self.w_NGC - w_mean[..., None])).sum(2) / (weighted * q_NGC).sum(2)
        # A group whose codes are all one, or whose weights are all zero, has no fit and keeps its grid.
        scale_NG = torch.where((scale_NG > 0) & scale_NG.isfinite(), scale_NG, self.scale_NG)
        scale_NG = self._stored_scale(scale_NG)
        if self.zero_point != "float":
            return scale_NG, self.zero_NG
        zero_NG = q_mean - w_mean / scale_NG
        return scale_NG, torch.where(zero_NG.isfinite(), zero_NG, self.zero_NG)
