"""Laws of every format: its docstring's equation, read bit by bit from the stored words, is what everything returns."""

import dataclasses
import math

import pytest
import torch
from checks import TOLERANCE, assert_close
from safetensors.torch import save_file

from lrec import formats, kernels, registry
from lrec.eight_bits import exponents, round_scales, round_zeros
from lrec.formats.binary import Binary
from lrec.formats.codebook import Codebook, dynamic_levels
from lrec.formats.indexed import Indexed
from lrec.formats.latent import Latent
from lrec.formats.outlier import Outlier
from lrec.formats.salient import Salient
from lrec.formats.ternary import Ternary
from lrec.formats.uniform import Uniform

SHAPES = [(41, 401), (33, 1271), (5, 16), (64, 256), (1, 48)]


def fields(words, bits, n):
    """The first n fields of `bits` bits of one little-endian bit stream, by plain integer arithmetic."""
    stream = int.from_bytes(words.contiguous().numpy().tobytes(), "little")
    return [stream >> i * bits & (1 << bits) - 1 for i in range(n)]


def rows_of(words, bits, n):
    """`fields` of each row, as float64."""
    return torch.tensor([fields(row, bits, n) for row in words], dtype=torch.float64)


def group_of(K, group_size):
    return torch.arange(K) // group_size


def random_codes(shape, bits):
    return torch.randint(0, 2**bits, shape)


def halves(*shape):
    return torch.randn(*shape).half()


def make_uniform(N, K, kind):
    bits, g, zero = kind
    G = math.ceil(K / g)
    zeros = {"none": None, "int": random_codes((N, G), bits), "float": halves(N, G)}
    if zero in zeros:
        return Uniform.pack(random_codes((N, K), bits), halves(N, G), zeros[zero], bits, g)
    scale = torch.rand(N, G) ** 4 + 0.001
    zeros = {"int8": zeros["int"], "float8": round_zeros(zeros["float"], bits)}
    return Uniform.pack(random_codes((N, K), bits), round_scales(scale, exponents(scale)), zeros[zero], bits, g, 8)


