"""From a weight and the statistics of its inputs to a packed weight.

A quantizer is one frozen dataclass in one file of this folder: its fields are its settings, `needs` names the
statistics it wants, and `quantize` is a pure function of tensors (no model, no device, no printing). What quantizers
of the uniform format share stands here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec import registry
from lrec.formats import Packed, uniform
from lrec.formats.uniform import Uniform
from lrec.grid import find_grid
from lrec.options import setting
from lrec.statistics import Statistics


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockView:
    """A whole decoder block as the second stage of a quantizer sees it, over the windows of the calibration text.

    weights: the full weight (N, K) of each linear, by its name inside the block.
    targets: for each window, the full-precision model's hidden states (1, L, H) after this block.
    run:     `run(weights, i)` is the output (1, L, H) of the block, with these weights in place of its linears', on the
             hidden states that the quantized model so far has for window i; differentiable in the weights.
    """

    weights: dict[str, Tensor]
    targets: Sequence[Tensor]
    run: Callable[[dict[str, Tensor], int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Settings of a quantizer; calling it with a weight returns the packed weight."""

    needs: ClassVar[frozenset[str]] = frozenset()

    bits: int = setting(2, "bits per code")

    def __call__(self, w_NK: Tensor, statistics: Statistics | None = None) -> Packed:
        """The packed weight of `w_NK`, on its device; computed in float32, or in float64 for a float64 weight.

        Raises ValueError if the weight is not a finite matrix, lacks the statistics that `needs` names, or is
        refused by the method.
        """
        if w_NK.ndim != 2 or not w_NK.numel():
            raise ValueError(f"the weight has shape {tuple(w_NK.shape)}; quantizers take a matrix (N out, K in)")
        bad = int((~w_NK.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{bad} of {w_NK.numel()} weights are NaN or infinite; only finite weights can be quantized: "
                "check the checkpoint they come from"
            )
        self._check_statistics(w_NK.shape[1], statistics)
        wide = w_NK.dtype if w_NK.dtype == torch.float64 else torch.float32
        return self.quantize(w_NK.detach().to(wide), statistics)

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Packed:
        """What a method defines: finite float32 or float64 weights and the statistics it needs to a packed weight."""
        raise NotImplementedError

    def measure(self, packed: Packed, w_NK: Tensor) -> dict[str, float]:
        """What the report says of a layer beside its error: nothing, unless a method has something of its own."""
        return {}

    @property
    def refines(self) -> bool:
        """Whether `refine` is to be called; then the pass carries the full-precision model's hidden states too."""
        return False

    def refine(self, packed: dict[str, Packed], view: BlockView) -> tuple[dict[str, Packed], list[float]]:
        """What a method with a second stage defines: the block's layers quantized anew from what `quantize` made of
        each, under the same names, and the history of the loss for the report. Its inputs are not changed."""
        raise NotImplementedError

    def _check_statistics(self, K: int, statistics: Statistics | None) -> None:
        for need in sorted(self.needs):
            name = {"hessian": "hessian_KK", "maxima": "maxima_K", "cross": "cross_KK"}[need]
            held = getattr(statistics, name, None)
            if held is None:
                raise ValueError(
                    f"{type(self).__name__} needs the {need} of the layer's inputs, but none was given; "
                    "collect it over calibration tokens with lrec.statistics.Collector"
                )
            if held.shape[0] != K:
                raise ValueError(f"the {need} is of {held.shape[0]} input channels, but the weight has {K}")


Base = Quantizer


def quantize_layer(layer: str, w_NK: Tensor, quantizer: Quantizer, statistics: Statistics | None) -> Packed:
    """The packed weight; what the quantizer refuses is raised again with the layer's name before it."""
    try:
        return quantizer(w_NK, statistics)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class UniformQuantizer(Quantizer):
    """What quantizers to the `uniform` format share: the shape of the grid, and how its steps are chosen."""

    bits: int = setting(2, f"bits per code: {', '.join(map(str, uniform.WIDTHS))}")
    group_size: int = setting(64, "columns that share a scale and zero, 16 or more; 0 for the whole row")
    per_tensor: bool = setting(False, "one scale and zero for the whole matrix (with group_size 0)")
    symmetric: bool = setting(False, "fix the zero point at the middle code 2^(bits-1) and store none")
    zero_point: str = setting("int", "how zero points are stored: int (in `bits` bits) or float (fp16)")
    scale_search: str = setting("mse", "how scales are chosen: minmax (full range) or mse (search of a clipped range)")
    scale_bits: int = setting(16, "bits of a scale and of a float zero: 16 (fp16) or 8 (E3M5 and fixed point)")

    def __post_init__(self):
        if self.bits not in uniform.WIDTHS:
            raise ValueError(f"bits = {self.bits} is not offered; allowed: {', '.join(map(str, uniform.WIDTHS))}")
        if self.zero_point not in ("int", "float"):
            raise ValueError(registry.nearest(self.zero_point, ("int", "float"), "zero_point"))
        if self.scale_search not in ("minmax", "mse"):
            raise ValueError(registry.nearest(self.scale_search, ("minmax", "mse"), "scale_search"))
        if self.scale_bits not in uniform.SCALE_WIDTHS:
            raise ValueError(f"scale_bits = {self.scale_bits} is not offered; allowed: 8, 16")
        if self.per_tensor and self.group_size:
            raise ValueError(f"per_tensor has no groups; give group_size 0 with it, not {self.group_size}")
        if self.symmetric and self.zero_point == "float":
            raise ValueError("a symmetric grid stores no zero point, so it cannot be float; leave out one of the two")

    def grid(self, w_NK: Tensor, weight_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`find_grid` by these settings; one for all rows if `per_tensor`. Raises ValueError if the group size does not
        fit K."""
        N, K = w_NK.shape
        group_size = self.group_size or K
        uniform.check(self.bits, group_size, K)
        zero_point = "middle" if self.symmetric else self.zero_point
        how = (zero_point, weight_K, self.scale_search, self.scale_bits)
        if not self.per_tensor:
            return find_grid(w_NK, self.bits, group_size, *how)
        how = (zero_point, None if weight_K is None else weight_K.repeat(N), *how[2:])
        scale, zero = find_grid(w_NK.reshape(1, -1), self.bits, N * K, *how)
        return scale.repeat(N, 1), zero.repeat(N, 1)

    def pack(self, codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Uniform:
        """The packed weight of codes on a grid that `grid` returned."""
        zero_NG = zero_NG.byte() if self.zero_point == "int" else zero_NG
        zero_NG = None if self.symmetric else zero_NG
        return Uniform.pack(codes_NK, scale_NG, zero_NG, self.bits, self.group_size, self.scale_bits)
