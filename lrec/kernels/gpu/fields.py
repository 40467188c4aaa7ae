"""Packed codes as operands of tensor cores, two thirds of an instruction each.

A word of packed codes is cut into *fields*: field j of word i is the code of column k = F i + j, where a word holds F
codes. For one j, the fields of all words are a matrix (N, K / F) that multiplies columns j, F + j, 2 F + j ... of x: an
independent slice of the sum over K, so the order on disk serves as it is.

A field is not converted. Masked out of its word and read as a half-precision number, a code q at bit p is the subnormal
q * 2^(p - 24), which tensor cores multiply exactly; x carries the factor 2^-p of its column, and the accumulator 2^24.
Ten bits of mantissa leave room for several fields before the word must be shifted. Words are halves of the stored
int32 words, and two go in one register; three-bit codes cross them, so there a word is a run of three int32 words.

Five trits in a byte are no fields of bits. Brought from units of 3^-5 to those of 2^-8, a byte times 3 has its first
trit at bit 8, and below it the byte that gives the next: an addition and two masks for a trit of each of two bytes.

`cut` and `cut3` are inline assembly; `field` and `field3` give the same in plain Triton, for the interpreter.
Other makers' matrix units may flush subnormal halves to zero, so the product is for NVIDIA's tensor cores alone.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrec.formats.ternary import TRITS
from lrec.kernels.gpu.levels import PAIRS
from lrec.kernels.gpu.tiling import FIELDS, TRIT_BITS, Weight

MANTISSA = 10
# The bit at which each of the sixteen three-bit codes of 48 bits is left; see `_assembly3`.
PLACES3 = (0, 3, 6, 0, 3, 6, 2, 5, 0, 3, 6, 1, 4, 7, 0, 3)


def places(bits: int) -> list[int]:
    """The bit p at which field j of a word is left, for each j."""
    if bits == TRIT_BITS:
        return [8] * FIELDS[bits]
    if bits == 3:
        return [*PLACES3, *PLACES3]
    unshifted = MANTISSA // bits
    return [j % unshifted * bits for j in range(FIELDS[bits])]


def pairs(weight: Weight) -> list[tuple[int, int]]:
    """For each field, which codes of two words its entries are that stand in the first word and in the second."""
    F = weight.fields
    if weight.levels:
        return list(PAIRS[weight.bits])
    if weight.bits == TRIT_BITS:  # the last trit of a byte comes out first
        return [(k, F + k) for byte in range(0, F, TRITS) for k in reversed(range(byte, byte + TRITS))]
    return [(k, F + k) for k in range(F)]


@lru_cache
def factors(bits: float, levels: bool, device: torch.device) -> Tensor:
    """float32 (F,): what x carries for each field, 2^-p; levels are no subnormals, and 1 serves."""
    p = torch.tensor([0] * FIELDS[bits] if levels else places(bits), dtype=torch.float32, device=device)
    return 2.0**-p


@lru_cache
def order(weight: Weight, device: torch.device) -> Tensor:
    """int32 (2 F,): `pairs`, one after the other."""
    return torch.tensor(pairs(weight), dtype=torch.int32, device=device).flatten()


def _assembly(bits: int) -> str:
    """PTX: the fields of the two halfwords in the register after the outputs."""
    fields, unshifted = FIELDS[bits], MANTISSA // bits
    lines = [f"shr.b32 h, ${fields}, {unshifted * bits};"]
    for j in range(fields):
        source, mask = (f"${fields}" if j < unshifted else "h"), (2**bits - 1) << (j % unshifted * bits)
        lines.append(f"and.b32 ${j}, {source}, {mask * 0x10001:#010x};")
    return "{ .reg .b32 h; " + " ".join(lines) + " }"


def _assembly3(first: bool) -> str:
    """PTX: sixteen 3-bit fields of two runs, from halfwords 0 to 2 or 3 to 5 of each.

    Inputs are the int32 words that hold them: (w0, w1) or (w1, w2), each for both runs. Codes 5 and 10 cross halfwords.
    """
    low, high = "0x5410", "0x7632"
    halves = ((16, low), (16, high), (18, low)) if first else ((16, high), (18, low), (18, high))
    lines = [f"prmt.b32 h{i}, ${r}, ${r + 1}, {which};" for i, (r, which) in enumerate(halves)]
    lines += ["shr.b32 a, h0, 9;", "shl.b32 b, h1, 7;", "shr.b32 c, h1, 8;", "shl.b32 d, h2, 8;", "shr.b32 e, h2, 10;"]
    sources = ("h0", "h0", "h0", "a", "a", None, "h1", "h1", "c", "c", None, "h2", "h2", "h2", "e", "e")
    for j, source in enumerate(sources):
        if source:
            lines.append(f"and.b32 ${j}, {source}, {(7 << PLACES3[j]) * 0x10001:#010x};")
    for j, low_half, low_mask, high_half, high_mask in ((5, "a", 0x40, "b", 0x180), (10, "c", 0xC0, "d", 0x100)):
        lines.append(f"and.b32 t, {low_half}, {low_mask * 0x10001:#010x};")
        lines.append(f"lop3.b32 ${j}, {high_half}, {high_mask * 0x10001:#010x}, t, 0xea;")
    return "{ .reg .b32 h0, h1, h2, a, b, c, d, e, t; " + " ".join(lines) + " }"


def _assembly_trits() -> str:
    """PTX: the trits of the four bytes in the register after the outputs, those of two bytes at a time."""
    lines = []
    for byte, source in ((0, "and.b32 b, $10, 0x00ff00ff;"), (5, "prmt.b32 b, $10, 0, 0x4341;")):
        # ceil(b 256 / 243), by trial of all 243 bytes.
        lines += [source, "mad.lo.u32 t, b, 110, 0x07d807d8;", "shr.b32 t, t, 11;", "and.b32 t, t, 0x000f000f;"]
        lines.append("add.u32 b, b, t;")
        for j in range(TRITS):
            lines += ["mul.lo.u32 t, b, 3;", f"and.b32 ${byte + j}, t, 0x03000300;"]
            lines += ["and.b32 b, t, 0x00ff00ff;"] if j < TRITS - 1 else []
    return "{ .reg .b32 b, t; " + " ".join(lines) + " }"


ASSEMBLY_TRITS = tl.constexpr(_assembly_trits())
REGISTERS_TRITS = tl.constexpr(",".join(["=r"] * 10 + ["r"]))
TRIT_BITS_ = tl.constexpr(TRIT_BITS)
ASSEMBLY_1, ASSEMBLY_2, ASSEMBLY_4, ASSEMBLY_8 = (tl.constexpr(_assembly(bits)) for bits in (1, 2, 4, 8))
ASSEMBLY_3A, ASSEMBLY_3B = tl.constexpr(_assembly3(True)), tl.constexpr(_assembly3(False))
REGISTERS_1, REGISTERS_2, REGISTERS_4, REGISTERS_8 = (
    tl.constexpr(",".join(["=r"] * FIELDS[bits] + ["r"])) for bits in (1, 2, 4, 8)
)
PLACES3_ = tl.constexpr(PLACES3)
REGISTERS_3 = tl.constexpr(",".join(["=r"] * 16 + ["r"] * 4))


@triton.jit
def cut(words, BITS: tl.constexpr):
    """The float16 fields of int16 words, by inline assembly: a tuple."""
    if BITS == TRIT_BITS_:
        return tl.inline_asm_elementwise(ASSEMBLY_TRITS, REGISTERS_TRITS, [words], (tl.float16,) * 10, True, 2)
    elif BITS == 1:
        return tl.inline_asm_elementwise(ASSEMBLY_1, REGISTERS_1, [words], (tl.float16,) * 16, True, 2)
    elif BITS == 2:
        return tl.inline_asm_elementwise(ASSEMBLY_2, REGISTERS_2, [words], (tl.float16,) * 8, True, 2)
    elif BITS == 4:
        return tl.inline_asm_elementwise(ASSEMBLY_4, REGISTERS_4, [words], (tl.float16,) * 4, True, 2)
    else:
        return tl.inline_asm_elementwise(ASSEMBLY_8, REGISTERS_8, [words], (tl.float16,) * 2, True, 2)


@triton.jit
def cut3(w0, w1, FIRST: tl.constexpr):
    """The first or last sixteen float16 fields of runs, from the two int32 words that hold them: a tuple."""
    if FIRST:
        return tl.inline_asm_elementwise(ASSEMBLY_3A, REGISTERS_3, [w0, w1], (tl.float16,) * 16, True, 2)
    else:
        return tl.inline_asm_elementwise(ASSEMBLY_3B, REGISTERS_3, [w0, w1], (tl.float16,) * 16, True, 2)


@triton.jit
def field(words, j: tl.constexpr, BITS: tl.constexpr):
    """Field j of int16 words, as `cut` has it."""
    if BITS == TRIT_BITS_:
        byte = (words.to(tl.int32) >> (8 * (j // 5))) & 255
        trit = byte // 3 ** (4 - j % 5) % 3
        return (trit << 8).to(tl.int16).to(tl.float16, bitcast=True)
    UNSHIFTED: tl.constexpr = 10 // BITS
    shifted = words if j < UNSHIFTED else words >> UNSHIFTED * BITS
    return (shifted & (((1 << BITS) - 1) << (j % UNSHIFTED * BITS))).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def field3(w0, w1, w2, j: tl.constexpr, PLACE: tl.constexpr):
    """Field j of runs of three int32 words, left at bit PLACE, as `cut3` has it."""
    if j < 11:
        low, high = w0, w1
    elif j < 22:
        low, high = w1, w2
    else:
        low, high = w2, w2
    SHIFT: tl.constexpr = 3 * j % 32
    code = (low.to(tl.uint32, bitcast=True) >> SHIFT).to(tl.int32)
    if SHIFT > 29:
        code = code | (high << (32 - SHIFT))
    return ((code & 7) << PLACE).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def fields_of(words, BITS: tl.constexpr, F: tl.constexpr, ASM: tl.constexpr):
    """The F float16 fields of words, one tensor of them or, for three-bit codes, three: a tuple."""
    if not ASM:
        found = ()
        for j in tl.static_range(F):
            if BITS == 3:
                found += (field3(words[0], words[1], words[2], j, PLACES3_[j % 16]),)
            else:
                found += (field(words[0], j, BITS),)
    elif BITS == 3:
        found = cut3(words[0], words[1], True) + cut3(words[1], words[2], False)
    else:
        found = cut(words[0], BITS)
    return found
