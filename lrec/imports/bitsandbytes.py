"""bitsandbytes 4-bit checkpoints (NF4 and FP4, with and without double quantization), as transformers saves them.

weight                     uint8 (N * K / 2, 1)    two codes of the flattened weight, the first in the high half
weight.absmax              float32, or uint8 codes if nested: the scale of each block
weight.quant_map           float32 (16,)           the levels
weight.nested_absmax, weight.nested_quant_map      scales of blocks of scales, and their 256 levels
weight.quant_state.*       JSON in bytes: shape, blocksize, nested_offset ...
"""

import json

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.formats.codebook import SCALES_PER_SCALE, Codebook, dynamic_levels
from lrec.imports import Import


class Bitsandbytes(Import):
    """A codebook of 16 levels with blockwise scales."""

    mark = "weight.absmax"

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """See `Import.read`."""
        key = next((key for key in tensors if key.startswith("weight.quant_state.")), None)
        if key is None:
            raise ValueError("there is no quant_state; allowed: 4-bit checkpoints that transformers saved")
        state = json.loads(bytes(tensors[key].tolist()))
        N, K = state["shape"]
        data = tensors["weight"].flatten()
        codes_NK = torch.stack([data >> 4, data & 15], -1).flatten()[: N * K].view(N, K)
        scale = scales(tensors, state)
        return Codebook.pack(codes_NK, tensors["weight.quant_map"], scale=scale, block_size=state["blocksize"])


def scales(tensors: dict[str, Tensor], state: dict) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The scales as `Codebook.pack` takes them: nested ones as they are if lrec nests alike, else decoded."""
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return absmax.float()
    levels, outer = tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"]
    offset, size = torch.tensor([state["nested_offset"]]), state["nested_blocksize"]
    if size == SCALES_PER_SCALE and torch.equal(levels, torch.tensor(dynamic_levels())):
        return absmax, outer, offset
    return levels[absmax.long()] * outer.repeat_interleave(size)[: len(absmax)] + offset
