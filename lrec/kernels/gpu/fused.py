"""x W^T for few rows of x, from the packed weight: nothing of size N*K exists.

    y[m, n] = sum_g scale[n, g] * (sum_{k in g} q[n, k] x[m, k] - zero[n, g] * sum_{k in g} x[m, k])

Tensor cores sum q x over a tile of columns (`fields` says how); the scale and zero of a group then meet the accumulator
once, not each weight. Codes of a codebook become its levels on the way (`levels`). `staging` prepares x for it.

The sum over K is split over programs that write partial sums, and `add_up` adds these in one order: two runs are equal.
The two parts of a salient weight (`terms`) are partial sums too, and so is what `outliers` add. Where an adapter's
product is to be added, `finish` does it on the way, in float32: it costs no launch and no second pass over y, and y is
rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrec.formats import Packed
from lrec.formats.outlier import Outlier
from lrec.kernels import LowRank, gpu
from lrec.kernels.gpu import tuning
from lrec.kernels.gpu.decode import zero_at
from lrec.kernels.gpu.fields import fields_of, order
from lrec.kernels.gpu.levels import level, look_up, planes_of
from lrec.kernels.gpu.outliers import add_outliers
from lrec.kernels.gpu.staging import groups_of, staged
from lrec.kernels.gpu.terms import Term, arguments, terms
from lrec.kernels.gpu.tiling import Config, Tiling

BESIDE, BESIDE_ROWS = 4096, 8  # factors of an adapter that a program holds, and rows it has them for


@triton.jit
def loaded(row, i, stride, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Words i of rows of `stride` numbers that begin at `row`: a tuple of one tensor, for three-bit codes of three.
    Rows of an odd number of bytes are read by bytes."""
    if row.dtype.element_ty == tl.uint8:
        low, high = tl.load(row + 2 * i, 2 * i < stride, 0), tl.load(row + 2 * i + 1, 2 * i + 1 < stride, 0)
        words = (low.to(tl.int16) | (high.to(tl.int16) << 8),)
    elif BITS == 3:
        inside = None if EVEN else 3 * i < stride
        words = (tl.load(row + 3 * i, inside), tl.load(row + 3 * i + 1, inside), tl.load(row + 3 * i + 2, inside))
    else:
        words = (tl.load(row + i, None if EVEN else i < stride),)
    return words


