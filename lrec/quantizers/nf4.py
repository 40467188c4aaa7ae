"""NF4 (QLoRA, arXiv 2305.14314, section 3): quantiles of the normal distribution, scaled by the blocks' largest weight.

The values are those of bitsandbytes, bit for bit, with and without double quantization. What the other blockwise
codebooks (fp4, nf3, nf2) share stands here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrec.formats.codebook import SCALES_PER_SCALE, Codebook, dynamic_levels
from lrec.quantizers import Quantizer, setting
from lrec.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Nf4(Quantizer):
    """The nearest of 16 normal quantiles times the largest |w| of each block of the flattened weight."""

    bits: int = setting(4, "bits per code; this method has one width")
    block_size: int = setting(64, "consecutive weights that share a scale, 16 or more")
    double_quant: bool = setting(True, "store scales in 8 bits, scaled again in blocks of 256")

    def __post_init__(self):
        only = type(self).bits
        if self.bits != only:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} has {only} bits, not {self.bits}; leave bits out, or choose another quantizer")
        if self.block_size < 16:
            raise ValueError(f"block_size = {self.block_size} is too small; allowed: 16 or more, 64 as a rule")

    def levels(self) -> Tensor:
        """The table, float32 (2^bits,), scaled so that its largest magnitude is 1."""
        return normal_levels(self.bits)

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Codebook:
        """The nearest level of every weight: scale[b] = max |w| in block b, table = `levels()`."""
        table = self.levels().to(w_NK.device)
        blocks = split(w_NK.float().flatten(), self.block_size)
        absmax = blocks.abs().amax(1)
        x = normalized(blocks, absmax)
        if w_NK.numel() % self.block_size:
            # bitsandbytes divides in a short last block where it multiplies by the inverse in others: ties differ.
            x[-1] = (blocks[-1] / absmax[-1].clamp_min(1e-38)).clamp(-1, 1)
        order = table.argsort(stable=True)
        nearest = order[torch.bucketize(x, midpoints(table[order]))]
        codes = nearest.flatten()[: w_NK.numel()].view(w_NK.shape)
        scale = double_quantize(absmax) if self.double_quant else absmax
        return Codebook.pack(codes, table, scale=scale, block_size=self.block_size)


def normal_levels(bits: int) -> Tensor:
    """NormalFloat's table, float32 (2^bits,) ascending: evenly spaced quantiles of either sign, and an exact zero.

    2^(bits-1) positive and one fewer negative quantiles, from 1 - delta inwards to 1/2, over the largest, with delta
    the mean of 1 / 2^(bits+1) and 1 / (2^(bits+1) - 2). bitsandbytes' NF4 has literals made so in single precision,
    of which some differ from these in the last place: for 4 bits they are taken.
    """
    if bits == 4:
        return torch.tensor(BITSANDBYTES_NF4)
    half, codes = 2 ** (bits - 1), 2**bits
    delta = (1 / (2 * codes) + 1 / (2 * codes - 2)) / 2
    positive = torch.linspace(1 - delta, 0.5, half + 1, dtype=torch.float64)[:-1]
    negative = torch.linspace(delta, 0.5, half, dtype=torch.float64)[:-1]
    levels = torch.special.ndtri(torch.cat([negative, torch.tensor([0.5], dtype=torch.float64), positive.flip(0)]))
    return (levels / levels.max()).float()


def split(flat: Tensor, block_size: int) -> Tensor:
    """A vector as rows of `block_size`, the last filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)


def normalized(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Rows over their largest magnitude, in [-1, 1]; a row of zeros stays zero."""
    return (blocks * (1 / absmax.clamp_min(1e-38))[:, None]).clamp(-1, 1)


def midpoints(levels: Tensor) -> Tensor:
    """The borders between ascending levels."""
    return (levels[1:] + levels[:-1]) / 2


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales as uint8 codes, the float32 scales of blocks of 256 of them, and the mean that was subtracted.

    On a CPU values are first rounded to 65536 even steps, as bitsandbytes' CPU kernel does (about one scale in 500
    then takes the neighbour of the nearest level); its CUDA kernel takes the nearest level, and so does this.
    """
    offset = absmax.mean()
    blocks = split(absmax - offset, SCALES_PER_SCALE)
    scale = blocks.abs().amax(1)
    x = normalized(blocks, scale)
    if x.device.type == "cpu":
        x = ((x + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    borders = midpoints(torch.tensor(dynamic_levels(), device=x.device))
    codes = torch.bucketize(x, borders).to(torch.uint8)
    return codes.flatten()[: len(absmax)], scale, offset.reshape(1)


# fmt: off
BITSANDBYTES_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
