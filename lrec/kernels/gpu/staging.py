"""x as the fused product reads it: half-precision slices in the order of the fields.

Each tile and row is scaled by a power of two to use the half's whole range; beside it stand these scales and the sums
of x over each group. Where a tile touches several groups, each row of x stands in as many columns of the product, zero
outside of its group; up to eight columns cost a tensor core the same as one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrec.kernels.gpu.fields import factors, order
from lrec.kernels.gpu.terms import Term
from lrec.kernels.gpu.tiling import Tiling


@triton.jit
def first_group(t, BK: tl.constexpr, GROUP: tl.constexpr):
    """The group of the first of tile t's BK columns."""
    if BK % GROUP == 0:
        return t * (BK // GROUP)
    else:
        return t * BK // GROUP


@triton.jit
def groups_of(t, a, G, GT: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """Groups a, counted from the first, of the GT that tile t touches: one number where that is one."""
    if GT == 1:
        return t * BK // GROUP
    else:
        return tl.minimum(first_group(t, BK, GROUP) + a, G - 1)


@triton.jit(do_not_specialize=["M"])
def stage(
    x, index, column, staged, factors, order, group_sums, tile_scales, M, K, stride_m, stride_k,
    F: tl.constexpr, KP: tl.constexpr, GT: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One tile of columns of one block of rows: see the module. Column c of the product is row c % BM, group c // BM of
    those that the tile touches. Column k of x stands at `index` k, and is to be multiplied by `column` k, if given.

    staged (blocks, tiles, F, KP, GT * BM) half; factors (F,); order (2 F,); group_sums (blocks, tiles, GT * BM);
    tile_scales (blocks, tiles, BM), each 2^24 over the power of two. PADDED is F * KP up to a power of two.
    """
    BK: tl.constexpr = F * KP
    t, block = tl.program_id(0), tl.program_id(1)
    at = block * tl.num_programs(0) + t
    place = tl.arange(0, PADDED)[:, None]
    j, i = place // KP, place % KP
    k = t * BK + i // 2 * (2 * F) + tl.load(order + 2 * j + i % 2, place < BK, 0)
    m = block * BM + tl.arange(0, BM)[None, :]
    exists = (place < BK) & (k < K)
    source = k if index is None else tl.load(index + k, exists, 0)
    values = tl.load(x + m * stride_m + source * stride_k, (m < M) & exists, 0).to(tl.float32)
    if column is not None:
        values *= tl.load(column + k, exists, 0).to(tl.float32)
    biased = (tl.max(tl.abs(values), 0).to(tl.int32, bitcast=True) >> 23) & 255
    up = tl.maximum(tl.minimum(268 - biased, 227), 27)  # largest |x| goes to [2^14, 2^15)
    tl.store(tile_scales + at * BM + tl.arange(0, BM), ((278 - up) << 23).to(tl.float32, bitcast=True))
    scaled = values * (up << 23).to(tl.float32, bitcast=True)[None, :] * tl.load(factors + j, place < BK, 0)
    to = staged + at * BK * GT * BM + place * GT * BM + tl.arange(0, BM)[None, :]
    for a in tl.static_range(GT):
        mine = k // GROUP == first_group(t, BK, GROUP) + a
        sums = tl.sum(tl.where(mine, values, 0), 0)
        tl.store(group_sums + (at * GT + a) * BM + tl.arange(0, BM), sums)
        tl.store(to + a * BM, tl.where(mine, scaled, 0).to(tl.float16), place < BK)


@dataclass(frozen=True)
class Staged:
    """What `stage` makes of x, and how many blocks of rows that is."""

    x: Tensor
    group_sums: Tensor
    tile_scales: Tensor
    blocks: int


def staged(x_TK: Tensor, term: Term, shape: Tiling, KP: int) -> Staged:
    """x as a term of the product reads it."""
    T, blocks = x_TK.shape[0], -(-x_TK.shape[0] // shape.BM)
    x = x_TK.new_empty(blocks, shape.tiles, shape.BK, shape.GT * shape.BM, dtype=torch.float16)
    group_sums = x_TK.new_empty(blocks, shape.tiles, shape.GT * shape.BM, dtype=torch.float32)
    tile_scales = x_TK.new_empty(blocks, shape.tiles, shape.BM, dtype=torch.float32)
    weight, device = term.weight, x_TK.device
    stage[(shape.tiles, blocks)](
        x_TK, term.index, term.column, x, factors(weight.bits, weight.levels, device), order(weight, device),
        group_sums, tile_scales, T, weight.shape[1], *x_TK.stride(),
        F=weight.fields, KP=KP, GT=shape.GT, BM=shape.BM, GROUP=term.group, PADDED=triton.next_power_of_2(shape.BK),
    )  # fmt: skip
    return Staged(x, group_sums, tile_scales, blocks)
