"""Packed codes read in Triton, in the order of `pack_codes`."""

import triton
import triton.language as tl


@triton.jit
def code_at(row, k, inside, BITS: tl.constexpr):
    """Code k, as uint32, of the packed codes that begin at `row`, in the order of `pack_codes`."""
    bit = (k % 32) * BITS
    word = row + (k // 32) * BITS + bit // 32
    shift = (bit % 32).to(tl.uint32)
    code = tl.load(word, inside, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        crosses = shift + BITS > 32
        high = tl.load(word + 1, inside & crosses, 0).to(tl.uint32, bitcast=True)
        code = tl.where(crosses, code | (high << (32 - shift)), code)
    return code & ((1 << BITS) - 1)


@triton.jit
def codes_of(row, box, inside, BITS: tl.constexpr, BK: tl.constexpr):
    """Codes (BN, BK), as uint32, of this tile's columns in packed rows that begin at `row`; each word is loaded once.

    Three-bit codes cross words, so they are taken from the first or the last 64 bits of their run of 96.
    """
    k_first = box[2] + tl.program_id(1) * BK
    if BITS == 3:
        run = k_first // 32 + tl.arange(0, BK // 32)[None, :]
        fits = inside & (run * 32 < box[3])
        w0 = tl.load(row + run * 3, fits, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
        w1 = tl.load(row + run * 3 + 1, fits, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
        w2 = tl.load(row + run * 3 + 2, fits, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
        first, last = w0 | (w1 << 32), w1 | (w2 << 32)
        i = tl.arange(0, 32)[None, None, :]
        shift = tl.where(i < 21, 3 * i, 3 * i - 32).to(tl.uint64)
        codes = (tl.where(i < 21, first[:, :, None], last[:, :, None]) >> shift).to(tl.uint32)
    else:
        PER: tl.constexpr = 32 // BITS
        word = k_first // PER + tl.arange(0, BK // PER)[None, :]
        words = tl.load(row + word, inside & (word * PER < box[3]), 0).to(tl.uint32, bitcast=True)
        codes = words[:, :, None] >> (tl.arange(0, PER) * BITS).to(tl.uint32)[None, None, :]
    return tl.reshape(codes & ((1 << BITS) - 1), (codes.shape[0], BK))
