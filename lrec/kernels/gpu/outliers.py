"""What outliers add to a weight that has been decoded, or multiplied, as if it had none.

Positions are a stream of gaps that starts anew every `tile` weights of the walk (`formats.outlier`): a running sum of
the gaps of a tile is where its outliers stand. In a rectangle that was decoded they are put in their places, a tile a
program. In a product each adds what it is more than an inlier of its code, times its entry of x: a row of W a program,
which reads the tiles that the row lies in, so that sums need neither atomics nor another order in another run. That is
for rows that are not much shorter than tiles, and for few rows of x.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrec.formats.outlier import Outlier
from lrec.kernels.gpu.codes import code_at


@triton.jit
def gaps(index, i, end, INDEX_BITS: tl.constexpr):
    """How far symbols i of the stream, those before `end`, move on, and whether an outlier stands there."""
    JUMP: tl.constexpr = (1 << INDEX_BITS) - 1
    symbol = code_at(index, i, i < end, INDEX_BITS).to(tl.int32)
    placed = (i < end) & (symbol < JUMP)
    return tl.where(i < end, symbol + placed.to(tl.int32), 0), placed


@triton.jit(do_not_specialize=["first"])
def outlier_tile(
    out, qweight, table, index, starts, box, first, words, K, tile, stride,
    BITS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w = table[n, 1, code] for the outliers of one tile of the walk that lie in the box."""
    t = first + tl.program_id(0)
    before = t.to(tl.int64) * tile - 1
    end = tl.load(starts + t + 1)
    for start in range(tl.load(starts + t), end, BLOCK):
        step, placed = gaps(index, start + tl.arange(0, BLOCK), end, INDEX_BITS)
        place = before + tl.cumsum(step, 0)
        before += tl.sum(step, 0)
        n, k = place // K, place % K * stride % K
        inside = placed & (n >= box[0]) & (n < box[1]) & (k >= box[2]) & (k < box[3])
        code = code_at(qweight + n * words, k, inside, BITS).to(tl.int64)
        w = tl.load(table + (((2 * n + 1) << BITS) + code), inside, 0).to(tl.float32)
        tl.store(out + (n - box[0]) * (box[3] - box[2]) + (k - box[2]), w.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def outlier_products(
    out, x, qweight, table, scale, base, index, starts, M, N, K, words, tile, stride, stride_m, stride_k,
    BITS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over the outliers k of row n of (their level less the inliers' of the same code) times x[m, k],
    for BM rows of x. Levels are in `table`, or spanned by `scale` and `base`."""
    n, m = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM,), tl.float32)
    origin = n.to(tl.int64) * K
    first = origin // tile
    for j in range(((origin + K - 1) // tile - first).to(tl.int32) + 1):
        t = first + j
        before = (t * tile - origin - 1).to(tl.int32)
        end = tl.load(starts + t + 1)
        for start in range(tl.load(starts + t), end, BLOCK):
            step, placed = gaps(index, start + tl.arange(0, BLOCK), end, INDEX_BITS)
            place = before + tl.cumsum(step, 0)
            before += tl.sum(step, 0)
            mine = placed & (place >= 0) & (place < K)
            k = ((place.to(tl.int64) if WIDE else place) * stride % K).to(tl.int32)
            code = code_at(qweight + n * words, k, mine, BITS).to(tl.int32)
            if table is not None:
                at = table + ((2 * n) << BITS) + code
                w = tl.load(at + (1 << BITS), mine, 0).to(tl.float32) - tl.load(at, mine, 0).to(tl.float32)
            else:
                HALF: tl.constexpr = 1 << (BITS - 1)
                magnitude = (code % HALF).to(tl.float32) * tl.load(scale + 2 * n + 1) + tl.load(base + 2 * n + 1)
                inlier = code.to(tl.float32) * tl.load(scale + 2 * n) + tl.load(base + 2 * n)
                w = tl.where(mine, tl.where(code < HALF, -magnitude, magnitude) - inlier, 0)
            at = x + m[None, :] * stride_m + k[:, None] * stride_k
            values = tl.load(at, mine[:, None] & (m < M)[None, :], 0).to(tl.float32)
            acc += tl.sum(w[:, None] * values, 0)
    tl.store(out + m * N + n, acc, m < M)


def add_outliers(x_TK: Tensor, packed: Outlier, out_TN: Tensor) -> None:
    """Writes to `out`, float32 and contiguous, what the outliers add to the product of x and `terms.inliers`."""
    (T, K), N = x_TK.shape, packed.shape[0]
    BM = min(16, triton.next_power_of_2(T))
    outlier_products[(N, -(-T // BM))](
        out_TN, x_TK, packed.qweight, packed.table, packed.scale, packed.base, packed.index, packed.starts, T, N, K,
        packed.qweight.shape[1], packed.tile, packed.stride, *x_TK.stride(),
        BITS=packed.bits, INDEX_BITS=packed.index_bits, BLOCK=512 if BM == 1 else 256, BM=BM,
        WIDE=K * packed.stride >= 2**31,
    )  # fmt: skip


def replace_outliers(
    out: Tensor, packed: Outlier, table: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    """Writes the outliers of w[rows, columns] into `out`, contiguous and of that shape; `table` is (N, 2, L)."""
    K = packed.shape[1]
    first, last = rows[0] * K // packed.tile, -(-rows[1] * K // packed.tile)
    outlier_tile[(last - first,)](
        out, packed.qweight, table, packed.index, packed.starts, (*rows, *columns), first, packed.qweight.shape[1], K,
        packed.tile, packed.stride, BITS=packed.bits, INDEX_BITS=packed.index_bits, BLOCK=1024,
    )  # fmt: skip
