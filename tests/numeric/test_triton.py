"""The Triton kernels under Triton's interpreter: the numeric suite, and what is theirs alone.

Triton decides when it is imported whether it interprets, so this file runs itself and the suite in a process of its
own.
"""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrec import kernels
from lrec.kernels import Call, LowRank, fused_triton, gpu, slab_triton
from lrec.kernels.fused_triton import FusedTriton
from lrec.kernels.gpu import tiling, tuning
from lrec.kernels.gpu.tiling import Config, Weight
from lrec.kernels.slab_triton import SlabTriton
from lrec.lora import lora_linear
from lrec.nn import PackedLinear
from tests.checks import TOLERANCE, assert_close
from tests.numeric.test_kernels import EXAMPLES, INTERPRETED, binary, codebook, example, ternary, uniform

ROOT = Path(__file__).parents[2]
# Of the suite's cases, for each kind of codes, zeros and scales, and of group that a tile holds, cuts or lies in.
PRODUCTS = (
    "2bit-g64-19x203 or 2bit-g100 or 3bit-g64-19x203 or 3bit-g0-3x17 or 4bit-g64-19x203 or 8bit-g0-3x17 or "
    "2bit-scales8 or 2bit-weight-blocks or 3bit-rows or 4bit-weight-blocks or 1plane or odd or ternary-rows or tiny or "
    "spanned or small-tiles"
)
# What slabs decode is seen by identity; their products show how each dtype is stored, and outliers are on their own.
SLABS = "2bit-g64-19x203 or outlier-2bit or 3bit-rows or salient-odd"
DECODED = "groups or 2planes or twice or scales8 or none or all or tiny or longer or spanned or small-tiles"
SUITE = f"""triton and (
    (product and ((fused and ({PRODUCTS})) or (slab and ({SLABS}))))
    or (identity and ({PRODUCTS} or outlier-2bit or 2bit-g128-41x401 or (slab and ({DECODED}))))
    or (contiguous and fused and (2bit-g64-19x203 or salient-odd))
    or (arguments and ({PRODUCTS} or outlier-2bit))
)"""
if INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    # Whoever launches a kernel has patched triton's language for it; triton 3.7 does so again at each call of a
    # function in the kernel, which takes a third of the time.
    patching = InterpretedFunction.__call__
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: (
        self.rewrite()(*args, **kwargs) if self.fn.__module__.startswith("lrec") else patching(self, *args, **kwargs)
    )
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter, in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: no kernel to interpret")
    files = ["tests/numeric/test_triton.py", "tests/numeric/test_kernels.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-k", f"test_triton or ({' '.join(SUITE.split())})", *files],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    for case in (
        "fused_triton-uniform-3bit-g64-19x203-zero-codes",
        "fused_triton-binary-1plane",
        "fused_triton-codebook-4bit-weight-blocks",
        "fused_triton-ternary-rows",
        "fused_triton-salient-odd",
        "slab_triton-salient-odd",
        "slab_triton-outlier-2bit",
    ):
        assert f"test_product_equals_float64[{case}] PASSED" in result.stdout, f"{case} was not among the tests"


@interpreted
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("format_name", "case"),
    [
        ("uniform", "2bit-g128-41x401-zero-float16"),
        ("uniform", "3bit-g64-19x203-zero-codes"),
        ("outlier", "3bit-dense-small-tiles"),
    ],
)
def test_many_slabs_equal_one(monkeypatch, format_name, case, transpose):
    packed = example(format_name, case)
    x = torch.randn(3, packed.shape[0 if transpose else 1])
    whole = SlabTriton.matmul(x, packed, transpose)
    monkeypatch.setattr(slab_triton, "SLAB_BYTES", 1)
    monkeypatch.setattr(slab_triton, "STEP", 128 if transpose else 16)
    assert_close(SlabTriton.matmul(x, packed, transpose), whole, 1e-6)
    assert_close(whole.double(), x.double() @ (packed.unpack() if transpose else packed.unpack().t()).double(), 1e-6)


@interpreted
@pytest.mark.parametrize(
    ("config", "num_rows"),
    [(Config(16, 16, 2, 3, 3), 3), (Config(32, 32, 4, 2, 1), 20), (Config(64, 64, 4, 2, 16), 9)],
)
def test_every_tiling_gives_the_product(config, num_rows):
    from lrec.kernels.gpu.fused import product

    for packed in (uniform(35, 601, 2, 64, torch.float16), uniform(35, 300, 4, 0, None), binary(20, 700, 2, 128)):
        if config.KP in Weight.of(packed).fitting():
            x = torch.randn(num_rows, packed.shape[1]).half()
            y = product(x, packed, config)
            assert_close(y, x.double() @ packed.unpack().double().t(), TOLERANCE[torch.float16], str(config))


