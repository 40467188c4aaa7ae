"""ICQuant (arXiv 2505.00850): the few largest weights of each row have a quantizer of their own.

Leaving out about 5 % of a row halves the range of the rest, which is worth one bit per weight. Every weight keeps a
code in its natural place; which weights are outliers is said by a stream of gaps. Where positions are close to
uniform, gaps in symbols of b bits cost little more than the entropy:

    index bits per weight = gamma * b * (1 + 1 / (e^(gamma * (2^b - 1)) - 1)),   0.313 at gamma = 5 %, b = 6.

Real rows have regions that are rich in outliers (the heads of an attention output), which costs up to 4 % more. So the
columns of a row are visited in steps of `stride`, a number without a common factor with K, and not side by side.

The stream starts anew every `tile` weights of the flattened matrix, and `starts` says where: tiles decode in parallel,
each by one prefix sum, whatever K is. (Starts per row would cost 0.056 bits per weight at K = 576; these cost 0.002.)
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats import FLOATS, INT32, Layout, Packed, pack_codes, unpack_codes, words

WIDTHS = (2, 3, 4)
INDEX_BITS = (4, 5, 6, 7)
TILE = 16384


@dataclass(frozen=True, eq=False, kw_only=True)
class Outlier(Packed):
    """w_NK[n, k] = table_N2L[n, o_NK[n, k], q_NK[n, k]] with o = 1 for outliers, 0 for inliers, L = 2^bits.

    The table is stored, or spanned by `scale` and `base`. Then the top bit of an outlier's code is its sign, and the
    others its magnitude m:
        inlier   w = base[n, 0] + scale[n, 0] * q
        outlier  w = -(base[n, 1] + scale[n, 1] * m) if q < L / 2 else base[n, 1] + scale[n, 1] * m

    qweight: int32 (N, ceil(K/32) * bits), codes in the order of `pack_codes`.
    index:   int32, symbols of `index_bits` bits in the order of `pack_codes`, all tiles one after the other. A symbol
             v < 2^b - 1 says that the next outlier stands v + 1 weights on, 2^b - 1 moves on by 2^b - 1 without one.
             Weight i of the whole walk is that in row i // K and column (i % K) * stride % K.
    starts:  int32 (ceil(N * K / tile) + 1,): number of symbols before each tile, and of all.
    table:   float (N, 2, L), or None.
    scale, base: float (N, 2), or None.
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("table", "scale", "base")}

    bits: int
    index_bits: int
    tile: int
    stride: int
    qweight: Tensor
    index: Tensor
    starts: Tensor
    table: Tensor | None = None
    scale: Tensor | None = None
    base: Tensor | None = None

    @classmethod
    def pack(
        cls,
        codes_NK: Tensor,
        outlier_NK: Tensor,
        levels: Tensor | tuple[Tensor, Tensor],
        bits: int,
        index_bits: int,
        tile: int = TILE,
    ) -> "Outlier":
        """Packs codes and the positions where `outlier_NK` is true; `levels` is a table or (scale, base).

        Raises ValueError for a width that is not offered.
        """
        if bits not in WIDTHS:
            raise ValueError(f"bits = {bits} is no width of the outlier format; allowed: {WIDTHS}")
        if index_bits not in INDEX_BITS:
            raise ValueError(f"index_bits = {index_bits} is no width of an outlier index; allowed: {INDEX_BITS}")
        table, scale, base = (levels, None, None) if isinstance(levels, Tensor) else (None, *levels)
        K = codes_NK.shape[1]
        stride = golden_stride(K)
        walk_NK = outlier_NK[:, torch.arange(K, device=outlier_NK.device) * stride % K]
        index, starts = encode_positions(walk_NK, index_bits, tile)
        return cls(
            shape=tuple(codes_NK.shape),
            bits=bits,
            index_bits=index_bits,
            tile=tile,
            stride=stride,
            qweight=pack_codes(codes_NK, bits),
            index=index,
            starts=starts,
            table=table,
            scale=scale,
            base=base,
        )

    def layout(self) -> Layout:
        """See `Packed.layout`."""
        (N, K), L = self.shape, 2**self.bits
        told = {"bits": (self.bits, WIDTHS), "index_bits": (self.index_bits, INDEX_BITS)}
        if odd := [f"{name} = {value}" for name, (value, allowed) in told.items() if value not in allowed]:
            raise ValueError(f"{', '.join(odd)}: no such width of the outlier format")
        if self.tile < 1 or not 1 <= self.stride <= 2 * K or math.gcd(self.stride, K) != 1:
            raise ValueError(f"tile = {self.tile}, stride = {self.stride}: no walk through rows of {K}")
        if (self.scale is None, self.base is None) != (self.table is not None,) * 2:
            raise ValueError("levels are a table, or scale and base")
        levels = [(FLOATS, (N, 2))]
        return {
            "qweight": [(INT32, (N, words(K, self.bits)))],
            "index": [(INT32, tuple(self.index.shape))] if self.index.dim() == 1 else [(INT32, (-1,))],
            "starts": [(INT32, (-(-N * K // self.tile) + 1,))],
            "table": [(FLOATS, (N, 2, L))],
            "scale": levels,
            "base": levels,
        }

    def check_values(self) -> None:
        """See `Packed.check_values`."""
        held = len(self.index) // self.index_bits * 32
        starts = self.starts.long()
        if int(starts[0]) != 0 or int(starts[-1]) > held or bool((starts.diff() < 0).any()):
            raise ValueError(f"starts do not rise from 0 to at most the {held} symbols of the index")

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equations above."""
        codes = unpack_codes(self.qweight[rows], self.bits, self.shape[1])
        entry = codes + (self.outliers(rows) << self.bits)
        return self.levels(rows).flatten(1).gather(1, entry.long())

    def levels(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, 2, L): the values of inlier codes and of outlier codes."""
        if self.table is not None:
            return self.table[rows].float()
        scale, base = self.scale[rows].float()[:, :, None], self.base[rows].float()[:, :, None]
        return span(scale, base, self.bits)

    def outliers(self, rows: slice = slice(None)) -> Tensor:
        """uint8 (n, K): 1 where a weight is an outlier."""
        start, stop, _ = rows.indices(self.shape[0])
        spacing = [self.shape[1], self.index_bits, self.tile, self.stride]
        return outlier_mask(self.index, self.starts, start, max(start, stop), spacing)

    @property
    def index_bits_per_weight(self) -> float:
        """Stored bits that say where the outliers are, starts of tiles included, over the number of weights."""
        return 8 * sum(t.numel() * t.element_size() for t in (self.index, self.starts)) / math.prod(self.shape)


@torch.library.custom_op("lrec::outlier_mask", mutates_args=())
def outlier_mask(index: Tensor, starts: Tensor, start: int, stop: int, spacing: list[int]) -> Tensor:
    """uint8 (n, K): 1 where one of rows start to stop - 1 has an outlier; `spacing` is [K, index_bits, tile, stride].

    An op, since how many symbols those rows have is in the data, and fake tensors, on which memory is predicted, have
    none: of these it gives the shape.
    """
    K, index_bits, tile, stride = spacing
    n, (first, last) = stop - start, (start * K // tile, -(-stop * K // tile))
    flat = _positions(index, starts[first : last + 1].long(), index_bits, tile) + (first * tile - start * K)
    flat = flat[(flat >= 0) & (flat < n * K)]
    mask = torch.zeros(n, K, dtype=torch.uint8, device=index.device)
    mask[flat // K, flat % K * stride % K] = 1
    return mask


@outlier_mask.register_fake
def _(index: Tensor, starts: Tensor, start: int, stop: int, spacing: list[int]) -> Tensor:
    return index.new_empty((stop - start, spacing[0]), dtype=torch.uint8)


def _positions(index: Tensor, starts: Tensor, index_bits: int, tile: int) -> Tensor:
    """Places of the outliers, ascending, in the part of the walk whose tiles begin at the symbols `starts` (the last
    entry is where they end), counted from its own first weight."""
    begin, end = int(starts[0]), int(starts[-1])
    run = begin // 32
    words = index[run * index_bits : -(-end // 32) * index_bits]
    symbols = unpack_codes(words, index_bits, end - run * 32)[begin - run * 32 :]
    placed = symbols != 2**index_bits - 1
    reach = torch.nn.functional.pad((symbols + placed).cumsum(0), (1, 0))
    # Where in the running sum each tile begins, so that its positions count from its own first weight.
    origin = torch.arange(len(starts) - 1, device=starts.device) * tile - reach[starts[:-1] - begin] - 1
    return (reach[1:] + origin.repeat_interleave(starts.diff()))[placed]


def span(scale: Tensor, base: Tensor, bits: int) -> Tensor:
    """The table (n, 2, 2^bits) that scales and bases (n, 2, 1) span: an even grid, and one mirrored for outliers."""
    half = 2 ** (bits - 1)
    steps = torch.arange(2 * half, device=scale.device)
    inlier = base[:, 0] + scale[:, 0] * steps
    tail = base[:, 1] + scale[:, 1] * (steps % half)
    return torch.stack([inlier, torch.where(steps < half, -tail, tail)], 1)


def golden_stride(K: int) -> int:
    """The number next to the golden section of K, from there up, without a common factor with K; 1 if K is 1."""
    return next(stride for stride in range(round(0.618 * K), 2 * K + 1) if math.gcd(stride, K) == 1)


def encode_positions(walk_NK: Tensor, index_bits: int, tile: int) -> tuple[Tensor, Tensor]:
    """`index` and `starts` of the format, for outliers marked in the order of the walk."""
    flat = walk_NK.flatten().nonzero()[:, 0]
    jump = 2**index_bits - 1
    of_tile = flat // tile
    before = torch.cat([flat.new_full((1,), -1), flat[:-1]])
    gap = flat - torch.maximum(before, of_tile * tile - 1)
    jumps = (gap - 1) // jump
    ends = (jumps + 1).cumsum(0)
    symbols = torch.full((int(ends[-1]) if len(ends) else 0,), jump, dtype=torch.uint8, device=flat.device)
    symbols[ends - 1] = (gap - jumps * jump - 1).to(torch.uint8)
    per_tile = flat.new_zeros(-(-walk_NK.numel() // tile)).index_add_(0, of_tile, jumps + 1)
    return pack_codes(symbols, index_bits), torch.nn.functional.pad(per_tile.cumsum(0), (1, 0)).int()


def expected_index_bits(gamma: float, index_bits: int) -> float:
    """Index bits per weight if a share `gamma` of positions is drawn evenly (ICQuant's formula, above)."""
    return gamma * index_bits * (1 + 1 / math.expm1(gamma * (2**index_bits - 1)))
