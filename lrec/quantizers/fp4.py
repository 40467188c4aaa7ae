"""FP4 as in bitsandbytes: a sign, two exponent bits and one mantissa bit, scaled by the blocks' largest weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrec.quantizers.nf4 import Nf4


@dataclass(frozen=True, kw_only=True)
class Fp4(Nf4):
    """The nearest of 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives, times the largest |w| of each block."""

    def levels(self) -> Tensor:
        """The table in the order of bit patterns, float32 (16,): bit 3 is the sign."""
        magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
        return torch.cat([magnitudes, -magnitudes]) / 12