@interpreted
@pytest.mark.parametrize(
    ("config", "num_rows"), [(Config(16, 16, 2, 3, 3), 3), (Config(32, 32, 4, 2, 1), 20), (Config(64, 64, 4, 2, 4), 9)]
)
def test_every_tiling_gives_the_gradient(config, num_rows):
    from lrec.kernels.gpu.gradient import gradient

    half = torch.float16
    for packed in (uniform(70, 203, 2, 64, half), uniform(70, 100, 4, 0, None), binary(40, 300, 2, 128, half)):
        if config.KP in Weight.of(packed).fitting():
            dy = torch.randn(num_rows, packed.shape[0]).half()
            dx = gradient(dy, packed, config)
            assert_close(dx, dy.double() @ packed.unpack().double(), TOLERANCE[half], str(config))


@interpreted
@pytest.mark.parametrize(
    ("name", "case", "transpose", "rank"),
    [
        ("uniform", "2bit-g64-19x203-zero-codes", False, 5),
        ("uniform", "2bit-g64-19x203-zero-codes", True, 16),
        ("uniform", "3bit-g0-3x17-zero-codes", False, 1),
        ("uniform", "8bit-g0-3x17-zero-codes", False, 300),
        ("salient", "odd", False, 16),
        ("outlier", "3bit-dense-small-tiles", False, 3),
        ("ternary", "tiny", True, 64),
    ],
)
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_an_adapter_is_added_before_rounding(monkeypatch, name, case, transpose, rank, dtype, wide):
    packed = example(name, case)
    if name == "ternary":
        packed = replace(packed, scale=packed.scale.half())
    inner, width = packed.shape if transpose else packed.shape[::-1]
    x, left = torch.randn(9, inner).to(dtype), torch.randn(9, 3 * rank).to(wide)[:, rank : 2 * rank]
    right = torch.randn(rank, width).to(wide) if transpose else torch.randn(width, rank).to(wide).t()
    w, added = packed.unpack().double(), LowRank(left, right, 0.7)
    exact = x.double() @ (w if transpose else w.t()) + 0.7 * left.double() @ right.double()
    on_the_way = rank <= fused_triton.MAX_RANK
    if on_the_way:
        monkeypatch.setattr(LowRank, "add_to", None)
    y = FusedTriton.matmul_plus(x, packed, transpose, added)
    assert y.dtype is dtype
    assert_close(y, exact, TOLERANCE[dtype] * (0.4 if on_the_way else 1))


@interpreted
@pytest.mark.parametrize("T", [1, 3, 70])
def test_a_lora_step_is_that_of_float64(monkeypatch, T):
    monkeypatch.delenv("LREC_KERNEL", raising=False)
    kernels._choose.cache_clear()
    packed = uniform(48, 256, 2, 64, torch.float16)
    x, upstream, a, b = (torch.randn(shape).bfloat16() for shape in ((T, 256), (T, 48), (4, 256), (48, 4)))
    tensors = [t.clone().requires_grad_() for t in (x, a.float(), b.float())]
    y = lora_linear(tensors[0], PackedLinear(packed), *tensors[1:], scaling=0.5)
    y.backward(upstream)
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    expected = exact[0] @ (packed.unpack().double() + 0.5 * exact[2] @ exact[1]).t()
    expected.backward(upstream.double())
    assert_close(y.detach(), expected.detach(), TOLERANCE[torch.bfloat16], "y")
    for what, found, reference in zip("xAB", tensors, exact, strict=True):
        assert_close(found.grad, reference.grad, TOLERANCE[torch.bfloat16], what)


@interpreted
@pytest.mark.parametrize(
    "packed",
    [
        uniform(21, 576, 2, 48, torch.float16),
        uniform(21, 427, 2, 100, "codes"),
        replace(ternary(21, 576, 64), scale=torch.rand(21, 9).half()),
        replace(ternary(21, 41, 20), scale=torch.rand(21, 3).half()),
        codebook(21, 600, 2, (21,)),
        codebook(21, 576, 4, (), 0, 64),
        codebook(21, 576, 4, (21, 9), 64),
    ],
    ids=["g48", "g100", "trits", "trits in odd bytes", "levels of rows", "levels in blocks", "levels of groups"],
)
def test_groups_that_tiles_cut_and_levels_give_the_product_and_the_gradient(packed):
    from lrec.kernels.gpu.fused import product
    from lrec.kernels.gpu.gradient import gradient

    w_NK = packed.unpack().double()
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, packed.shape[1]).to(dtype)
        assert_close(product(x, packed), x.double() @ w_NK.t(), TOLERANCE[dtype], str(dtype))
    if tiling.refuses(packed.spec(), True) is None:
        dy = torch.randn(3, packed.shape[0]).half()
        assert_close(gradient(dy, packed), dy.double() @ w_NK, TOLERANCE[torch.float16], "dy W")