@triton.jit
def products(row, xs, t, stride, order, table, up, planes, C: tl.constexpr, BITS: tl.constexpr, F: tl.constexpr,
             KP: tl.constexpr, EVEN: tl.constexpr, LEVELS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """float32 (BN, C): sum over tile t of codes, or levels, times staged x."""
    i = t * KP + tl.arange(0, KP)[None, :]
    # What is read beyond a row meets columns of x that are zero, and is finite.
    x = xs + tl.arange(0, KP)[:, None] * C + tl.arange(0, C)[None, :]
    acc = tl.zeros((row.shape[0], C), tl.float32)
    if LEVELS == "":
        fields = fields_of(loaded(row, i, stride, BITS, EVEN), BITS, F, ASM)
    elif ASM:
        fields = look_up(loaded(row, i, stride, BITS, EVEN), planes, BITS)
    for j in tl.static_range(F):
        if LEVELS == "" or ASM:
            f = fields[j]
        else:
            k = i // 2 * (2 * F) + tl.load(order + 2 * j + i % 2)
            f = level(row, k, k // 32 * BITS < stride, table, up, BITS)
        acc = tl.dot(f, tl.load(x + j * KP * C), acc)
    return acc


@triton.jit(do_not_specialize=["M", "tiles", "per_split"])
def multiply(
    out, staged, group_sums, tile_scales, order, qweight, scale, zero, table, table_up,
    M, N, stride, G, zero_words, tables, tiles, per_split,
    BITS: tl.constexpr, F: tl.constexpr, KP: tl.constexpr, GT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, PLANES: tl.constexpr, LEVELS: tl.constexpr, TABLE: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows n of W times a block of rows of x over one split of the tiles: float32 out (splits, M, N).

    ZERO is none, codes or float for uniform weights; offset for binary ones, whose `scale` is alpha; trits; levels.
    LEVELS says whose the table of levels is: of one, of each row, or of a group of TABLE columns, `tables` a row; ""
    has none. A row of W has `stride` * UNIT words.
    """
    C: tl.constexpr = GT * BM
    BK: tl.constexpr = F * KP
    n, split, block = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.program_id(2)
    row = tl.minimum(n, N - 1)[:, None]
    c = tl.arange(0, C)[None, :]
    acc = tl.zeros((BN, C), tl.float32)
    stride *= UNIT
    up, planes = 1.0, ()
    if LEVELS != "":
        up = tl.load(table_up)
        table += row * 0
        if LEVELS == "row":
            table += row << BITS
        if ASM and LEVELS != "group":
            planes = planes_of(table, up, BITS)
    for t in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        at = block * tiles + t
        sums = tl.load(group_sums + at * C + c)
        times = tl.load(tile_scales + at * BM + c % BM)
        g = groups_of(t, c // BM, G, GT, BK, GROUP)
        grouped = (row < N) & (g < G)
        if LEVELS == "group":
            levels = table + ((row * tables + t * BK // TABLE) << BITS)
            mine = planes_of(levels, up, BITS) if ASM else planes
        else:
            levels, mine = table, planes
        if ZERO == "offset":
            acc += tl.load(zero + row * G + g).to(tl.float32) * sums
        for p in tl.static_range(PLANES):
            words = qweight + (row * PLANES + p) * stride
            xs = staged + at * BK * C
            xq = products(words, xs, t, stride, order, levels, up, mine, C, BITS, F, KP, EVEN, LEVELS, ASM) * times
            if ZERO == "levels":
                xq *= 2.0**-24 / up
                acc += xq if scale is None else xq * tl.load(scale + row * G + g).to(tl.float32)
            else:
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


@triton.jit(do_not_specialize=["M", "splits"])
def add_up_beside(
    partial, left, right, out, M, N, splits, scale, stride_m, stride_r, stride_k, stride_n,
    R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out[m, n] = the sum of partial[s, m, n], s ascending, and of scale * left[m, r] * right[r, n]. RP is R up to a
    power of two; a program holds its columns of `right` for BM rows."""
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, RP)
    at = right + r[None, :] * stride_k + n[:, None] * stride_n
    factors = tl.load(at, (r[None, :] < R) & (n[:, None] < N), 0).to(tl.float32)
    first = tl.program_id(1) * BM
    for m in range(first, tl.minimum(M, first + BM)):
        total = tl.zeros((BN,), tl.float32)
        for s in range(splits):
            total += tl.load(partial + (s * M + m) * N + n, n < N, 0)
        row = tl.load(left + m * stride_m + r * stride_r, r < R, 0).to(tl.float32)
        total += scale * tl.sum(factors * row[None, :], 1)
        tl.store(out + m * N + n, total.to(out.dtype.element_ty), n < N)


def finish(partial_STN: Tensor, y_TN: Tensor, added: LowRank | None) -> None:
    """Writes the sum of the partial sums, and `added`, to y."""
    splits, T, N = partial_STN.shape
    if added is None:
        add_up[(-(-T * N // 1024),)](partial_STN, y_TN, T * N, splits, BLOCK=1024)
        return
    left, right, R = added.left_TR, added.right_RN, added.left_TR.shape[1]
    RP = triton.next_power_of_2(R)
    BN = min(256, BESIDE // RP)
    add_up_beside[(-(-N // BN), -(-T // BESIDE_ROWS))](
        partial_STN, left, right, y_TN, T, N, splits, float(added.scale), *left.stride(), *right.stride(),
        R=R, RP=RP, BN=BN, BM=BESIDE_ROWS,
    )  # fmt: skip


def product(x_TK: Tensor, packed: Packed, config: Config | None = None, added: LowRank | None = None) -> Tensor:
    """x W^T (T, N), and `added`, in x's dtype, half or bfloat16, for a weight that `tiling.refuses` does not refuse.
    `config` is that of a weight of one term; the fastest that is known serves if it is None."""
    N, T = packed.shape[0], x_TK.shape[0]
    parts = [(term, config or tuning.config(term.weight, T)) for term in terms(packed)]
    splits = [_splits(term, T, config) for term, config in parts]
    y = x_TK.new_empty(T, N, dtype=gpu.stored(x_TK.dtype))
    sums = sum(splits) + isinstance(packed, Outlier)
    written = sums == 1 and added is None
    out = y[None] if written else x_TK.new_empty(sums, T, N, dtype=torch.float32)
    for (term, config), mine in zip(parts, out[: sum(splits)].split(splits), strict=True):
        _multiply(x_TK, term, config, mine)
    if isinstance(packed, Outlier):
        add_outliers(x_TK, packed, out[-1])
    if not written:
        finish(out, y, added)
    return y.to(x_TK.dtype)


def _splits(term: Term, T: int, config: Config) -> int:
    """How many partial sums there are; no more than tiles."""
    tiles = Tiling.of(term.weight, T, config).tiles
    return -(-tiles // -(-tiles // config.splits))


def _multiply(x_TK: Tensor, term: Term, config: Config, out_STN: Tensor) -> None:
    """Writes the partial sums of one term."""
    weight, (splits, T, N) = term.weight, out_STN.shape
    shape = Tiling.of(weight, T, config)
    x = staged(x_TK, term, shape, config.KP)
    (*tensors, stride, G, words, tables), more = arguments(term)
    constants = {"BITS": weight.bits, "F": weight.fields, "KP": config.KP, "GT": shape.GT, "BM": shape.BM}
    constants |= {"BN": config.BN, "EVEN": shape.even, "ASM": not gpu.interpreted()}
    multiply[(-(-N // config.BN), splits, x.blocks)](
        out_STN, x.x, x.group_sums, x.tile_scales, order(weight, x_TK.device), *tensors, T, N, stride, G, words,
        tables, shape.tiles, -(-shape.tiles // splits),
        **constants, **more, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
