"""The inline assembly of the fused product, which neither the interpreter nor a machine without a GPU can run.

A few lines read the PTX and carry it out on 32-bit numbers; what it leaves must be the codes that were packed.
"""

import re

import pytest
import torch

from lrec.formats import pack_codes

pytest.importorskip("triton", reason="triton is not installed: there is no assembly")

from lrec.kernels.gpu import fields
from lrec.kernels.gpu.tiling import FIELDS

MASK = 0xFFFFFFFF


def permute(a, b, selector):
    """PTX prmt.b32: byte i of the result is the byte that nibble i names of the eight of (b, a)."""
    both = a | b << 32
    return sum((both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))


OPERATIONS = {
    "shr.b32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & MASK,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": permute,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else pytest.fail("another table"),
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
