"""The kernels on a GPU: the same law as on the CPU, at sizes that models have too. Run by `make gpu`.

Without an NVIDIA GPU these tests are skipped; with one, a torch that cannot use it fails them.
"""

import shutil
from pathlib import Path

import pytest
import torch

from lrec import kernels, registry
from lrec.formats.uniform import Uniform
from lrec.kernels import Call
from lrec.kernels.fused_triton import FusedTriton
from lrec.kernels.gpu import tiling
from lrec.kernels.gpu.tiling import Weight
from lrec.kernels.slab_triton import SlabTriton
from tests.checks import TOLERANCE, assert_close
from tests.numeric.test_kernels import DTYPES, EXAMPLES, ROUNDS, binary, example

PRESENT = shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason="no NVIDIA GPU on this machine")]
CASES = [(format_name, case) for format_name, cases in EXAMPLES.items() for case in cases]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 products are float32, and a kernel that is not asked for by name is chosen anew."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.delenv("LREC_KERNEL", raising=False)
    kernels._choose.cache_clear()


def served(kernel, packed, dtype, transpose=False):
    """Whether a kernel takes any number of rows on the GPU."""
    return kernel.refuses(Call("cuda", dtype, 1, transpose), packed.spec()) is None


@pytest.mark.parametrize(("format_name", "case"), CASES)
def test_products_equal_float64(format_name, case):
    packed = example(format_name, case)
    w_NK, on_gpu = packed.unpack().double(), packed.to("cuda")
    for name in registry.names("kernels"):
        kernel = registry.find("kernels", name)
        for dtype in DTYPES:
            for transpose in (False, True):
                if not served(kernel, packed, dtype, transpose):
                    continue
                for T in (0, 1, 33):
                    x = torch.randn(T, packed.shape[0 if transpose else 1]).to(dtype)
                    y = kernel.matmul(x.cuda(), on_gpu, transpose)
                    assert y.dtype is dtype
                    expected = x.double() @ (w_NK if transpose else w_NK.t())
                    assert_close(y.cpu(), expected, TOLERANCE[dtype], f"{name} {dtype} T={T} transpose={transpose}")


@pytest.mark.parametrize(("format_name", "case"), CASES)
def test_decoded_values_are_those_of_unpack_bit_for_bit(format_name, case):
    packed = example(format_name, case)
    on_gpu, w_NK = packed.to("cuda"), packed.unpack()
    for kernel, dtype in ((SlabTriton, torch.float32), (FusedTriton, torch.float16)):
        if kernel is FusedTriton and ("fused_triton", format_name) in ROUNDS:
            continue
        if served(kernel, packed, dtype):
            eye = torch.eye(packed.shape[1], dtype=dtype, device="cuda")
            assert torch.equal(kernel.matmul(eye, on_gpu, False).cpu(), w_NK.t().to(dtype)), kernel.__name__
        if served(kernel, packed, dtype, transpose=True):
            eye = torch.eye(packed.shape[0], dtype=dtype, device="cuda")
            assert torch.equal(kernel.matmul(eye, on_gpu, True).cpu(), w_NK.to(dtype)), f"{kernel.__name__}, dY W"


def large(name):
    """A random weight of a 7B model's size, on the GPU."""
    if name == "binary":
        return binary(4096, 11008, 2, 128, torch.float16).to("cuda")
    bits, N, K = int(name[0]), 11008, 4096
    words = torch.randint(-(2**31), 2**31, (N, K // 32 * bits), dtype=torch.int32, device="cuda")
    scale, zero = (torch.rand(N, K // 128, device="cuda").half() + 0.1 for _ in range(2))
    return Uniform(shape=(N, K), bits=bits, group_size=128, qweight=words, scale=scale, zero=zero * 2**bits / 2)


@pytest.mark.parametrize("name", ["2bit", "3bit", "4bit", "8bit", "binary"])
def test_configs_of_a_large_layer_are_right_and_repeat(name):
    from triton.runtime.errors import OutOfResources

    from lrec.kernels.gpu.fused import product

    packed = large(name)
    w_NK = packed.unpack().double()
    for T in (1, 5, 16, 64):
        x = 0.02 * torch.randn(T, packed.shape[1], device="cuda").bfloat16()
        x[:, 11] *= 300  # as activations have them
        expected = x.double() @ w_NK.t()
        configs = tiling.candidates(Weight.of(packed), T)
        for config in configs if (name, T) == ("2bit", 1) else configs[:1]:
            try:
                y = product(x, packed, config)
            except OutOfResources:  # a card with less shared memory; the default must fit all the same
                assert config != tiling.default(Weight.of(packed), T)
                continue
            assert_close(y, expected, TOLERANCE[torch.bfloat16], str(config))
            # What the accumulators hold, before y is rounded: tensor cores must take subnormal halves as they are.
            half = product(x.half(), packed, config)
            assert_close(half, x.half().double() @ w_NK.t(), TOLERANCE[torch.float16], f"half, {config}")
            assert torch.equal(y, product(x, packed, config)), f"two runs of {config} differ"


@pytest.mark.parametrize("name", ["2bit", "3bit", "4bit", "8bit", "binary"])
def test_fused_gradients_of_a_large_layer_are_right_and_repeat(name):
    from lrec.kernels.gpu.gradient import gradient

    packed = large(name)
    w_NK = packed.unpack().double()
    for T in (1, 5, 16):
        dy = 0.02 * torch.randn(T, packed.shape[0], device="cuda").bfloat16()
        dy[:, 11] *= 300
        config = tiling.default_gradient(Weight.of(packed), T)
        for dtype in (torch.bfloat16, torch.float16):
            dx = gradient(dy.to(dtype), packed, config)
            assert_close(dx, dy.to(dtype).double() @ w_NK, TOLERANCE[dtype], f"{dtype}, T={T}")
            assert torch.equal(dx, gradient(dy.to(dtype), packed, config)), "two runs differ"


@pytest.mark.parametrize("name", ["2bit", "3bit", "binary"])
def test_gradients_of_a_large_layer(name):
    packed = large(name)
    w_NK = packed.unpack().double()
    for T in (4, 2048):
        x = torch.randn(T, packed.shape[1], device="cuda").bfloat16().requires_grad_()
        upstream = torch.randn(T, packed.shape[0], device="cuda").bfloat16()
        y = kernels.matmul(x, packed)
        y.backward(upstream)
        assert_close(y.detach(), x.detach().double() @ w_NK.t(), TOLERANCE[torch.bfloat16], f"y, T={T}")
        assert_close(x.grad, upstream.double() @ w_NK, TOLERANCE[torch.bfloat16], f"dx, T={T}")


def test_a_layer_takes_no_more_memory_than_two_slabs():
    from lrec.kernels.slab_triton import SLAB_BYTES

    packed = large("2bit")
    x = torch.randn(1024, packed.shape[1], device="cuda").bfloat16()
    kernels.matmul(x, packed)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = kernels.matmul(x, packed)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 2 * SLAB_BYTES + 2**20


def test_a_graph_of_calls_replays():
    packed = large("2bit")
    x = torch.randn(1, packed.shape[1], device="cuda").bfloat16()
    expected = kernels.matmul(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.matmul(x, packed)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
