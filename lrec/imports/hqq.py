"""HQQ checkpoints in safetensors, as transformers and hqq's `save_to_safetensors` write them.

Weights are taken as rows of `group_size`, (R, group_size), and codes packed by putting blocks of rows into one word,
the first block in the highest bits:

W_q      uint8 (R / f, group_size) with f = 8 // bits, or int32 (ceil(R / 10), group_size) for 3 bits, ten to a word;
         floats with the same bytes if view_as_float
scale    (R, 1), zero (R, 1)    in compute_dtype; w = scale * (q - zero)
nbits, group_size, axis, shape, packing, view_as_float ...    numbers, and text as bytes

Grouped along axis 1 these rows are runs of a row of the weight: our groups. hqq itself computes w in compute_dtype and
so rounds it once more than we do, who decode the same numbers in float32.
"""

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.formats.uniform import Uniform
from lrec.imports import Import, exact_scale

# hqq's packing -> bits of a field, fields in a word, and ours that holds it.
PACKINGS = {
    "8bit_u8": (8, 1, 8),
    "4bit_u8": (4, 2, 4),
    "3bit_32": (3, 10, 3),
    "2bit_u8": (2, 4, 2),
    "1bit_u8": (1, 8, 2),  # the narrowest there is
}


class Hqq(Import):
    """Uniform integers with float zero points."""

    mark = "W_q"

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """See `Import.read`."""
        packing, (N, K) = bytes(tensors["packing"].tolist()).decode(), tensors["shape"].tolist()
        axis, group_size = int(tensors["axis"]), int(tensors["group_size"])
        if packing not in PACKINGS:
            raise ValueError(f"hqq's packing {packing!r} is unknown; allowed: {', '.join(PACKINGS)}")
        if axis != 1:
            raise ValueError(
                f"its groups run along axis {axis}, across rows, and lrec's along each row: quantize it again with "
                "axis=1 (HqqConfig's default)"
            )
        if K % group_size:
            raise ValueError(f"groups of {group_size} run over the ends of rows of {K}, which no format of lrec holds")
        if any(int(tensors.get(key, 0)) for key in ("quant_scale", "quant_zero")):
            raise ValueError("its scales or zero points are quantized again, which hqq itself has given up")
        scale, zero = tensors["zero_scale"].flip(0) if "zero_scale" in tensors else (tensors["scale"], tensors["zero"])
        codes_NK = codes(tensors["W_q"], packing, N * K // group_size).view(N, K)
        if scale.numel() * group_size != N * K:
            raise ValueError(f"{scale.numel()} scales for {N * K} weights in groups of {group_size}")
        grids = (exact_scale(t.reshape(N, -1)) for t in (scale, zero))
        return Uniform.pack(codes_NK, *grids, PACKINGS[packing][2], group_size)


def codes(words: Tensor, packing: str, num_rows: int) -> Tensor:
    """The codes of the packed rows, uint8 (num_rows, group_size)."""
    bits, fields, _ = PACKINGS[packing]
    if words.is_floating_point():
        words = words.view(torch.int32 if packing == "3bit_32" else torch.uint8)
    shifts = range(bits * (fields - 1), -1, -bits)
    return torch.cat([(words >> shift & 2**bits - 1).to(torch.uint8) for shift in shifts])[:num_rows]
