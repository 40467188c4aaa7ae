"""Ternary weights {-1, 0, 1} * scale (arXiv 1605.04711), with the scale that is best in each group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrec.formats.ternary import Ternary as PackedTernary
from lrec.quantizers import Quantizer, setting
from lrec.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Ternary(Quantizer):
    """min over scale and t of sum_k (w[n, k] - scale[n, g] * t[n, k])^2, exactly.

    For a given scale, t is nonzero where |w| > scale / 2: always the largest |w|. With the m largest kept, the best
    scale is their mean and the gain (sum |w|)^2 / m, so the best m is found by a sort.
    """

    bits: int = setting(2, "codes -1, 0, 1 fit 2 bits and are stored in 1.6; this method has one width")
    group_size: int = setting(128, "columns that share a scale, 16 or more (a shorter row is one group); 0: the row")

    def __post_init__(self):
        if self.bits != 2:
            raise ValueError(f"ternary has the codes -1, 0, 1, not {self.bits} bits; leave bits out")
        if self.group_size < 0 or 0 < self.group_size < 16:
            raise ValueError(
                f"group_size = {self.group_size} is too small; allowed: 16 or more, or 0 for the whole row"
            )

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> PackedTernary:
        """The best scale of each group in fp16, and the nearest of its three values for every weight."""
        N, K = w_NK.shape
        g = min(self.group_size, K) or K
        # Padding is zeros, which come last in the sort and never raise a gain.
        x = torch.nn.functional.pad(w_NK, (0, -K % g)).view(N, -1, g)
        largest = x.abs().double().sort(-1, descending=True).values.cumsum(-1)
        kept = torch.arange(1, g + 1, device=x.device)
        best = (largest.square() / kept).argmax(-1, keepdim=True)
        scale = (largest.gather(-1, best) / kept[best]).half()
        trits = x.sign() * (x.abs() > scale.to(x.dtype) / 2)
        return PackedTernary.pack(trits.flatten(1)[:, :K].to(torch.int8), scale[..., 0], g)
