"""Triton kernels that decode a rectangle of a packed weight: packed codes in, bfloat16, half or float32 out.

A program decodes one tile. Each kernel is the equation of its format's docstring, computed in float32 with the
operations of `unpack` in their order, so that decoded values are equal bit for bit. Triton's interpreter runs them too.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrec.formats import Packed, unpack_codes
from lrec.formats.binary import Binary
from lrec.formats.codebook import Codebook
from lrec.formats.outlier import Outlier
from lrec.formats.salient import SALIENT_BITS, Salient
from lrec.formats.ternary import TRITS, Ternary
from lrec.formats.uniform import Uniform, groups
from lrec.kernels import gpu
from lrec.kernels.gpu.codes import code_at, codes_of
from lrec.kernels.gpu.outliers import replace_outliers

TILE_N, TILE_K = 32, 128
ONE_GROUP = 2**30


@triton.jit
def zero_at(zero, n, g, G, words, inside, BITS: tl.constexpr, KIND: tl.constexpr):
    """The zero of row n and group g in float32; KIND says how zeros are stored: none,
    codes or float; or trits, which count from 0 where their zero is 1."""
    if KIND == "codes":
        return code_at(zero + g * words, n, inside, BITS).to(tl.float32)
    elif KIND == "float":
        return tl.load(zero + n * G + g, inside, 0).to(tl.float32)
    elif KIND == "trits":
        return 1.0
    else:
        return 2.0 ** (BITS - 1)


@triton.jit
def tile(box, BN: tl.constexpr, BK: tl.constexpr):
    """Row and column numbers of this program's tile of a box (first row, last row, first column, last column)."""
    n = box[0] + tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    k = box[2] + tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    return n, k, (n < box[1]) & (k < box[3])


@triton.jit
def group_of(k, box, GROUP: tl.constexpr, BK: tl.constexpr):
    """The groups of columns k: one number where the whole tile lies in a group."""
    if GROUP % BK == 0:
        return (box[2] + tl.program_id(1) * BK) // GROUP
    else:
        return k // GROUP


@triton.jit
def put(out, w, n, k, inside, box):
    """Stores a tile in the rectangle's own rows."""
    tl.store(out + (n - box[0]) * (box[3] - box[2]) + (k - box[2]), w.to(out.dtype.element_ty), inside)


