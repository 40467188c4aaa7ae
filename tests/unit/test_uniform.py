"""Laws of the `uniform` format and of the dense packing below it."""

import json

import numpy as np
import pytest
import torch

from lrec import formats
from lrec.formats import pack_codes, unpack_codes
from lrec.formats.uniform import WIDTHS, Uniform, groups

BITS = pytest.mark.parametrize("bits", WIDTHS)
ZEROS = pytest.mark.parametrize("zeros", ["absent", "int", "float"])
# (N, K, group_size): whole groups, ragged last groups, odd sizes, one group a row by 0 and by K.
SHAPES = pytest.mark.parametrize("shape", [(4, 128, 64), (7, 100, 64), (41, 401, 16), (33, 41, 32), (3, 70, 0)])


def parts(shape, bits, zeros, seed=0):
    """Random codes, scale and zero (or None) of a weight."""
    N, K, group_size = shape
    g = torch.Generator().manual_seed(seed)
    G = groups(K, group_size or K)
    codes = torch.randint(0, 2**bits, (N, K), generator=g)
    scale = torch.rand(N, G, generator=g).add(0.1).half()
    if zeros == "int":
        return codes, scale, torch.randint(0, 2**bits, (N, G), generator=g)
    return codes, scale, torch.randn(N, G, generator=g).mul(3).half() if zeros == "float" else None


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
    packed = Uniform.pack(codes, scale, zero, bits, shape[2])
    assert torch.equal(packed.unpack(), definition(codes, scale, zero, bits, shape[2]))
    assert torch.equal(packed.codes().long(), codes)


@BITS
@ZEROS
@SHAPES
def test_a_slice_of_rows_is_that_slice_of_the_whole(shape, bits, zeros):
    packed = Uniform.pack(*parts(shape, bits, zeros), bits, shape[2])
    N, whole = shape[0], packed.unpack()
    for start in {0, 1, 31, 32, N // 2, N - 1}:
        for stop in {start, start + 1, start + 7, N}:
            assert torch.equal(packed.unpack(slice(start, stop)), whole[start:stop])


@BITS
@ZEROS
@SHAPES
def test_spec_and_tensors_rebuild_the_weight(shape, bits, zeros):
    packed = Uniform.pack(*parts(shape, bits, zeros), bits, shape[2])
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
    packed = Uniform.pack(*parts(shape, bits, zeros), bits, shape[2])
    N, K, group_size = shape
    G = groups(K, group_size or K)
    zero_bytes = {"absent": 0, "int": G * -(-N // 32) * bits * 4, "float": N * G * 2}[zeros]
    assert packed.nbytes == N * -(-K // 32) * bits * 4 + N * G * 2 + zero_bytes
    assert packed.nbytes == sum(len(t.contiguous().view(torch.uint8).flatten()) for t in packed.tensors().values())
    assert packed.bits_per_weight == 8 * packed.nbytes / (N * K)


@BITS
def test_whole_rows_cost_exactly_their_bits(bits):
    codes = torch.zeros(64, 1024, dtype=torch.long)
    packed = Uniform.pack(codes, torch.ones(64, 8).half(), torch.zeros(64, 8, dtype=torch.long), bits, 128)
    assert packed.bits_per_weight == bits + 16 / 128 + bits / 128


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