@interpreted
def test_gradients_of_any_size_keep_their_precision():
    from lrec.kernels.gpu.gradient import gradient

    packed = uniform(200, 128, 2, 64, torch.float16)
    config = replace(tiling.default_gradient(Weight.of(packed), 3), splits=2)
    for size, scale in ((1e-30, 1.0), (1e-4, 1e-3), (1.0, 2e3), (1e30, 0.1)):
        scaled = replace(packed, scale=packed.scale * scale)
        scaled.scale[5, 1] = 0
        dy = (torch.randn(3, 200) * size).bfloat16()
        dy[:, 7] *= 1000  # as gradients have them
        dx, w_NK = gradient(dy, scaled, config), scaled.unpack().double()
        assert_close(dx / size, dy.double() @ w_NK / size, TOLERANCE[torch.bfloat16], f"dy of {size}")
    dy = torch.randn(3, 200).half()
    dy[1, 5] = torch.inf
    dy[2, 6] = torch.nan
    dx = gradient(dy, packed, config)
    assert not dx[1:].isfinite().any(), "what is not finite must stay so"
    assert_close(dx[:1], dy[:1].double() @ packed.unpack().double(), TOLERANCE[torch.float16])


@interpreted
def test_scales_that_change_in_place_are_looked_at_again():
    from lrec.kernels.gpu.terms import scale_up

    scale = torch.tensor([[0.5, 3.0]], dtype=torch.float16)
    assert scale_up(scale).item() == 2.0**12  # 3 * 2^12 is the power below 2^14
    scale.mul_(4)
    assert scale_up(scale).item() == 2.0**10
    assert scale_up(torch.zeros(2)).isfinite().all()


@interpreted
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_x_of_any_size_keeps_its_precision(bits):
    from lrec.kernels.gpu.fused import product

    packed = uniform(64, 1024, bits, 128, torch.float16)
    w_NK = packed.unpack().double()
    config = tiling.default(Weight.of(packed), 3)
    for size in (1e-30, 1e-4, 1.0, 1e30):
        x = (torch.randn(3, 1024) * size).bfloat16()
        x[:, 7] *= 100  # an outlier, as activations have them
        y = product(x, packed, config)
        assert_close(y / size, x.double() @ w_NK.t() / size, TOLERANCE[torch.bfloat16], f"x of {size}")
    x = torch.randn(3, 1024).half()
    x[1, 5] = torch.inf
    x[2, 6] = torch.nan
    y = product(x, packed, config)
    assert not y[1:].isfinite().any(), "what is not finite must stay so"
    assert_close(y[:1], x[:1].double() @ w_NK.t(), TOLERANCE[torch.float16])


@interpreted
def test_fields_are_codes_at_their_bits():
    from lrec.kernels.gpu.fields import factors, places

    for bits, F in tiling.FIELDS.items():
        assert len(places(bits)) == F
        assert all(p + bits <= 10 for p in places(bits)), "beyond ten bits a half is no subnormal"
        assert factors(bits, False, torch.device("cpu")).tolist() == [2.0**-p for p in places(bits)]


