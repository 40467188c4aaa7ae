"""Levels of a codebook as operands of tensor cores: codes pick bytes, one to three instructions a weight.

A level is a half, two bytes. A register holds a byte of four levels, and PTX's `prmt` picks four bytes of two registers
by the nibbles of a third: codes spread to nibbles look up the low bytes of four levels at once, then the high ones, and
two more put these together. Sixteen levels are looked up among the lower and the upper eight, of which a code's top bit
takes one. So nothing is read from memory for a weight but its code.

Fields come out in an order of their own, as `fields.order` says, which costs nothing: x is staged to match.
"""

import triton
import triton.language as tl

from lrec.kernels.gpu.codes import code_at

# By bits a code: for each field, the codes of a register (for three bits, of two runs of 32) that its halves are.
PAIRS = {
    2: ((0, 2), (4, 6), (8, 10), (12, 14), (1, 3), (5, 7), (9, 11), (13, 15)),
    3: tuple(
        (k, k + 1) for chunk in range(0, 32, 8) for run in (0, 32) for k in range(run + chunk, run + chunk + 8, 2)
    ),
    4: ((0, 1), (2, 3), (4, 5), (6, 7)),
}
SELECT = "0xe4"  # lop3: bits of the first where the third has ones, else of the second


def _pick(low: list[str], high: list[str], selector: str, out: int, upper: str = "") -> list[str]:
    """PTX: the levels of four codes to outputs `out` and `out` + 1; `upper` has ones where a code is eight or more."""
    lines = []
    for to, planes in (("l", low), ("h", high)):
        second = planes[min(1, len(planes) - 1)]
        lines.append(f"prmt.b32 {to}, {planes[0]}, {second}, {selector};")
        if upper:
            lines.append(f"prmt.b32 u, {planes[2]}, {planes[3]}, {selector};")
            lines.append(f"lop3.b32 {to}, u, {to}, {upper}, {SELECT};")
    return [*lines, f"prmt.b32 ${out}, l, h, 0x5140;", f"prmt.b32 ${out + 1}, l, h, 0x7362;"]


def _planes(first: int, bits: int) -> tuple[list[str], list[str]]:
    """Registers of the low and of the high bytes, from input `first` on; inputs come twice, once for each element."""
    count = max(1, 2**bits // 4)
    names = [f"${first + 2 * i}" for i in range(2 * count)]
    return names[:count], names[count:]


def _assembly2() -> str:
    low, high = _planes(9, 2)
    lines = ["and.b32 s, $8, 0x33333333;", "shr.b32 t, $8, 2;", "and.b32 t, t, 0x33333333;"]
    for out, selector in ((0, "s"), (4, "t")):
        lines += [*_pick(low, high, selector, out), f"shr.b32 {selector}, {selector}, 16;"]
        lines += _pick(low, high, selector, out + 2)
    return "{ .reg .b32 s, t, l, h; " + " ".join(lines) + " }"


def _assembly4() -> str:
    low, high = _planes(5, 4)
    # A nibble of eight or more in `prmt` repeats a byte's top bit: that of the upper code, or of the lower moved up.
    lines = ["and.b32 s, $4, 0x77777777;", "shl.b32 v, $4, 4;", "prmt.b32 m, $4, v, 0x9d8c;"]
    lines += [*_pick(low, high, "s", 0, "m"), "shr.b32 s, s, 16;", "prmt.b32 m, $4, v, 0xbfae;"]
    lines += _pick(low, high, "s", 2, "m")
    return "{ .reg .b32 s, v, m, u, l, h; " + " ".join(lines) + " }"


def _assembly3(chunk: int) -> str:
    """Eight codes of either of two runs, from the words (w0, w0), (w0, w1), (w1, w2) or (w2, w2)."""
    low, high = _planes(12, 3)
    lines = []
    for run in (0, 1):
        here, there = f"${8 + run}", f"${10 + run}"
        lines.append(f"shf.r.wrap.b32 s, {here}, {there}, {(0, 24, 16, 8)[chunk]};")
        for shift, mask in ((4, 0xFFF), (2, 0x003F003F), (1, 0x07070707)):
            lines += [f"shl.b32 t, s, {shift};", f"lop3.b32 s, s, t, {mask:#010x}, {SELECT};"]
        lines += ["and.b32 s, s, 0x77777777;", *_pick(low, high, "s", 4 * run)]
        lines += ["shr.b32 s, s, 16;", *_pick(low, high, "s", 4 * run + 2)]
    return "{ .reg .b32 s, t, l, h; " + " ".join(lines) + " }"


LEVELS_2, LEVELS_4 = tl.constexpr(_assembly2()), tl.constexpr(_assembly4())
LEVELS_3A, LEVELS_3B, LEVELS_3C, LEVELS_3D = (tl.constexpr(_assembly3(chunk)) for chunk in range(4))
LEVEL_REGISTERS_2 = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 5))
LEVEL_REGISTERS_3 = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 12))
LEVEL_REGISTERS_4 = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 17))


@triton.jit
def planes_of(table, up, BITS: tl.constexpr):
    """The bytes of the 2^BITS levels that begin at `table` (BN, 1), times `up`, in half: a tuple of int32 (BN, 1), four
    levels in each, the low bytes first."""
    low, high = (), ()
    for q in tl.static_range((1 << BITS) // 4):
        a = tl.zeros(table.shape, tl.int32)
        b = tl.zeros(table.shape, tl.int32)
        for r in tl.static_range(4):
            level = (tl.load(table + 4 * q + r).to(tl.float32) * up).to(tl.float16)
            bytes = level.to(tl.int16, bitcast=True).to(tl.int32)
            a |= (bytes & 255) << (8 * r)
            b |= ((bytes >> 8) & 255) << (8 * r)
        low += (a,)
        high += (b,)
    return low + high


@triton.jit
def look_up(words, p, BITS: tl.constexpr):
    """The float16 fields, levels, of `words`: a tuple. `p` is what `planes_of` returns."""
    if BITS == 2:
        return tl.inline_asm_elementwise(
            LEVELS_2, LEVEL_REGISTERS_2, [words[0], p[0], p[1]], (tl.float16,) * 8, True, 2
        )
    elif BITS == 4:
        planes = [words[0], p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]]
        return tl.inline_asm_elementwise(LEVELS_4, LEVEL_REGISTERS_4, planes, (tl.float16,) * 4, True, 2)
    else:
        return (
            _chunk(LEVELS_3A, words[0], words[0], p)
            + _chunk(LEVELS_3B, words[0], words[1], p)
            + _chunk(LEVELS_3C, words[1], words[2], p)
            + _chunk(LEVELS_3D, words[2], words[2], p)
        )


@triton.jit
def _chunk(ASSEMBLY: tl.constexpr, here, there, p):
    planes = [here, there, p[0], p[1], p[2], p[3]]
    return tl.inline_asm_elementwise(ASSEMBLY, LEVEL_REGISTERS_3, planes, (tl.float16,) * 8, True, 2)


@triton.jit
def level(row, k, inside, table, up, BITS: tl.constexpr):
    """What `look_up` finds for the codes of columns k of the packed rows that begin at `row`, in plain Triton."""
    found = tl.load(table + code_at(row, k, inside, BITS).to(tl.int32), inside, 0)
    return (found.to(tl.float32) * up).to(tl.float16)
