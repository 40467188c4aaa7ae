"""Every kernel that serves a format on this CPU equals float64 arithmetic on the decoded weights.

Registering a kernel or a format is what tests it: the cases are all pairs for which the kernel does not refuse. Triton
kernels are among them where its interpreter runs them (`TRITON_INTERPRET=1`), as test_triton.py has it.
"""

import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from lrec import formats, kernels, registry
from lrec.eight_bits import exponents, round_scales, round_zeros
from lrec.formats.binary import Binary
from lrec.formats.codebook import Codebook
from lrec.formats.indexed import Indexed
from lrec.formats.latent import Latent
from lrec.formats.outlier import Outlier
from lrec.formats.salient import Salient
from lrec.formats.ternary import Ternary
from lrec.formats.uniform import Uniform, groups
from lrec.kernels import Call
from tests.checks import TOLERANCE, assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = (0, 1, 2, 3, 5, 16, 17, 33)
# Levels, and what columns carry, become halves on their way into the product, so a decoded weight is rounded twice.
ROUNDS = {("fused_triton", "codebook"), ("fused_triton", "salient"), ("fused_triton", "outlier")}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Interpreted kernels take a tenth of a second, and only their tiles depend on the rows of x, only their loads and
# stores on its dtype.
CALLS = [(dtype, T) for dtype in DTYPES for T in ROWS]
if INTERPRETED:
    CALLS = [(torch.float32, 9), (torch.float16, 0), (torch.float16, 1), (torch.bfloat16, 9)]


def uniform(N, K, bits, group_size, zero, scale_bits=16):
    """Random codes; `zero` is None, "codes" or the dtype of a float zero."""
    G = groups(K, group_size or K)
    zeros = None
    if zero is not None:
        codes = zero == "codes"
        zeros = torch.randint(0, 2**bits, (N, G)) if codes else (torch.rand(N, G) * (2**bits - 1)).to(zero)
    codes, scales = torch.randint(0, 2**bits, (N, K)), (torch.rand(N, G) + 0.1).half()
    if scale_bits == 8:
        scales = round_scales(scales.float(), exponents(scales))
        zeros = round_zeros(zeros, bits) if zeros is not None and zeros.is_floating_point() else zeros
    return Uniform.pack(codes, scales, zeros, bits, group_size, scale_bits)


def latent(*shape_and_grid):
    """Random codes with floats behind them."""
    held = Latent.of(uniform(*shape_and_grid))
    return replace(held, qweight=held.qweight + torch.rand(held.shape) - 0.5)


