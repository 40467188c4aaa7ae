"""The outliers of a rectangle that has been decoded as if it had none, put in their places.

Positions are a stream of gaps that starts anew every `tile` weights of the walk (`formats.outlier`), so a program takes
one of these tiles: a running sum of its gaps is where its outliers stand.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrec.formats.outlier import Outlier
from lrec.kernels.gpu.codes import code_at


@triton.jit(do_not_specialize=["first"])
def outlier_tile(
    out, qweight, table, index, starts, box, first, words, K, tile, stride,
    BITS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w = table[n, 1, code] for the outliers of one tile of the walk that lie in the box."""
    t = first + tl.program_id(0)
    JUMP: tl.constexpr = (1 << INDEX_BITS) - 1
    before = t.to(tl.int64) * tile - 1
    end = tl.load(starts + t + 1)
    for start in range(tl.load(starts + t), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        symbol = code_at(index, i, i < end, INDEX_BITS).to(tl.int32)
        step = tl.where(i < end, symbol + (symbol < JUMP).to(tl.int32), 0)
        place = before + tl.cumsum(step, 0)
        before += tl.sum(step, 0)
        n, k = place // K, place % K * stride % K
        inside = (i < end) & (symbol < JUMP) & (n >= box[0]) & (n < box[1]) & (k >= box[2]) & (k < box[3])
        code = code_at(qweight + n * words, k, inside, BITS).to(tl.int64)
        w = tl.load(table + (((2 * n + 1) << BITS) + code), inside, 0).to(tl.float32)
        tl.store(out + (n - box[0]) * (box[3] - box[2]) + (k - box[2]), w.to(out.dtype.element_ty), inside)


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
