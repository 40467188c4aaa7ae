"""Blocks of ggml that hold our uniform integers: each is a run of 32 or 64 columns of a row with a float16 step d.

    name   size  bytes  weights                     layout after d
    q2_0    64    18    (code - 1) * d              16 bytes, four codes each, lowest bits first
    q4_0    32    18    (code - 8) * d              16 bytes: code j in the low, j + 16 in the high half of byte j
    q4_1    32    20    code * d + m                float16 m, then as q4_0
    q5_0    32    22    (code - 16) * d             int32 of each code's fifth bit, then as q4_0
    q8_0    32    34    code * d                    32 signed bytes

Ours are scale * (q - zero) with an integer zero, so what a block must hold is the level q - zero and the scale, and all
but q4_1 hold both exactly; q4_1's minimum, -zero * scale, is rounded to float16.
"""

from dataclasses import dataclass

import numpy as np
import torch

from lrec.formats.binary import Binary
from lrec.formats.uniform import Uniform


@dataclass(frozen=True)
class Block:
    """A ggml type: its id in files, columns and bytes in a block, and the `general.file_type` of models made of it."""

    id: int
    size: int
    bytes: int
    file_type: int


# Q2_0 came after gguf 0.19, the newest package there is: it has no name for type 42 and file type 41.
BLOCKS = {
    "q2_0": Block(42, 64, 18, 41),
    "q4_0": Block(2, 32, 18, 2),
    "q4_1": Block(3, 32, 20, 3),
    "q5_0": Block(6, 32, 22, 8),
    "q8_0": Block(8, 32, 34, 7),
}


def teach_q2_0() -> None:
    """Lets readers built on the gguf package, transformers' among them, pass over tensors of a type it has no name for.

    Does nothing for a gguf that knows it.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block = BLOCKS["q2_0"]
    if block.id not in GGMLQuantizationType._value2member_map_:
        kind = int.__new__(GGMLQuantizationType, block.id)
        kind._name_, kind._value_ = "Q2_0", block.id
        GGMLQuantizationType._value2member_map_[block.id] = kind
        GGML_QUANT_SIZES[kind] = (block.size, block.bytes)


def container(spec: dict, asymmetric: str) -> str | None:
    """The smallest block that holds a uniform layer of this spec, `asymmetric` being that of 4 bits with zero points.

    None if there is none: no block has room for 8-bit codes with zero points, or for groups that end inside a block.
    """
    bits, symmetric = spec["bits"], "zero" not in spec["tensors"]

    def fits(size: int) -> bool:
        K, group_size = spec["shape"][1], spec["group_size"]
        return K % size == 0 and (group_size % size == 0 or group_size == K)

    if bits == 2 and symmetric and fits(64):
        return "q2_0"
    if not fits(32) or (bits == 8 and not symmetric):
        return None
    # Levels of 2 and 3 bits lie in -7 .. 7 wherever the zero point is.
    return {2: "q4_0", 3: "q4_0", 4: "q4_0" if symmetric else asymmetric, 8: "q8_0"}[bits]


def encode(packed: Uniform, name: str) -> np.ndarray:
    """The rows of a layer as blocks, uint8 (N, K / size * bytes); the layer is one that `container` gave this name."""
    N, K = packed.shape
    size = BLOCKS[name].size
    group = torch.arange(0, K, size) // packed.group_size
    scale, zero = (grid[:, group].numpy()[..., None] for grid in (packed.scales().half(), packed.zeros()))
    codes = packed.codes().numpy().astype(np.int16).reshape(N, -1, size)
    levels = codes - zero.astype(np.int16)
    if name == "q2_0":
        # Levels are -2 .. 1 and the block has -1 .. 2, so that both signs turn round.
        fields = (1 - levels).astype(np.uint8).reshape(N, -1, 16, 4)
        parts = [-scale, np.bitwise_or.reduce(fields << np.arange(0, 8, 2, dtype=np.uint8), axis=-1)]
    elif name == "q4_0":
        parts = [scale, halves(levels + 8)]
    elif name == "q4_1":
        parts = [scale, (-zero * scale.astype(np.float32)).astype(np.float16), halves(codes)]
    elif name == "q5_0":
        fifth = ((levels + 16) >> 4).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        parts = [scale, np.bitwise_or.reduce(fifth, axis=-1, keepdims=True), halves((levels + 16) & 15)]
    else:
        parts = [scale, levels.astype(np.int8)]
    rows = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=-1)
    return rows.reshape(N, -1)


def decode(rows: np.ndarray, name: str) -> Uniform | Binary:
    """The weight that rows of blocks hold, uint8 (N, bytes), bit for bit; `name` is q2_0, q4_0, q4_1 or q8_0.

    Raises ValueError for blocks of q4_1 whose step and minimum are too far apart for that.
    """
    if name == "q4_1":
        return decode_q4_1(rows)
    block = BLOCKS[name]
    parts = rows.reshape(len(rows), -1, block.bytes)
    scale = np.ascontiguousarray(parts[..., :2]).view(np.float16)[..., 0]
    data = parts[..., 2:]
    if name == "q2_0":
        # As in `encode`: levels and step turn round.
        fields = data[..., None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
        codes, scale, bits = 3 - fields, -scale, 2
    elif name == "q4_0":
        codes, bits = np.concatenate([data & 15, data >> 4], -1), 4
    else:
        codes, bits = data ^ 128, 8
    codes_NK, scale_NG = (torch.from_numpy(np.ascontiguousarray(t)) for t in (codes.reshape(len(rows), -1), scale))
    return Uniform.pack(codes_NK, scale_NG, None, bits, block.size)


def decode_q4_1(rows: np.ndarray) -> Binary:
    """The weight of rows of q4_1: code * d + m is (m + 7.5 d) + sum_p +-d 2^(p-1), every sum of which float32 holds.

    As a uniform grid its zero point, -m / d, would have to be rounded.
    """
    parts = rows.reshape(len(rows), -1, BLOCKS["q4_1"].bytes)
    d_NG, m_NG = torch.from_numpy(np.ascontiguousarray(parts[..., :4]).view(np.float16).astype(np.float32)).unbind(-1)
    data = torch.from_numpy(np.ascontiguousarray(parts[..., 4:]))
    codes_NGC = torch.cat([data & 15, data >> 4], -1)
    alpha_NGP = d_NG[..., None] * torch.tensor([0.5, 1, 2, 4])
    held = alpha_NGP.half() if torch.equal(alpha_NGP.half().float(), alpha_NGP) else alpha_NGP
    packed = Binary.pack(codes_NGC.flatten(1), held, m_NG + 7.5 * d_NG, BLOCKS["q4_1"].size)
    if not torch.equal(packed.unpack(), (codes_NGC * d_NG[..., None] + m_NG[..., None]).flatten(1)):
        raise ValueError(
            "some blocks of q4_1 have a minimum so far from their step that float32 does not hold the sums"
        )
    return packed


def halves(codes: np.ndarray) -> np.ndarray:
    """32 codes of 4 bits as 16 bytes, along the last axis."""
    return (codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8)


def encode_q8_0(w_NK: torch.Tensor) -> np.ndarray:
    """A dense weight rounded to q8_0, d = max |w| / 127 of each block, uint8 (N, K / 32 * 34)."""
    blocks = w_NK.float().numpy().reshape(len(w_NK), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    levels = np.rint(blocks * np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), levels.view(np.uint8)], -1).reshape(len(w_NK), -1)