def codebook(N, K, bits, table_shape, group_size=0, block_size=0, twice=False, dtype=torch.float32):
    """Random levels for the weight, rows or groups, and scales of blocks, quantized `twice`, if these have a size."""
    B = -(-N * K // block_size) if block_size else 0
    scale = (torch.rand(B) + 0.5).to(dtype) if block_size else None
    if twice:
        scale = torch.randint(0, 256, (B,)).to(torch.uint8), torch.rand(-(-B // 256)) + 0.1, torch.rand(1) + 1
    codes, table = torch.randint(0, 2**bits, (N, K)), torch.randn(*table_shape, 2**bits).to(dtype)
    return Codebook.pack(codes, table, group_size=group_size, scale=scale, block_size=block_size)


def binary(N, K, planes, group_size, dtype=torch.float32):
    """Random signs, alphas and offsets."""
    G = groups(K, group_size or K)
    alpha, offset = torch.rand(N, G, planes).to(dtype), torch.randn(N, G).to(dtype)
    return Binary.pack(torch.randint(0, 2**planes, (N, K)), alpha, offset, group_size)


def outlier(N, K, bits, index_bits=6, share=0.05, spanned=False, tile=16384):
    """Outliers, by default five per cent, with a table of their own, or `spanned` by scales and bases."""
    codes, levels = torch.randint(0, 2**bits, (N, K)), torch.randn(N, 2, 2**bits)
    if spanned:
        levels = (torch.rand(N, 2) + 0.1).half(), torch.randn(N, 2).half()
    return Outlier.pack(codes, torch.rand(N, K) < share, levels, bits, index_bits, tile)


def salient(N, K, share=0.2):
    """A share of the columns in four bits."""
    mask = torch.rand(K) < share
    S = int(mask.sum())
    four_bits = torch.randint(0, 16, (N, S)), torch.rand(N) + 0.1, torch.randint(0, 16, (N,))
    return Salient.pack(
        mask, four_bits, torch.randint(0, 2, (N, K - S)), (torch.rand(N), torch.randn(N), torch.rand(K - S))
    )


def indexed(N, K, bits):
    """Groups that are no runs of columns."""
    qweight, G = formats.pack_codes(torch.randint(0, 2**bits, (N, K)), bits), groups(K, 32)
    zero = formats.pack_codes(torch.randint(0, 2**bits, (G, N)), bits)
    scale, group = torch.rand(N, G) + 0.1, torch.randint(0, G, (K,)).int()
    return Indexed(shape=(N, K), bits=bits, qweight=qweight, scale=scale, group=group, zero=zero)


def ternary(N, K, group_size):
    """Random trits."""
    return Ternary.pack(torch.randint(-1, 2, (N, K)), torch.rand(N, groups(K, group_size or K)) + 0.1, group_size)


EXAMPLES = {
    "uniform": {
        f"{bits}bit-g{group_size}-{N}x{K}-zero-{zero}".replace("torch.", ""): (uniform, N, K, bits, group_size, zero)
        for bits in (2, 3, 4, 8)
        for N, K, group_size, zero in (
            (41, 401, 16, None),
            (41, 401, 128, torch.float16),
            (37, 1271, 64, "codes"),
            (19, 203, 64, "codes"),
            (64, 576, 48, "codes"),
            (7, 200, 100, torch.float32),
            (33, 576, 0, None),
            (3, 17, 0, "codes"),
            (130, 2048, 256, torch.float16),
        )
    }
    | {
        f"{bits}bit-scales8-zero-{zero}".replace("torch.", ""): (uniform, 41, 401, bits, 64, zero, 8)
        for bits, zero in ((2, torch.float16), (3, "codes"), (4, torch.float16), (8, None))
    },
    "latent": {"2bit": (latent, 41, 401, 2, 64, torch.float32), "3bit-symmetric": (latent, 19, 203, 3, 64, None)},
    "codebook": {
        "2bit-weight-blocks": (codebook, 41, 401, 2, (), 0, 64),
        "3bit-rows": (codebook, 41, 401, 3, (41,)),
        "2bit-groups-of-100-blocks-of-48": (codebook, 33, 576, 2, (33, 6), 100, 48, False, torch.float16),
        "3bit-groups-of-7": (codebook, 5, 41, 3, (5, 6), 7),
        "4bit-groups": (codebook, 41, 1271, 4, (41, 20), 64),
        "4bit-weight-blocks": (codebook, 33, 576, 4, (), 0, 64),
        "4bit-blocks-twice": (codebook, 130, 401, 4, (), 0, 64, True),
        "3bit-rows-blocks-longer-than-rows": (codebook, 37, 100, 3, (37,), 0, 256, True, torch.bfloat16),
    },
    "binary": {
        "1plane": (binary, 41, 401, 1, 0),
        "2planes": (binary, 41, 1271, 2, 128),
        "3planes": (binary, 33, 576, 3, 64),
        "4planes": (binary, 37, 401, 4, 20, torch.float16),
        "1plane-groups": (binary, 5, 200, 1, 24),
    },
    "outlier": {
        "2bit": (outlier, 41, 401, 2),
        "3bit": (outlier, 41, 1271, 3),
        "4bit-spanned": (outlier, 17, 576, 4, 5, 0.05, True, 1000),
        "2bit-rare": (outlier, 64, 576, 2, 4, 0.001),
        "2bit-none": (outlier, 5, 33, 2, 7, 0.0),
        "3bit-dense-small-tiles": (outlier, 9, 203, 3, 4, 0.6, False, 100),
    },
    "salient": {
        "odd": (salient, 41, 401),
        "even": (salient, 64, 576),
        "all": (salient, 7, 33, 1.0),
        "none": (salient, 7, 33, 0.0),
    },
    "ternary": {
        "rows": (ternary, 41, 401, 0),
        "groups": (ternary, 41, 1271, 64),
        "groups-of-20": (ternary, 37, 576, 20),
        "tiny": (ternary, 3, 3, 0),
    },
    "indexed": {"3bit": (indexed, 41, 401, 3), "4bit": (indexed, 37, 1271, 4)},
}


def example(format_name, case):
    """A seeded weight of one of the cases above."""
    torch.manual_seed(0)
    make, *settings = EXAMPLES[format_name][case]
    return make(*settings)


def served(kernel, packed, dtype, num_rows, transpose=False):
    """Whether the kernel takes the call when it is asked for by name."""
    with pytest.MonkeyPatch.context() as asked:
        asked.setenv("LREC_KERNEL", kernel.__module__.rpartition(".")[2])
        return kernel.refuses(Call("cpu", dtype, num_rows, transpose), packed.spec()) is None


def widest(kernel, packed):
    """The widest dtype of which the kernel takes one row; None if it takes none."""
    return next((dtype for dtype in DTYPES if served(kernel, packed, dtype, 1)), None)


@cache
def pairs():
    """(kernel name, format, case) for all of which a kernel takes one row."""
    return [
        (name, format_name, case)
        for name in registry.names("kernels")
        for format_name, cases in EXAMPLES.items()
        for case in cases
        if widest(registry.find("kernels", name), example(format_name, case))
    ]


def multiplied(kernel, x, packed):
    """The x that stands in the product: a kernel that rounds activations says to what."""
    return kernel.activations(x, packed) if hasattr(kernel, "activations") else x


@pytest.fixture
def poisoned():
    """torch.empty holds NaN, so an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all() and torch.ones(1).new_empty(3, 5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(registry.names("formats"))


@pytest.mark.parametrize(("name", "format_name", "case"), pairs())
def test_product_equals_float64(poisoned, name, format_name, case):
    kernel, packed = registry.find("kernels", name), example(format_name, case)
    w_NK = packed.unpack().double()
    checked = 0
    for dtype, T in CALLS:
        for transpose in (False, True):
            if served(kernel, packed, dtype, T, transpose):
                inner = packed.shape[0 if transpose else 1]
                x = torch.randn(T, inner, generator=torch.Generator().manual_seed(T)).to(dtype)
                y = kernel.matmul(x, packed, transpose)
                assert y.dtype is dtype
                expected = multiplied(kernel, x, packed).double() @ (w_NK if transpose else w_NK.t())
                assert_close(y, expected, TOLERANCE[dtype], f"{dtype} T={T} transpose={transpose}")
                checked += 1
    assert checked >= len({T for _, T in CALLS})


@pytest.mark.parametrize(("name", "format_name", "case"), pairs())
def test_x_need_not_be_contiguous(poisoned, name, format_name, case):
    kernel, packed = registry.find("kernels", name), example(format_name, case)
    dtype = widest(kernel, packed)
    for T in (1, 3, 33) if not INTERPRETED else (3,):
        for x in (
            torch.randn(packed.shape[1], T, dtype=dtype).t(),
            torch.randn(T, 2 * packed.shape[1], dtype=dtype)[:, ::2],
            torch.randn(2 * T, packed.shape[1], dtype=dtype)[::2],
        ):
            if served(kernel, packed, x.dtype, T):
                expected = multiplied(kernel, x, packed).double() @ packed.unpack().double().t()
                assert_close(kernel.matmul(x, packed, False), expected, TOLERANCE[x.dtype], f"strides {x.stride()}")


@pytest.mark.parametrize(("name", "format_name", "case"), pairs())
def test_gradient_equals_float64(poisoned, monkeypatch, name, format_name, case):
    kernel, packed = registry.find("kernels", name), example(format_name, case)
    for T in (1, 33):
        if not (served(kernel, packed, torch.float32, T) and served(kernel, packed, torch.float32, T, True)):
            continue
        monkeypatch.setenv("LREC_KERNEL", name)
        x = torch.randn(T, packed.shape[1], requires_grad=True)
        upstream = torch.randn(packed.shape[0], T).t()
        kernels.matmul(x, packed).backward(upstream)
        assert_close(x.grad, upstream.double() @ packed.unpack().double(), TOLERANCE[torch.float32], f"dx, T={T}")


@pytest.mark.parametrize(("name", "format_name", "case"), pairs())
def test_identity_gives_the_decoded_weight_bit_for_bit(poisoned, name, format_name, case):
    kernel, packed = registry.find("kernels", name), example(format_name, case)
    dtype = widest(kernel, packed)
    # Interpreted, a row of the identity costs as much as all columns of W, which the product has been tested with.
    some = slice(None, None, 7 if INTERPRETED and name == "fused_triton" else 1)
    eye_KK, w_NK = torch.eye(packed.shape[1], dtype=dtype), packed.unpack().to(dtype)
    if hasattr(kernel, "activations"):
        pytest.skip(f"{name} rounds activations: its scale 1/127 is no power of two")
    if (name, format_name) in ROUNDS:
        pytest.skip(f"{name} rounds parts of {format_name} weights to halves")
    assert torch.equal(kernel.matmul(eye_KK[some], packed, False), w_NK.t()[some])
    step = 3 if not INTERPRETED else packed.shape[1]
    for start in range(0, packed.shape[1], step):  # few rows of x, which kernels serve by other code than many
        if served(kernel, packed, dtype, 3):
            assert torch.equal(kernel.matmul(eye_KK[start : start + 3], packed, False), w_NK.t()[start : start + 3])
    if served(kernel, packed, dtype, packed.shape[0], True):
        eye_NN = torch.eye(packed.shape[0], dtype=dtype)
        assert torch.equal(kernel.matmul(eye_NN[some], packed, True), w_NK[some])


@pytest.mark.parametrize(("name", "format_name", "case"), pairs())
def test_arguments_survive(name, format_name, case):
    kernel, packed = registry.find("kernels", name), example(format_name, case)
    before = {key: value.clone() for key, value in packed.tensors().items()}
    x = torch.randn(3, packed.shape[1], dtype=widest(kernel, packed))
    kept = x.clone()
    first = kernel.matmul(x, packed, False)
    assert INTERPRETED or torch.equal(first, kernel.matmul(x, packed, False)), "two runs differ"
    assert torch.equal(x, kept)
    assert all(torch.equal(before[key], value) for key, value in packed.tensors().items())


def test_formats_build_what_the_examples_hold():
    for format_name, cases in EXAMPLES.items():
        for case in cases:
            packed = example(format_name, case)
            again = formats.build(packed.tensors(), packed.spec())
            assert torch.equal(again.unpack(), packed.unpack())
