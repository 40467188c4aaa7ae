"""Codebooks: w = scale * table[code], with 4, 8 or 16 levels that need not be evenly spaced.

A table serves the whole weight (NormalFloat, FP4), one row (SqueezeLLM) or one group of columns. Blockwise scales, if
there are any, run over the flattened weight as in bitsandbytes, so that a block may cross the end of a row when K is
no multiple of it; they are floats, or 8-bit codes that are themselves scaled in blocks of 256 (double quantization,
QLoRA section 3).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats import FLOATS, INT32, Layout, Packed, pack_codes, unpack_codes, words

WIDTHS = (2, 3, 4)
SCALES_PER_SCALE = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebook(Packed):
    """w_NK[n, k] = scale[(n * K + k) // block_size] * table[n, k // group_size, q_NK[n, k]].

    With `scale_scale` the scale of block b is scale_scale[b // 256] * dynamic_levels()[scale[b]] + scale_offset.

    qweight:      int32 (N, ceil(K/32) * bits), codes in the order of `pack_codes`.
    table:        float (2^bits), (N, 2^bits), or (N, G, 2^bits) with G = ceil(K / group_size).
    scale:        None: 1; float (B,) or uint8 (B,) with B = ceil(N * K / block_size).
    scale_scale:  float32 (ceil(B / 256),), where scale is uint8.
    scale_offset: float32 (1,), where scale is uint8.
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("table", "scale")}

    bits: int
    group_size: int
    block_size: int
    qweight: Tensor
    table: Tensor
    scale: Tensor | None = None
    scale_scale: Tensor | None = None
    scale_offset: Tensor | None = None

    @classmethod
    def pack(
        cls,
        codes_NK: Tensor,
        table: Tensor,
        *,
        group_size: int = 0,
        scale: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,
        block_size: int = 0,
    ) -> "Codebook":
        """Packs codes; a scale in three parts is (codes, scales of scales, offset) as `double_quantize` returns it.

        `group_size` 0 is the whole row, `block_size` 0 the whole weight. Raises ValueError when the table has not 4,
        8 or 16 levels or a shape does not fit.
        """
        N, K = codes_NK.shape
        group_size, block_size = group_size or K, block_size or N * K
        bits = table.shape[-1].bit_length() - 1
        if bits not in WIDTHS or table.shape[-1] != 2**bits:
            raise ValueError(f"a table has {table.shape[-1]} levels; allowed: 4, 8, 16; pad it by repeating a level")
        shapes = [(2**bits,), (N, 2**bits), (N, -(-K // group_size), 2**bits)]
        if tuple(table.shape) not in shapes:
            raise ValueError(f"the table has shape {tuple(table.shape)}; a ({N}, {K}) weight takes one of {shapes}")
        parts = scale if isinstance(scale, tuple) else (scale, None, None)
        blocks = -(-N * K // block_size)
        if parts[0] is not None and parts[0].shape != (blocks,):
            raise ValueError(f"scale has shape {tuple(parts[0].shape)}; blocks of {block_size} need ({blocks},)")
        return cls(
            shape=(N, K),
            bits=bits,
            group_size=group_size,
            block_size=block_size,
            qweight=pack_codes(codes_NK, bits),
            table=table,
            scale=parts[0],
            scale_scale=parts[1],
            scale_offset=parts[2],
        )

    def layout(self) -> Layout:
        """See `Packed.layout`."""
        (N, K), bits = self.shape, self.bits
        if bits not in WIDTHS or self.group_size < 1 or self.block_size < 1:
            raise ValueError(f"{bits} bits, groups of {self.group_size}, blocks of {self.block_size}: no such codebook")
        L, blocks = 2**bits, -(-N * K // self.block_size)
        nested = self.scale is not None and self.scale.dtype == torch.uint8
        if (self.scale_scale is not None, self.scale_offset is not None) != (nested, nested):
            raise ValueError("scales of 8 bits come with scale_scale and scale_offset, others without")
        return {
            "qweight": [(INT32, (N, words(K, bits)))],
            "table": [(FLOATS, shape) for shape in ((L,), (N, L), (N, -(-K // self.group_size), L))],
            "scale": [((*FLOATS, torch.uint8), (blocks,))],
            "scale_scale": [(FLOATS, (-(-blocks // SCALES_PER_SCALE),))],
            "scale_offset": [(FLOATS, (1,))],
        }

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equation above."""
        codes = unpack_codes(self.qweight[rows], self.bits, self.shape[1])
        w = self._levels(codes, rows)
        return w if self.scale is None else w * self.scales(rows)

    def scales(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K): the scale of each weight of these rows, 1 where none is stored."""
        start, stop, _ = rows.indices(self.shape[0])
        n, K = max(0, stop - start), self.shape[1]
        if self.scale is None:
            return self.table.new_ones(n, K, dtype=torch.float32)
        first, last = start * K // self.block_size, -(-(start + n) * K // self.block_size)
        blocks = self.block_scales()[first:last]
        if K % self.block_size == 0:
            return blocks[:, None].expand(-1, self.block_size).reshape(n, K)
        skip = start * K - first * self.block_size
        return blocks.repeat_interleave(self.block_size)[skip : skip + n * K].view(n, K)

    def block_scales(self) -> Tensor:
        """float32 (B,): the scale of each block of the flattened weight."""
        assert self.scale is not None
        if self.scale_scale is None:
            return self.scale.float()
        levels = torch.tensor(dynamic_levels(), device=self.scale.device)[self.scale.int()]
        return levels * self.scale_scale.repeat_interleave(SCALES_PER_SCALE)[: len(levels)] + self.scale_offset

    def _levels(self, codes: Tensor, rows: slice) -> Tensor:
        n, K = codes.shape
        shared = self.table.dim() == 1
        table = self.table.float().expand(n, -1) if shared else self.table[rows].float()
        if table.dim() == 2:
            return table.gather(1, codes.long())
        G = table.shape[1]
        grouped = torch.nn.functional.pad(codes, (0, G * self.group_size - K)).view(n, G, self.group_size)
        return table.gather(2, grouped.long()).flatten(1)[:, :K]


@lru_cache
def dynamic_levels() -> tuple[float, ...]:
    """The 256 sorted levels of the signed dynamic 8-bit type (Dettmers et al., arXiv 1511.04561 and 2110.02861).

    Seven decades; decade i has 2^i levels of either sign, the midpoints of an even division of [0.1, 1] * 10^(i - 6);
    and 0 and 1.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        magnitudes = (10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        levels += magnitudes + [-m for m in magnitudes]
    return tuple(sorted(levels))