@triton.jit
def uniform_tile(
    out, qweight, scale, zero, box, words, G, zero_words,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w = scale * (code - zero)."""
    n, k, inside = tile(box, BN, BK)
    g = group_of(k, box, GROUP, BK)
    grouped = (n < box[1]) & (g < G)
    zeros = zero_at(zero, n, g, G, zero_words, grouped, BITS, ZERO)
    scales = tl.load(scale + n * G + g, grouped, 0).to(tl.float32)
    codes = codes_of(qweight + n * words, box, n < box[1], BITS, BK).to(tl.float32)
    put(out, (codes - zeros) * scales, n, k, inside, box)


@triton.jit
def codebook_tile(
    out, qweight, table, scale, box, words, G, K, block_size,
    BITS: tl.constexpr, GROUP: tl.constexpr, TABLES: tl.constexpr, SCALED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w = scale * table[code]; there is one table, or one a row or a group, or the first of a row's pair: TABLES."""
    n, k, inside = tile(box, BN, BK)
    level = codes_of(qweight + n * words, box, n < box[1], BITS, BK).to(tl.int32)
    if TABLES == "row":
        level += n << BITS
    if TABLES == "pair":
        level += n << (BITS + 1)
    if TABLES == "group":
        level += (n * G + group_of(k, box, GROUP, BK)) << BITS
    w = tl.load(table + level, inside, 0).to(tl.float32)
    if SCALED:
        w *= tl.load(scale + (n.to(tl.int64) * K + k) // block_size, inside, 0)
    put(out, w, n, k, inside, box)


@triton.jit
def binary_tile(
    out, qweight, alpha, offset, box, words, G,
    PLANES: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w = offset + sum over planes of +-alpha."""
    n, k, inside = tile(box, BN, BK)
    g = group_of(k, box, GROUP, BK)
    grouped = (n < box[1]) & (g < G)
    w = tl.load(offset + n * G + g, grouped, 0).to(tl.float32) + tl.zeros((BN, BK), tl.float32)
    for p in tl.static_range(PLANES):
        bits = codes_of(qweight + (n * PLANES + p) * words, box, n < box[1], 1, BK).to(tl.float32)
        w += tl.load(alpha + (n * G + g) * PLANES + p, grouped, 0).to(tl.float32) * (bits * 2 - 1)
    put(out, w, n, k, inside, box)


@triton.jit
def ternary_tile(
    out, qweight, scale, box, row_bytes, G,
    TRITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w = scale * t."""
    n, k, inside = tile(box, BN, BK)
    g = group_of(k, box, GROUP, BK)
    digits = tl.load(qweight + n * row_bytes + k // TRITS, inside, 0).to(tl.int32)
    for j in tl.static_range(1, TRITS):
        digits = tl.where(k % TRITS >= j, digits // 3, digits)
    scales = tl.load(scale + n * G + g, (n < box[1]) & (g < G), 0).to(tl.float32)
    put(out, (digits % 3 - 1).to(tl.float32) * scales, n, k, inside, box)


@triton.jit
def salient_tile(
    out, qweight, salient, mask, place, salient_scale, salient_zero, scale, offset, column, box, words, salient_words,
    BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns that `mask` marks in BITS bits, the others by signs; `place` numbers the columns of each kind."""
    n, k, inside = tile(box, BN, BK)
    rows = n < box[1]
    marked = tl.load(mask + k, k < box[3], 0) != 0
    i = tl.load(place + k, k < box[3], 0)
    codes = code_at(salient + n * salient_words, i, inside & marked, BITS).to(tl.float32)
    zeros = code_at(salient_zero, n, rows, BITS).to(tl.float32)
    signs = code_at(qweight + n * words, i, inside & (marked == 0), 1).to(tl.float32) * 2 - 1
    columns = tl.load(column + i, (k < box[3]) & (marked == 0), 0).to(tl.float32)
    fine = (codes - zeros) * tl.load(salient_scale + n, rows, 0).to(tl.float32)
    coarse = tl.load(scale + n, rows, 0).to(tl.float32) * signs + tl.load(offset + n, rows, 0).to(tl.float32)
    put(out, tl.where(marked, fine, columns * coarse), n, k, inside, box)


def decoder(packed: Packed) -> Callable[[tuple[int, int], tuple[int, int], Tensor], None]:
    """A function of (rows, columns, out) that writes w[rows, columns], each a first and a last number.

    `out` is contiguous, of that shape, and gets values of its dtype; columns start at multiples of 128. Raises KeyError
    for a format that has no kernel here: see `DECODERS`.
    """
    kernel, tensors, numbers, constants = DECODERS[type(packed).name()](packed)
    # A tile inside one group loads one scale a row; groups of 64 are worth narrower tiles for it.
    step_k = TILE_K // 2 if constants.get("GROUP", TILE_K) % TILE_K == TILE_K // 2 else TILE_K

    def decode(rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> None:
        grid = (-(-(rows[1] - rows[0]) // TILE_N), -(-(columns[1] - columns[0]) // step_k))
        w = out if gpu.stored(out.dtype) is out.dtype else torch.empty_like(out, dtype=gpu.stored(out.dtype))
        kernel[grid](w, *tensors, (*rows, *columns), *numbers, **constants, BN=TILE_N, BK=step_k)
        if isinstance(packed, Outlier):
            replace_outliers(w, packed, tensors[1], rows, columns)
        if w is not out:
            out.copy_(w)

    return decode


def scales_and_zeros(packed: Uniform) -> tuple[Tensor, Tensor, str]:
    """Scales, zeros and how they are stored in the words of `zero_at`; 8-bit ones are widened to float32 first."""
    scale = packed.scale if packed.scale.is_floating_point() else packed.scales()
    if packed.zero is None:
        return scale, scale, "none"
    if packed.zero.dtype is torch.int32:
        return scale, packed.zero, "codes"
    return scale, packed.zero if packed.zero.is_floating_point() else packed.zeros(), "float"


def _group(group_size: int, G: int) -> int:
    return group_size if G > 1 else ONE_GROUP


def _uniform(packed: Uniform):
    scale, zero, kind = scales_and_zeros(packed)
    G = scale.shape[1]
    constants = {"BITS": packed.bits, "GROUP": _group(packed.group_size, G), "ZERO": kind}
    return uniform_tile, (packed.qweight, scale, zero), (packed.qweight.shape[1], G, zero.shape[1]), constants


def _codebook(packed: Codebook):
    K, G = packed.shape[1], groups(packed.shape[1], packed.group_size)
    scale = packed.table if packed.scale is None else packed.block_scales()
    constants = {
        "BITS": packed.bits,
        "GROUP": _group(packed.group_size, G),
        "TABLES": ("one", "row", "group")[packed.table.dim() - 1],
        "SCALED": packed.scale is not None,
    }
    numbers = (packed.qweight.shape[1], G, K, packed.block_size)
    return codebook_tile, (packed.qweight, packed.table, scale), numbers, constants


def _binary(packed: Binary):
    P, words = packed.qweight.shape[1:]
    G = packed.offset.shape[1]
    constants = {"PLANES": P, "GROUP": _group(packed.group_size, G)}
    return binary_tile, (packed.qweight, packed.alpha, packed.offset), (words, G), constants


def _ternary(packed: Ternary):
    G = packed.scale.shape[1]
    constants = {"TRITS": TRITS, "GROUP": _group(packed.group_size, G)}
    return ternary_tile, (packed.qweight, packed.scale), (packed.qweight.shape[1], G), constants


def _salient(packed: Salient):
    mask = unpack_codes(packed.mask, 1, packed.shape[1])
    place = mask.cumsum(0).where(mask.bool(), (1 - mask).cumsum(0)).int() - 1
    factors = (packed.salient_scale, packed.salient_zero, packed.scale, packed.offset, packed.column)
    numbers = (packed.qweight.shape[1], packed.salient.shape[1])
    return salient_tile, (packed.qweight, packed.salient, mask, place, *factors), numbers, {"BITS": SALIENT_BITS}


def _outlier(packed: Outlier):
    table = packed.levels() if packed.table is None else packed.table
    constants = {"BITS": packed.bits, "GROUP": ONE_GROUP, "TABLES": "pair", "SCALED": False}
    numbers = (packed.qweight.shape[1], 1, packed.shape[1], 1)
    return codebook_tile, (packed.qweight, table, table), numbers, constants


# Format name -> (kernel, its tensors, its numbers, its constants).
DECODERS = {
    "uniform": _uniform,
    "codebook": _codebook,
    "binary": _binary,
    "ternary": _ternary,
    "salient": _salient,
    "outlier": _outlier,
}