@interpreted
def test_rows_decide_between_fused_and_slabs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    packed = uniform(64, 256, 2, 128, None)
    spec, weight = packed.spec(), Weight.of(packed)
    assert weight == Weight.of_spec(spec)
    name, aside = kernels.explain(Call("cpu", torch.bfloat16, 64), spec)
    assert name == "fused_triton" and not aside
    name, aside = kernels.explain(Call("cpu", torch.bfloat16, 65), spec)
    assert (
        name == "slab_triton" and "beyond 64 rows" in aside["fused_triton"] and "not measured" in aside["fused_triton"]
    )
    assert kernels.explain(Call("cpu", torch.bfloat16, 16, transpose=True), spec)[0] == "fused_triton"
    assert kernels.explain(Call("cpu", torch.bfloat16, 17, transpose=True), spec)[0] == "slab_triton"
    assert FusedTriton.chosen(Call("cpu", torch.bfloat16, 1), spec).startswith("up to 64 rows (not measured")
    best = Config(32, 16, 2, 2, 2)
    tuning.record({tuning.shape_class(weight, 3): best}, {tuning.kind(weight): 16})
    assert tuning.config(weight, 4) == best and tuning.config(weight, 5) == tiling.default(weight, 5)
    name, aside = kernels.explain(Call("cpu", torch.bfloat16, 17), spec)
    assert (
        name == "slab_triton" and "beyond 16 rows" in aside["fused_triton"] and "measured on" in aside["fused_triton"]
    )
    assert "up to 16 rows (measured on no GPU" in FusedTriton.chosen(Call("cpu", torch.bfloat16, 1), spec)
    assert tuning.config(weight, 4, transpose=True) == tiling.default_gradient(weight, 4), "another direction's Config"
    tuning.forget()


FOREIGN = {
    "cut off": b"{",
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "no date": b'{"a GPU": {"configs": {}}}',
    "old configs": b'{"a GPU": {"date": "2026-01-01", "configs": {"x": [1, 2]}}}',
    "a wild config": b'{"a GPU": {"date": "2026-01-01", "configs": {"x": [64, 24, 2, 3, 1]}}}',
    "words for rows": b'{"a GPU": {"date": "2026-01-01", "crossover_rows": {"x": "many"}}}',
}


@pytest.mark.parametrize("found", FOREIGN)
def test_measurements_that_are_none_are_said_and_made_anew(monkeypatch, tmp_path, found):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weight = Weight.of(uniform(64, 256, 2, 128, None))
    tuning.path().parent.mkdir()
    tuning.path().write_bytes(FOREIGN[found])
    tuning.forget()
    with pytest.warns(UserWarning, match="does not hold measurements"):
        assert tuning.config(weight, 1) == tiling.default(weight, 1)
    assert "not measured" in tuning.crossover(weight)[1]
    with pytest.warns(UserWarning, match="replaces it"):
        tuning.record({}, {tuning.kind(weight): 7})
    assert tuning.crossover(weight)[0] == 7 and "measured on" in tuning.crossover(weight)[1]
    tuning.forget()


@interpreted
def test_the_op_trains_through_both(monkeypatch):
    monkeypatch.delenv("LREC_KERNEL", raising=False)
    kernels._choose.cache_clear()
    packed = uniform(48, 256, 2, 64, torch.float16)
    for T in (3, 70):
        x = torch.randn(T, 256).bfloat16().requires_grad_()
        upstream = torch.randn(T, 48).bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.matmul(x, packed).backward(upstream)
        assert_close(x.grad, upstream.double() @ packed.unpack().double(), TOLERANCE[torch.bfloat16])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_without_a_gpu_both_refuse_in_words(monkeypatch):
    packed = example("uniform", next(iter(EXAMPLES["uniform"])))
    monkeypatch.setattr(gpu, "_installed", lambda: True)
    for kernel in (FusedTriton, SlabTriton):
        assert "on a GPU, not on the CPU" in kernel.refuses(Call("cpu", torch.bfloat16, 1), packed.spec())
        assert "float64" in kernel.refuses(Call("cuda", torch.float64, 1), packed.spec())
        assert "indexed" in kernel.refuses(Call("cuda", torch.bfloat16, 1), {"format": "indexed"})
    fine = binary(64, 256, 2, 64).spec()  # scales in float32
    assert "half precision" in FusedTriton.refuses(Call("cuda", torch.bfloat16, 1, True), fine)
    many = uniform(64, 576, 3, 16, None).spec()
    assert "groups of 16" in FusedTriton.refuses(Call("cuda", torch.bfloat16, 1), many)
    for packed, reason in (
        (example("codebook", "2bit-weight-blocks"), "cross rows"),
        (example("codebook", "2bit-groups-of-100-blocks-of-48"), "tables of 100"),
        (example("outlier", "2bit"), "rows of 401 are short against tiles of 16384"),
    ):
        assert reason in FusedTriton.refuses(Call("cuda", torch.bfloat16, 1), packed.spec())
    for case in (example("codebook", "3bit-rows"), example("salient", "odd"), example("outlier", "4bit-spanned")):
        assert "no fused kernel" in FusedTriton.refuses(Call("cuda", torch.bfloat16, 1, True), case.spec())
    monkeypatch.setattr(gpu, "_installed", lambda: False)
    assert "pip install" in SlabTriton.refuses(Call("cuda", torch.bfloat16, 1), packed.spec())
