"""dY W for few rows of dY, from the same packed weight in the same order: nothing of size N*K, and no second copy.

    dx[m, k] = sum_n v[m, n] q[n, k] - sum_n v[m, n] zero[n, g],   v[m, n] = dy[m, n] scale[n, g],  g the group of k

The sum runs over rows of W, so scales cannot wait for the accumulator as they do in `fused`: they meet dy instead, a
tile of rows of it at a time, and v is rounded to half once, for both sums. A field of a tile of words is a slice of
columns of dx (`fields`), each with an accumulator of its own. Where a tile spans several groups, v stands once for
each, and every word takes its own group's product in the end.

Half has 30 octaves, which `stage_rows` uses: a row of dy is brought under 2 and the weight's largest scale under 2^14,
by powers of two. The sum over N is split over programs as that over K is in `fused`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import LowRank, gpu
from lrec.kernels.gpu import tuning
from lrec.kernels.gpu.decode import zero_at
from lrec.kernels.gpu.fields import factors, fields_of, order
from lrec.kernels.gpu.fused import finish, loaded
from lrec.kernels.gpu.staging import first_group, groups_of
from lrec.kernels.gpu.terms import arguments, scale_up, terms
from lrec.kernels.gpu.tiling import Config, Tiling


@triton.jit(do_not_specialize=["N"])
def stage_rows(dy, staged, down, N, stride_m, stride_n, BLOCK: tl.constexpr):
    """Row m of dy in half, over the power of two `down[m]` that brings its largest entry to [1, 2)."""
    m = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        values = tl.load(dy + m * stride_m + (start + n).to(tl.int64) * stride_n, start + n < N, 0).to(tl.float32)
        most = tl.maximum(most, tl.abs(values).to(tl.int32, bitcast=True))
    biased = tl.max(most, 0) >> 23
    up = tl.maximum(tl.minimum(254 - biased, 253), 1)
    tl.store(down + m, ((254 - up) << 23).to(tl.float32, bitcast=True))
    for start in range(0, N, BLOCK):
        values = tl.load(dy + m * stride_m + (start + n).to(tl.int64) * stride_n, start + n < N, 0).to(tl.float32)
        values *= (up << 23).to(tl.float32, bitcast=True)
        tl.store(staged + m * N + start + n, values.to(tl.float16), start + n < N)


@triton.jit(do_not_specialize=["M", "tiles", "per_split"])
def multiply_back(
    out, staged, down, scale_up, qweight, scale, zero, factors, order, M, N, K, stride, G, zero_words, tiles, per_split,
    BITS: tl.constexpr, F: tl.constexpr, KP: tl.constexpr, GT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """A block of rows of dy times one tile of columns of W, over one split of its rows: float32 out (splits, M, K)."""
    C: tl.constexpr = GT * BM
    BK: tl.constexpr = F * KP
    t, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, c = t * KP + tl.arange(0, KP)[None, :], tl.arange(0, C)[None, :]
    m = block * BM + c % BM
    g = groups_of(t, c // BM, G, GT, BK, GROUP)
    up = tl.load(scale_up)
    accs = (tl.zeros((KP, C), tl.float32),) * F
    zeros = tl.zeros((BN, C), tl.float32)
    for b in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        n = b * BN + tl.arange(0, BN)[:, None]
        row = tl.minimum(n, N - 1)
        dy = tl.load(staged + m * N + n, (m < M) & (n < N), 0).to(tl.float32)
        if ZERO == "offset":
            middle = tl.load(zero + row * G + g).to(tl.float32)
        for p in tl.static_range(PLANES):
            scales = tl.load(scale + (row * G + g) * PLANES + p).to(tl.float32)
            v = (dy * (scales * up)).to(tl.float16)
            if ZERO == "offset":
                middle -= scales
            else:
                zeros += v.to(tl.float32) * zero_at(zero, row, g, G, zero_words, n < N, BITS, ZERO)
            lying, words = loaded(qweight + (row * PLANES + p) * stride * UNIT, i, stride * UNIT, BITS, EVEN), ()
            for r in tl.static_range(3 if BITS == 3 else 1):
                words += (tl.trans(lying[r]),)
            found = fields_of(words, BITS, F, ASM)
            added = ()
            for j in tl.static_range(F):
                added += (tl.dot(found[j], v, accs[j]),)
            accs = added
        if ZERO == "offset":
            zeros -= dy * (middle * up)
    by = tl.load(down + m, m < M, 0) / up
    constant = tl.sum(zeros, 0)[None, :]
    word = t * KP + tl.arange(0, KP)[:, None]
    for j in tl.static_range(F):
        values = (accs[j] * tl.load(factors + j) * (2.0**25 if ZERO == "offset" else 2.0**24) - constant) * by
        k = word // 2 * (2 * F) + tl.load(order + 2 * j + word % 2)
        mine = (m < M) & (k < K)
        if GT > 1:
            mine &= k // GROUP == first_group(t, BK, GROUP) + c // BM
        tl.store(out + (split * M + m) * K + k, values.to(out.dtype.element_ty), mine)


def gradient(dy_TN: Tensor, packed: Packed, config: Config | None = None, added: LowRank | None = None) -> Tensor:
    """dY W (T, K), and `added`, in dy's dtype, half or bfloat16, for a weight that `tiling.refuses` does not refuse.
    The fastest Config that is known serves if none is given."""
    (N, K), T = packed.shape, dy_TN.shape[0]
    (term,) = terms(packed)
    weight = term.weight
    config = config or tuning.config(weight, T, True)
    shape = Tiling.of(weight, T, config, True)
    staged = dy_TN.new_empty(T, N, dtype=torch.float16)
    down = dy_TN.new_empty(T, dtype=torch.float32)
    stage_rows[(T,)](dy_TN, staged, down, N, *dy_TN.stride(), BLOCK=min(16384, triton.next_power_of_2(N)), num_warps=8)

    tiles = -(-N // config.BN)
    per_split = -(-tiles // config.splits)
    splits = -(-tiles // per_split)
    dx = dy_TN.new_empty(T, K, dtype=gpu.stored(dy_TN.dtype))
    written = splits == 1 and added is None
    out = dx[None] if written else dy_TN.new_empty(splits, T, K, dtype=torch.float32)
    (codes, scale, zero, _, _, stride, G, words, _), more = arguments(term)
    constants = {"BITS": weight.bits, "F": weight.fields, "KP": config.KP, "GT": shape.GT, "BM": shape.BM}
    constants |= {"BN": config.BN, "EVEN": shape.even, "ASM": not gpu.interpreted()}
    constants |= {name: more[name] for name in ("GROUP", "ZERO", "PLANES", "UNIT")}
    multiply_back[(shape.tiles, splits, -(-T // shape.BM))](
        out, staged, down, scale_up(scale), codes, scale, zero, factors(weight.bits, False, dy_TN.device),
        order(weight, dy_TN.device), T, N, K, stride, G, words, tiles, per_split,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if not written:
        finish(out, dx, added)
    return dx.to(dy_TN.dtype)