def read_uniform(p):
    N, K = p.shape
    group = group_of(K, p.group_size)
    q = rows_of(p.qweight, p.bits, K)
    if p.zero is None:
        zero = torch.full((N, K), 2.0 ** (p.bits - 1), dtype=torch.float64)
    elif p.zero.is_floating_point():
        zero = p.zero.double()[:, group]
    elif p.zero.dtype == torch.uint8:
        zero = (p.zero.double()[:, group] - 64) * 2.0 ** (p.bits - 7)
    else:
        zero = rows_of(p.zero, p.bits, N).t()[:, group]
    scale = p.scale.double()
    if p.scale.dtype == torch.uint8:
        exponent = torch.tensor([[p.scale_exponent[n // 32].item()] for n in range(N)]).double()
        normal = (32 + scale % 32) * 2 ** (exponent + scale // 32 - 12)
        scale = torch.where(scale < 32, scale * 2 ** (exponent - 11), normal)
    return scale[:, group] * (q - zero)


def make_indexed(N, K, kind):
    bits, zero = kind
    G = math.ceil(K / 16)
    zeros = formats.pack_codes(random_codes((G, N), bits), bits) if zero == "int" else None
    qweight, group = formats.pack_codes(random_codes((N, K), bits), bits), torch.randint(0, G, (K,)).int()
    return Indexed(shape=(N, K), bits=bits, qweight=qweight, scale=halves(N, G), group=group, zero=zeros)


def read_indexed(p):
    N, K = p.shape
    zero = torch.full((N, p.scale.shape[1]), 2.0 ** (p.bits - 1), dtype=torch.float64)
    if p.zero is not None:
        zero = rows_of(p.zero, p.bits, N).t()
    group = p.group.long()
    return p.scale.double()[:, group] * (rows_of(p.qweight, p.bits, K) - zero[:, group])


def make_latent(N, K, kind):
    held = Latent.of(make_uniform(N, K, kind))
    u = torch.randn(N, K) * 2**held.bits  # beyond the outermost codes on both sides
    return dataclasses.replace(held, qweight=torch.where(u % 1 == 0.5, u + 0.25, u))


def read_latent(p):
    q = (p.qweight.double() + 0.5).floor().clamp(0, 2**p.bits - 1)
    held = dataclasses.replace(p, qweight=formats.pack_codes(q.long(), p.bits))
    return read_uniform(held)


def make_codebook(N, K, kind):
    bits, tables, scales, block = kind
    g = 16
    shape = {"tensor": (), "row": (N,), "group": (N, math.ceil(K / g))}[tables]
    blocks = math.ceil(N * K / (block or N * K))
    double = (
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.rand(math.ceil(blocks / 256)),
        torch.rand(1),
    )
    scale = {"none": None, "float": torch.rand(blocks), "double": double}[scales]
    table = torch.randn(*shape, 2**bits)
    return Codebook.pack(random_codes((N, K), bits), table, group_size=g, scale=scale, block_size=block)


def read_codebook(p):
    N, K = p.shape
    q = rows_of(p.qweight, p.bits, K).long()
    n, k = torch.arange(N)[:, None], torch.arange(K)[None]
    if p.table.dim() == 1:
        w = p.table.double()[q]
    elif p.table.dim() == 2:
        w = p.table.double()[n, q]
    else:
        w = p.table.double()[n, k // p.group_size, q]
    if p.scale is None:
        return w
    scale = p.scale.double()
    if p.scale_scale is not None:
        levels = torch.tensor([dynamic_levels()[int(c)] for c in p.scale], dtype=torch.float64)
        scale = levels * p.scale_scale.double()[torch.arange(len(levels)) // 256] + p.scale_offset.double()
    return w * scale[(n * K + k) // p.block_size]


def make_binary(N, K, kind):
    P, g = kind
    g = g or K
    G = math.ceil(K / g)
    return Binary.pack(random_codes((N, K), P), halves(N, G, P), halves(N, G), g)


def read_binary(p):
    K = p.shape[1]
    group = group_of(K, p.group_size)
    w = p.offset.double()[:, group]
    for plane in range(p.alpha.shape[2]):
        w = w + p.alpha.double()[:, group, plane] * (2 * rows_of(p.qweight[:, plane], 1, K) - 1)
    return w


def make_ternary(N, K, kind):
    g = kind or K
    return Ternary.pack(torch.randint(-1, 2, (N, K)), halves(N, math.ceil(K / g)), g)


def read_ternary(p):
    K = p.shape[1]
    trits = [[int(row[k // 5]) // 3 ** (k % 5) % 3 - 1 for k in range(K)] for row in p.qweight]
    return p.scale.double()[:, group_of(K, p.group_size)] * torch.tensor(trits, dtype=torch.float64)


def make_salient(N, K, kind):
    S = max(1, K // kind)
    mask = torch.zeros(K, dtype=torch.bool)
    mask[torch.randperm(K)[:S]] = True
    salient = (random_codes((N, S), 4), halves(N), random_codes((N,), 4))
    return Salient.pack(mask, salient, random_codes((N, K - S), 1), (halves(N), halves(N), halves(K - S)))


def read_salient(p):
    N, K = p.shape
    mask = fields(p.mask, 1, K)
    S = sum(mask)
    q, b = rows_of(p.salient, 4, S), rows_of(p.qweight, 1, K - S)
    zero = torch.tensor(fields(p.salient_zero, 4, N), dtype=torch.float64)
    w = torch.empty(N, K, dtype=torch.float64)
    i = j = 0
    for k in range(K):
        if mask[k]:
            w[:, k] = p.salient_scale.double() * (q[:, i] - zero)
            i += 1
        else:
            w[:, k] = p.column.double()[j] * (p.scale.double() * (2 * b[:, j] - 1) + p.offset.double())
            j += 1
    return w


def make_outlier(N, K, kind):
    bits, index_bits, share, stored = kind
    levels = halves(N, 2, 2**bits) if stored == "table" else (halves(N, 2), halves(N, 2))
    return Outlier.pack(random_codes((N, K), bits), torch.rand(N, K) < share, levels, bits, index_bits)


def read_outlier(p):
    N, K = p.shape
    jump, symbols = 2**p.index_bits - 1, fields(p.index, p.index_bits, int(p.starts[-1]))
    outlier = torch.zeros(N * K, dtype=torch.bool)
    for tile in range(len(p.starts) - 1):
        at = tile * p.tile - 1
        for symbol in symbols[p.starts[tile] : p.starts[tile + 1]]:
            at += jump if symbol == jump else symbol + 1
            if symbol != jump:
                outlier[at // K * K + at % K * p.stride % K] = True
    outlier, q = outlier.view(N, K), rows_of(p.qweight, p.bits, K)
    n = torch.arange(N)[:, None]
    if p.table is not None:
        return p.table.double()[n, outlier.long(), q.long()]
    scale, base, half = p.scale.double(), p.base.double(), 2 ** (p.bits - 1)
    tail = base[n, 1] + scale[n, 1] * (q % half)
    return torch.where(outlier, torch.where(q < half, -tail, tail), base[n, 0] + scale[n, 0] * q)


# For each format: how to make one, how to read it, and the kinds of it.
FORMATS = {
    "uniform": (
        make_uniform,
        read_uniform,
        [(2, 16, "int"), (3, 16, "none"), (4, 16, "float"), (8, 16, "int"), (3, 16, "int8"), (2, 16, "float8")],
    ),
    "latent": (make_latent, read_latent, [(2, 16, "int"), (3, 16, "none"), (2, 16, "float"), (2, 16, "float8")]),
    "codebook": (
        make_codebook,
        read_codebook,
        [(4, "tensor", "double", 64), (4, "tensor", "float", 37), (3, "row", "none", 0), (2, "group", "double", 7)],
    ),
    "binary": (make_binary, read_binary, [(1, 16), (2, 16), (3, 0), (4, 16)]),
    "ternary": (make_ternary, read_ternary, [0, 16]),
    "salient": (make_salient, read_salient, [5, 2]),
    "indexed": (make_indexed, read_indexed, [(2, "int"), (3, "none"), (4, "int")]),
    "outlier": (
        make_outlier,
        read_outlier,
        [(2, 6, 0.05, "table"), (3, 5, 0.3, "span"), (4, 7, 0.005, "span"), (2, 4, 0.0, "table"), (2, 6, 1.1, "span")],
    ),
}
CASES = [(name, kind, shape) for name, (_, _, kinds) in FORMATS.items() for kind in kinds for shape in SHAPES]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, (case[0], *case[2], case[1]))).replace(" ", ""))
def packed(request):
    name, kind, shape = request.param
    torch.manual_seed(len(str(request.param)))
    return FORMATS[name][0](*shape, kind)


def test_every_format_is_tested():
    assert set(FORMATS) == set(registry.names("formats"))


def test_unpack_is_the_equation(packed):
    w = packed.unpack()
    assert w.dtype == torch.float32
    assert_close(w, FORMATS[packed.name()][1](packed), TOLERANCE[torch.float32])


def test_row_slices_are_slices_of_the_whole(packed):
    w, N = packed.unpack(), packed.shape[0]
    for start, stop in [
        (0, 1),
        (N - 1, N),
        (N // 3, N),
        (N // 2, 2 * N // 3 + 1),
        (N // 2, N // 2),
        (N, N),
        (0, N + 9),
    ]:
        assert torch.equal(packed.unpack(slice(start, stop)), w[start:stop]), (start, stop)


def test_bits_per_weight_are_the_bytes_of_the_saved_file(packed, tmp_path):
    save_file(packed.tensors(), tmp_path / "weight.safetensors")
    data = (tmp_path / "weight.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert packed.nbytes == len(data) - header
    assert packed.bits_per_weight == pytest.approx(8 * (len(data) - header) / math.prod(packed.shape), rel=1e-12)


def test_tensors_and_spec_rebuild_the_weight(packed):
    spec = formats.parse_key(formats.spec_key(packed.spec()))
    again = formats.build(packed.tensors(), spec)
    assert torch.equal(again.unpack(), packed.unpack())
    assert again.spec() == packed.spec() == formats.empty(spec).spec()
    assert next(iter(packed.tensors())) == "qweight"


def test_identity_decodes_bit_for_bit_in_the_reference(packed, monkeypatch):
    monkeypatch.setenv("LREC_KERNEL", "reference")
    N, K = packed.shape
    assert torch.equal(kernels.matmul(torch.eye(K), packed).t(), packed.unpack())
    assert torch.equal(kernels.matmul(torch.eye(N), packed, transpose=True), packed.unpack())


@pytest.mark.filterwarnings("ignore:lrec. .* use the reference kernel")
@pytest.mark.parametrize("T", [0, 1, 7])
def test_product_and_gradient_in_float64(packed, T):
    N, K = packed.shape
    x = torch.randn(K, T, dtype=torch.float64).t().requires_grad_()
    upstream = torch.randn(T, N, dtype=torch.float64)
    y = kernels.matmul(x, packed)
    y.backward(upstream)
    w = packed.unpack().double()
    assert_close(y.detach(), x.detach() @ w.t(), TOLERANCE[torch.float64])
    assert_close(x.grad, upstream @ w, TOLERANCE[torch.float64])
