"""Laws of the `uniform` format and of the dense packing below it."""

import json

import numpy as np
import pytest
import torch

from lrec import formats
from lrec.eight_bits import exponents, round_scales, round_zeros
from lrec.formats import pack_codes, unpack_codes
from lrec.formats.uniform import WIDTHS, Uniform, groups

BITS = pytest.mark.parametrize("bits", WIDTHS)
# How zeros are stored; with " 8" behind it scales (and float zeros) have 8 bits.
ZEROS = pytest.mark.parametrize("zeros", ["absent", "int", "float", "absent 8", "int 8", "float 8"])
# (N, K, group_size): whole groups, ragged last groups, odd sizes, one group a row by 0 and by K.
SHAPES = pytest.mark.parametrize("shape", [(4, 128, 64), (7, 100, 64), (41, 401, 16), (33, 41, 32), (3, 70, 0)])


def parts(shape, bits, zeros, seed=0):
    """Random codes, scale and zero (or None) of a weight."""
    N, K, group_size = shape
    g = torch.Generator().manual_seed(seed)
    G = groups(K, group_size or K)
    kind, _, eight = zeros.partition(" ")
    codes = torch.randint(0, 2**bits, (N, K), generator=g)
    scale = torch.rand(N, G, generator=g).add(0.01).half()
    zero = {
        "absent": None,
        "int": torch.randint(0, 2**bits, (N, G), generator=g),
        "float": torch.randn(N, G, generator=g).mul(3).half(),
    }[kind]
    if eight:
        scale = round_scales(scale.float(), exponents(scale)).half()
        zero = round_zeros(zero, bits) if kind == "float" else zero
    return codes, scale, zero


def made(shape, bits, zeros):
    """The packed weight of `parts`."""
    return Uniform.pack(*parts(shape, bits, zeros), bits, shape[2], 8 if zeros.endswith("8") else 16)


def scale_of(code, exponent):
    """What an 8-bit scale stands for, by the docstring's words."""
    return code * 2.0 ** (exponent - 11) if code < 32 else (32 + code % 32) * 2.0 ** (exponent + code // 32 - 12)


def definition(codes, scale, zero, bits, group_size):
    """scale * (code - zero), one weight at a time, rounded to float32 after each of the two operations."""
    N, K = codes.shape
    middle = np.float32(2 ** (bits - 1))
    q, s = codes.numpy().astype(np.float32), scale.float().numpy()
    z = np.full_like(s, middle) if zero is None else zero.float().numpy()
    w = np.full((N, K), np.nan, np.float32)
    for n in range(N):
        for k in range(K):
            g = k // (group_size or K)
            w[n, k] = s[n, g] * (q[n, k] - z[n, g])
    return torch.from_numpy(w)


@BITS
@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 401])
def test_codes_survive_packing_in_exactly_their_bits(bits, n):
    codes = torch.randint(0, 2**bits, (3, n), generator=torch.Generator().manual_seed(n))
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-n // 32) * bits)
    assert torch.equal(unpack_codes(words, bits, n).long(), codes)


