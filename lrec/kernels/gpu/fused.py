"""x W^T for few rows of x, from the packed weight: nothing of size N*K exists. Uniform and binary-coded weights.

    y[m, n] = sum_g scale[n, g] * (sum_{k in g} q[n, k] x[m, k] - zero[n, g] * sum_{k in g} x[m, k])

Tensor cores sum q x over a tile of columns (`fields` says how); the scale and zero of a group then meet the accumulator
once, not each weight. `stage` prepares x for it: half-precision slices in the order of the fields, each tile and row
scaled by a power of two to use the half's whole range, and the sum of x over each group. Where a tile spans several
groups, each row of x stands in as many columns of the product, zero outside of its group; up to eight columns cost a
tensor core the same as one.

The sum over K is split over programs that write partial sums, and `add_up` adds these in one order: two runs are equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrec.formats.binary import Binary
from lrec.formats.uniform import Uniform
from lrec.kernels import gpu
from lrec.kernels.gpu.decode import ONE_GROUP, scales_and_zeros, zero_at
from lrec.kernels.gpu.fields import PLACES3, cut, cut3, factors, field, field3
from lrec.kernels.gpu.tiling import Config, Tiling, Weight

PLACES3_ = tl.constexpr(PLACES3)


@triton.jit(do_not_specialize=["M"])
def stage(
    x, staged, factors, group_sums, tile_scales, M, K, stride_m, stride_k,
    F: tl.constexpr, KP: tl.constexpr, GT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One tile of columns of one block of rows: see the module. Column c of the product is row c % BM, group c // BM.

    staged (blocks, tiles, F, KP, GT * BM) half; factors (F,); group_sums (blocks, tiles, GT * BM); tile_scales
    (blocks, tiles, BM), each 2^24 over the power of two.
    """
    BK: tl.constexpr = F * KP
    PER: tl.constexpr = BK // GT
    t, block = tl.program_id(0), tl.program_id(1)
    at = block * tl.num_programs(0) + t
    m, k = block * BM + tl.arange(0, BM)[None, :], tl.arange(0, BK)[:, None]
    inside = (m < M) & (t * BK + k < K)
    values = tl.load(x + m * stride_m + (t * BK + k) * stride_k, inside, 0).to(tl.float32)
    biased = (tl.max(tl.abs(values), 0).to(tl.int32, bitcast=True) >> 23) & 255
    up = tl.maximum(tl.minimum(268 - biased, 227), 27)  # largest |x| goes to [2^14, 2^15)
    tl.store(tile_scales + at * BM + tl.arange(0, BM), ((278 - up) << 23).to(tl.float32, bitcast=True))
    scaled = values * (up << 23).to(tl.float32, bitcast=True)[None, :] * tl.load(factors + k % F)
    place = staged + at * BK * GT * BM + ((k % F) * KP + k // F) * GT * BM + tl.arange(0, BM)[None, :]
    for a in tl.static_range(GT):
        mine = k // PER == a
        sums = tl.sum(tl.where(mine, values, 0), 0)
        tl.store(group_sums + (at * GT + a) * BM + tl.arange(0, BM), sums)
        tl.store(place + a * BM, tl.where(mine, scaled, 0).to(tl.float16))


@triton.jit
def products(words, xs, t, row_words, C: tl.constexpr, BITS: tl.constexpr, F: tl.constexpr, KP: tl.constexpr,
             EVEN: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """float32 (BN, C): sum over tile t of codes times staged x, short of the factor 2^24."""
    i = t * KP + tl.arange(0, KP)[None, :]
    # What is read beyond a row meets columns of x that are zero, and is finite.
    inside = None if EVEN else i < row_words
    x = xs + tl.arange(0, KP)[:, None] * C + tl.arange(0, C)[None, :]
    acc = tl.zeros((words.shape[0], C), tl.float32)
    if BITS == 3:
        w0 = tl.load(words + 3 * i, inside)
        w1 = tl.load(words + 3 * i + 1, inside)
        w2 = tl.load(words + 3 * i + 2, inside)
        if ASM:
            first, last = cut3(w0, w1, True), cut3(w1, w2, False)
        for j in tl.static_range(32):
            if not ASM:
                f = field3(w0, w1, w2, j, PLACES3_[j % 16])
            elif j < 16:
                f = first[j]
            else:
                f = last[j - 16]
            acc = tl.dot(f, tl.load(x + j * KP * C), acc)
    else:
        q = tl.load(words + i, inside)
        if ASM:
            all_fields = cut(q, BITS)
        for j in tl.static_range(F):
            f = all_fields[j] if ASM else field(q, j, BITS)
            acc = tl.dot(f, tl.load(x + j * KP * C), acc)
    return acc


@triton.jit(do_not_specialize=["M", "tiles", "per_split"])
def multiply(
    out, staged, group_sums, tile_scales, qweight, scale, zero, M, N, row_words, G, zero_words, tiles, per_split,
    BITS: tl.constexpr, F: tl.constexpr, KP: tl.constexpr, GT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, PLANES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows n of W times a block of rows of x over one split of the tiles: float32 out (splits, M, N).

    ZERO is none, codes or float for uniform weights; offset for binary ones, whose `scale` is alpha.
    """
    C: tl.constexpr = GT * BM
    BK: tl.constexpr = F * KP
    n, split, block = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.program_id(2)
    row = tl.minimum(n, N - 1)[:, None]
    c = tl.arange(0, C)[None, :]
    acc = tl.zeros((BN, C), tl.float32)
    for t in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        at = block * tiles + t
        sums = tl.load(group_sums + at * C + c)
        up = tl.load(tile_scales + at * BM + c % BM)
        g = t * BK // GROUP if GT == 1 else tl.minimum(t * GT + c // BM, G - 1)
        grouped = (row < N) & (g < G)
        if ZERO == "offset":
            acc += tl.load(zero + row * G + g).to(tl.float32) * sums
        for p in tl.static_range(PLANES):
            words = qweight + (row * PLANES + p) * row_words * (3 if BITS == 3 else 1)
            xq = products(words, staged + at * BK * C, t, row_words, C, BITS, F, KP, EVEN, ASM) * up
            scales = tl.load(scale + (row * G + g) * PLANES + p).to(tl.float32)
            if ZERO == "offset":
                acc += 2 * scales * (xq - 0.5 * sums)
            else:
                acc += scales * (xq - zero_at(zero, row, g, G, zero_words, grouped, BITS, ZERO) * sums)
    y = tl.sum(tl.reshape(acc, (BN, GT, BM)), 1)
    m = block * BM + tl.arange(0, BM)[None, :]
    place = out + (split * M + m) * N + n[:, None]
    tl.store(place, y.to(out.dtype.element_ty), (m < M) & (n[:, None] < N))


@triton.jit(do_not_specialize=["size", "splits"])
def add_up(partial, out, size, splits, BLOCK: tl.constexpr):
    """out[i] = the sum of partial[s, i], s ascending."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        total += tl.load(partial + s * size + i, i < size, 0)
    tl.store(out + i, total.to(out.dtype.element_ty), i < size)


def product(x_TK: Tensor, packed: Uniform | Binary, config: Config) -> Tensor:
    """x W^T (T, N) in x's dtype, half or bfloat16, for a weight whose groups `tiling.refuses` does not refuse."""
    (N, K), T = packed.shape, x_TK.shape[0]
    weight = Weight.of(packed)
    shape = Tiling.of(weight, T, config)
    x_blocks = (-(-T // shape.BM), shape.tiles, shape.GT * shape.BM)
    staged = x_TK.new_empty(*x_blocks, shape.BK, dtype=torch.float16)
    group_sums = x_TK.new_empty(x_blocks, dtype=torch.float32)
    tile_scales = x_TK.new_empty(*x_blocks[:2], shape.BM, dtype=torch.float32)
    sizes = {"F": weight.fields, "KP": config.KP, "GT": shape.GT, "BM": shape.BM}
    held = (staged, factors(weight.bits, x_TK.device), group_sums, tile_scales)
    stage[(shape.tiles, x_blocks[0])](x_TK, *held, T, K, *x_TK.stride(), **sizes)

    y = x_TK.new_empty(T, N, dtype=gpu.stored(x_TK.dtype))
    per_split = -(-shape.tiles // config.splits)
    splits = -(-shape.tiles // per_split)
    out = y if splits == 1 else x_TK.new_empty(splits, T, N, dtype=torch.float32)
    constants = sizes | {"BITS": weight.bits, "BN": config.BN, "EVEN": shape.even, "ASM": not gpu.interpreted()}
    held_by, more = arguments(packed)
    multiply[(-(-N // config.BN), splits, x_blocks[0])](
        out, staged, group_sums, tile_scales, *held_by[:3], T, N, shape.row_words, *held_by[3:],
        shape.tiles, per_split, **constants, **more, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        add_up[(-(-T * N // 1024),)](out, y, T * N, splits, BLOCK=1024)
    return y.to(x_TK.dtype)


def arguments(packed: Uniform | Binary) -> tuple[tuple, dict]:
    """(qweight, scale, zero, G, words of a row of zeros) as `multiply` takes them, and its constants."""
    if isinstance(packed, Binary):
        G, P = packed.alpha.shape[1:]
        tensors = (packed.qweight.view(torch.int16), packed.alpha, packed.offset)
        kind, words = "offset", 0
    else:
        scale, zero, kind = scales_and_zeros(packed)
        codes = packed.qweight if packed.bits == 3 else packed.qweight.view(torch.int16)
        tensors, words, G, P = (codes, scale, zero), zero.shape[1], scale.shape[1], 1
    group = packed.group_size if G > 1 else ONE_GROUP
    return (*tensors, G, words), {"GROUP": group, "ZERO": kind, "PLANES": P}
