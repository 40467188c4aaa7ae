"""The inline assembly of the fused product, which neither the interpreter nor a machine without a GPU can run.

A few lines read the PTX and carry it out on 32-bit numbers; what it leaves must be the codes that were packed.
"""

import re

import pytest
import torch

from lrec.formats import pack_codes

pytest.importorskip("triton", reason="triton is not installed: there is no assembly")

from lrec.kernels.gpu import fields, levels
from lrec.kernels.gpu.tiling import FIELDS, TRIT_BITS, Weight

MASK = 0xFFFFFFFF


def permute(a, b, selector):
    """PTX prmt.b32: byte i of the result is the byte that nibble i names of the eight of (b, a), or its sign."""
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (a | b << 32) >> 8 * (nibble & 7) & 0xFF
        result |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * i
    return result


def lop3(a, b, c, table):
    """PTX lop3.b32: each bit is looked up in the table by those of a, b and c."""
    found = 0
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found & MASK


OPERATIONS = {
    "shr.b32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & MASK,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": permute,
    "lop3.b32": lop3,
    "shf.r.wrap.b32": lambda low, high, n: (low | high << 32) >> (n & 31) & MASK,
    "mul.lo.u32": lambda a, b: a * b & MASK,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK,
    "add.u32": lambda a, b: a + b & MASK,
}


def run(assembly, registers, inputs):
    """The output registers $0, $1 ... after the assembly; `registers` is the constraint string."""
    num_outputs = registers.count("=r")
    assert registers.count("r") == num_outputs + len(inputs)
    held = {f"${num_outputs + i}": value & MASK for i, value in enumerate(inputs)}
    body = re.fullmatch(r"\{ \.reg \.b32 [\w, ]+; (.*) \}", assembly)[1]
    for line in body.rstrip(";").split(";"):
        op, target, *sources = line.replace(",", " ").split()
        values = [held[s] if s in held else int(s, 0) for s in sources]
        held[target] = OPERATIONS[op](*values)
    return [held[f"${j}"] for j in range(num_outputs)]


def halves(value):
    """A register as its two half-precision numbers, in units of 2^-24, the lower first."""
    bits = torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.int16)
    return (bits.view(torch.float16).double() * 2**24).tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_fields_of_two_words_are_their_codes(bits):
    assembly, registers = getattr(fields, f"ASSEMBLY_{bits}").value, getattr(fields, f"REGISTERS_{bits}").value
    F = FIELDS[bits]
    for _ in range(20):
        codes = torch.randint(0, 2**bits, (32,))
        for word, register in enumerate(pack_codes(codes, bits).tolist()):
            first, second = codes[word * 2 * F :][:F], codes[(word * 2 + 1) * F :][:F]
            for j, output in enumerate(run(assembly, registers, [register])):
                up = 2 ** fields.places(bits)[j]
                assert halves(output) == [int(first[j]) * up, int(second[j]) * up], f"field {j}"


@pytest.mark.parametrize("half", [0, 1])
def test_fields_of_two_runs_are_their_codes(half):
    assembly = (fields.ASSEMBLY_3A, fields.ASSEMBLY_3B)[half].value
    for _ in range(20):
        codes = torch.randint(0, 8, (2, 32))
        runs = pack_codes(codes, 3)
        inputs = [int(runs[r, half + i]) for i in range(2) for r in range(2)]
        for j, output in enumerate(run(assembly, fields.REGISTERS_3.value, inputs)):
            up = 2 ** fields.places(3)[j]
            assert halves(output) == [int(codes[r, 16 * half + j]) * up for r in range(2)], f"field {j}"


def test_fields_of_bytes_are_their_trits():
    assembly, registers = fields.ASSEMBLY_TRITS.value, fields.REGISTERS_TRITS.value
    for byte in range(243):
        held = [byte, (byte * 7 + 1) % 243, 242 - byte, (byte + 121) % 243]
        outputs = run(assembly, registers, [sum(b << 8 * i for i, b in enumerate(held))])
        digits = [b // 3**d % 3 for b in held for d in range(5)]  # those of two words of two bytes
        weight = Weight("ternary", (1, 20), TRIT_BITS, 1, 20)
        for j, (first, second) in enumerate(fields.pairs(weight)):
            up = 2 ** fields.places(TRIT_BITS)[j]
            assert halves(outputs[j]) == [digits[first] * up, digits[second] * up], f"byte {byte}, field {j}"


def planes_of(table):
    """The registers that `levels.planes_of` makes of a table of halves, each as both elements have it."""
    bits = table.view(torch.int16).tolist()
    found = []
    for shift in (0, 8):
        for start in range(0, len(bits), 4):
            value = sum((bits[start + r] >> shift & 0xFF) << 8 * r for r in range(4))
            found += [value, value]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fields_of_codes_are_their_levels(bits):
    parts = [levels.LEVELS_3A, levels.LEVELS_3B, levels.LEVELS_3C, levels.LEVELS_3D]
    assemblies = parts if bits == 3 else [getattr(levels, f"LEVELS_{bits}")]
    registers = getattr(levels, f"LEVEL_REGISTERS_{bits}").value
    for _ in range(20):
        table = torch.randn(2**bits).half()
        codes = torch.randint(0, 2**bits, (64 if bits == 3 else 32 // bits,))
        words = pack_codes(codes, bits).tolist()
        outputs = []
        for chunk, assembly in enumerate(assemblies):
            if bits == 3:  # low and high word of either run
                inputs = [words[3 * run + i] for i in (max(0, chunk - 1), min(chunk, 2)) for run in (0, 1)]
            else:
                inputs = words[:1]
            outputs += run(assembly.value, registers, [*inputs, *planes_of(table)])
        for j, pair in enumerate(levels.PAIRS[bits]):
            expected = [float(table[codes[k]]) * 2**24 for k in pair]
            assert halves(outputs[j]) == expected, f"field {j}"