@BITS
def test_packing_is_the_little_endian_bit_stream(bits):
    codes = torch.randint(0, 2**bits, (96,), generator=torch.Generator().manual_seed(bits)).tolist()
    stream = sum(code << (k * bits) for k, code in enumerate(codes))
    words = pack_codes(torch.tensor(codes), bits)
    assert words.numpy().tobytes() == stream.to_bytes(96 * bits // 8, "little")


@BITS
@ZEROS
@SHAPES
def test_unpack_is_the_equation_bit_for_bit(shape, bits, zeros):
    codes, scale, zero = parts(shape, bits, zeros)
    packed = made(shape, bits, zeros)
    assert torch.equal(packed.unpack(), definition(codes, scale, zero, bits, shape[2]))
    assert torch.equal(packed.codes().long(), codes)


@BITS
@ZEROS
@SHAPES
def test_a_slice_of_rows_is_that_slice_of_the_whole(shape, bits, zeros):
    packed = made(shape, bits, zeros)
    N, whole = shape[0], packed.unpack()
    for start in {0, 1, 31, 32, N // 2, N - 1}:
        for stop in {start, start + 1, start + 7, N}:
            assert torch.equal(packed.unpack(slice(start, stop)), whole[start:stop])
    index = torch.randint(0, N, (2 * N + 1,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed.unpack(index), whole[index])
    assert torch.equal(packed.unpack(index[:0]), whole[:0])


@BITS
@ZEROS
@SHAPES
def test_spec_and_tensors_rebuild_the_weight(shape, bits, zeros):
    packed = made(shape, bits, zeros)
    spec = json.loads(formats.spec_key(packed.spec()))
    assert spec == packed.spec() and spec["format"] == "uniform"
    for tensors in (packed.tensors(), list(packed.tensors().values())):
        again = formats.build(tensors, spec)
        assert again.spec() == packed.spec() and torch.equal(again.unpack(), packed.unpack())
    blank = formats.empty(spec)
    assert blank.spec() == spec and {k: t.shape for k, t in blank.tensors().items()} == {
        k: t.shape for k, t in packed.tensors().items()
    }


@BITS
@ZEROS
@SHAPES
def test_bytes_are_those_of_the_equation(shape, bits, zeros):
    packed = made(shape, bits, zeros)
    N, K, group_size = shape
    G = groups(K, group_size or K)
    kind, _, eight = zeros.partition(" ")
    width, exponent_bytes = (1, -(-N // 32)) if eight else (2, 0)
    zero_bytes = {"absent": 0, "int": G * -(-N // 32) * bits * 4, "float": N * G * width}[kind]
    assert packed.nbytes == N * -(-K // 32) * bits * 4 + N * G * width + zero_bytes + exponent_bytes
    assert packed.nbytes == sum(len(t.contiguous().view(torch.uint8).flatten()) for t in packed.tensors().values())
    assert packed.bits_per_weight == 8 * packed.nbytes / (N * K)


@BITS
def test_whole_rows_cost_exactly_their_bits(bits):
    codes = torch.zeros(64, 1024, dtype=torch.long)
    packed = Uniform.pack(codes, torch.ones(64, 8).half(), torch.zeros(64, 8, dtype=torch.long), bits, 128)
    assert packed.bits_per_weight == bits + 16 / 128 + bits / 128
    packed = Uniform.pack(codes, torch.ones(64, 8).half(), torch.zeros(64, 8).half(), bits, 128, scale_bits=8)
    assert packed.bits_per_weight == bits + 16 / 128 + 8 / 32 / 1024


def test_8_bit_scales_are_the_nearest_of_255():
    for exponent in (-13, -3, 0, 15):
        held = torch.tensor([scale_of(c, exponent) for c in range(1, 256)]).double()
        assert torch.equal(held.half().double(), held), "fp16 holds them"
        assert (held.diff() > 0).all() and held[-1] < 2.0 ** (exponent + 1)
        around = torch.cat([held[:, None] * torch.linspace(0.97, 1.03, 13), torch.tensor([[1e-9] * 13, [6e4] * 13])])
        rounded = round_scales(around, torch.full((-(-len(around) // 32),), exponent, dtype=torch.int8))
        assert torch.equal((rounded - around).abs(), (around[..., None] - held).abs().amin(-1))
        inside = (around >= 2.0 ** (exponent - 6)) & (around <= held[-1])
        assert ((rounded / around - 1).abs()[inside] <= 1 / 64).all()


@BITS
def test_8_bit_zeros_are_the_nearest_of_256(bits):
    held = (torch.arange(256).double() - 64) * 2.0 ** (bits - 7)
    zero = torch.linspace(-(2.0**bits), 2.0 ** (bits + 1), 4001).double()
    assert torch.equal((round_zeros(zero, bits) - zero).abs(), (zero[:, None] - held).abs().amin(1))
    assert torch.equal(held.half().double(), held), "fp16 holds them"


def test_every_code_of_an_8_bit_scale_decodes_to_its_own_scale_and_back():
    exponent = torch.tensor([3, -6], dtype=torch.int8)
    c = torch.arange(256).clamp(min=1).repeat(2, 1).view(64, 8)
    scale = torch.tensor([[scale_of(int(code), [3, -6][n // 32]) for code in row] for n, row in enumerate(c)])
    packed = Uniform.pack(torch.zeros(64, 128, dtype=torch.long), scale, None, 2, 16, scale_bits=8)
    assert torch.equal(packed.scale_exponent, exponent) and torch.equal(packed.scale.long(), c)
    assert torch.equal(packed.scales(), scale)


def test_what_8_bits_do_not_hold_is_refused():
    codes, scale, zero = parts((40, 128, 64), 2, "float 8")
    for wrong in (scale * 1.001, torch.where(torch.arange(40)[:, None] == 7, scale / 4096, scale)):
        with pytest.raises(ValueError, match="scale_bits = 8 does not hold these scales exactly"):
            Uniform.pack(codes, wrong, zero, 2, 64, scale_bits=8)
    for wrong in (zero + 0.01, zero + 100):
        with pytest.raises(ValueError, match="scale_bits = 8 does not hold these zeros exactly"):
            Uniform.pack(codes, scale, wrong, 2, 64, scale_bits=8)


def test_float32_scale_and_zero_are_kept_as_given():
    codes, scale, zero = parts((7, 100, 64), 3, "float")
    scale, zero = scale.float() * 1.0001, zero.float() * 1.0001
    packed = Uniform.pack(codes, scale, zero, 3, 64)
    assert packed.scale.dtype == packed.zero.dtype == torch.float32
    assert torch.equal(packed.scale, scale) and torch.equal(packed.zeros(), zero)


def test_qweight_is_the_first_tensor():
    assert next(iter(Uniform.pack(*parts((4, 128, 64), 2, "int"), 2, 64).tensors())) == "qweight"


def test_bad_input_is_refused_in_words():
    codes, scale, zero = parts((4, 128, 64), 2, "int")
    with pytest.raises(ValueError, match=r"bits = 5.*allowed: 2, 3, 4, 8"):
        Uniform.pack(codes, scale, zero, 5, 64)
    with pytest.raises(ValueError, match=r"group_size = 8 .*128 columns.*16 to 128.*\[16, 32, 64, 128\]"):
        Uniform.pack(codes, scale, zero, 2, 8)
    with pytest.raises(ValueError, match="group_size = 256 does not fit 128 columns"):
        Uniform.pack(codes, scale, zero, 2, 256)
    with pytest.raises(ValueError, match=r"scale has shape \(4, 2\).*need \(4, 4\)"):
        Uniform.pack(codes, scale, zero, 2, 32)
    packed = Uniform.pack(codes, scale, zero, 2, 64)
    with pytest.raises(ValueError, match=r"unknown format 'unifrm'.*Did you mean 'uniform'"):
        formats.build(packed.tensors(), {**packed.spec(), "format": "unifrm"})
    with pytest.raises(ValueError, match="has tensors"):
        formats.build({"qweight": packed.qweight}, packed.spec())
