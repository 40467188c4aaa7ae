"""What the Triton kernels become: each launch that the host code makes is compiled for GPUs that are not here.

The host code runs as it is; where it would launch a kernel, the kernel is compiled with the arguments it was given.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.numeric.test_kernels import binary, codebook, outlier, salient, ternary, uniform

triton = pytest.importorskip("triton", reason="triton is not installed: nothing to compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels run in Python, none is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lrec.kernels import LowRank  # noqa: E402
from lrec.kernels.gpu import decode, fused, gradient, outliers, staging, terms, tiling  # noqa: E402

CAPABILITIES = (80, 89, 90, 120)
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*);")


@dataclass
class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    kernel: object
    launches: list = field(default_factory=list)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def compiled(recorder, capability, launch=0):
    """The kernel of one of a recorder's launches."""
    args, kwargs = recorder.launches[launch]
    kernel = recorder.kernel
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = ("i32",) * len(value)
            hints |= {(i, j): [["tt.divisibility", 16]] for j, item in enumerate(value) if item % 16 == 0}
        else:
            kinds = {int: "i32", float: "fp32"}
            signature[parameter.name] = kinds.get(type(value)) or TYPES[value.dtype]
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and special):
                hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def sass(cubin, path):
    """(address, opcode, operands) of each instruction, and the bytes of stack a thread needs."""
    path.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "-sass", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    listing = [(int(address, 16), op, rest) for address, op, rest in INSTRUCTION.findall(text)]
    return [line for line in listing if line[1] != "NOP"], int(re.search(r"STACK:(\d+)", text)[1])


def loop(listing):
    """Opcodes of the longest loop: from the target of a branch backwards to it."""
    spans = [
        (int(target[1], 16), address)
        for address, op, rest in listing
        if op.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < address
    ]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return [op for address, op, _ in listing if first <= address <= last]


@cache
def weight(name):
    """A weight of a size that a model has, in groups of 128."""
    N, K = 4096, 1024
    if name == "binary":
        return binary(N, K, 2, 128, torch.float16)
    if name == "codebook":
        return codebook(N, K, 4, (), 0, 64)
    if name.startswith("levels"):
        bits, whose = int(name[6]), name[8:]
        table = {"one": (), "row": (N,), "group": (N, K // 256)}[whose]
        return codebook(N, K, bits, table, 256 if whose == "group" else 0, 0, False, torch.float16)
    if name == "salient":
        return salient(N, K)
    if name.startswith("outlier"):
        return outlier(N, K, 2, spanned=name.endswith("spanned"), tile=4 * K)
    if name == "ternary":
        made = ternary(N, 1280, 128)
        return replace(made, scale=made.scale.half())
    bits, zero = name.split("bit-")
    return uniform(N, K, int(bits), 128, {"float": torch.float16, "codes": "codes", "none": None}[zero])


def launched(monkeypatch, name, num_rows, transpose=False, rank=0):
    """Recorders of the fused kernels of a product, or gradient, of so many rows; and the Config of its last part. An
    adapter of that rank is added, if it has one."""
    ends = {"add_up": fused, "add_up_beside": fused, "outlier_products": outliers}
    places = {"stage_rows": gradient, "multiply_back": gradient} if transpose else {"stage": staging, "multiply": fused}
    places |= ends
    kernels = {kernel: Recorder(getattr(module, kernel)) for kernel, module in places.items()}
    for kernel, recorder in kernels.items():
        monkeypatch.setattr(places[kernel], kernel, recorder)
    packed = weight(name)
    x = torch.zeros(num_rows, packed.shape[0 if transpose else 1], dtype=torch.bfloat16)
    # Laid out as B and A are.
    N, K = packed.shape
    right = torch.zeros(rank, K) if transpose else torch.zeros(N, rank).t()
    added = LowRank(torch.zeros(num_rows, rank), right, 2.0) if rank else None
    if transpose:
        config = tiling.default_gradient(tiling.Weight.of(packed), num_rows)
        gradient.gradient(x, packed, config, added)
    else:
        config = tiling.default(terms.terms(packed)[-1].weight, num_rows)
        fused.product(x, packed, added=added)
    return kernels, config


# Instructions a weight in the inner loop, the product of one row of x. The probes (shared reference, section 0): 1.22
# for two bits with neither zeros nor a scale for each group of 128, 2.9 for two planes; the bar is 1.3 times those.
# Levels had none; at 4.25 bits a weight an H200's memory allows four instructions, at 1.7 bits of trits 1.7.
LIMITS = {
    "2bit-float": 1.45, "2bit-codes": 1.6, "3bit-float": 1.6, "4bit-float": 1.45, "8bit-none": 2.2, "binary": 2.4,
    "levels2-row": 2.0, "levels3-row": 5.0, "levels4-one": 3.5, "levels4-group": 4.7, "codebook": 3.8,
    "ternary": 2.8, "salient": 1.5, "outlier": 2.0, "outlier-spanned": 1.45,
}  # fmt: skip


def counted_per_weight(recorder, config, name, tmp_path):
    """Instructions a weight in the loop of a kernel for sm_90, which must use tensor cores and spill nothing."""
    listing, stack = sass(compiled(recorder, 90, -1).asm["cubin"], tmp_path / "cubin")
    opcodes = [op for _, op, _ in listing]
    assert any(op.startswith(("HMMA", "HGMMA")) for op in opcodes), "no tensor-core instruction"
    assert stack == 0 and not any(op.startswith(("LDL", "STL")) for op in opcodes), "registers spill"
    fields = terms.terms(weight(name))[-1].weight.fields
    return len(loop(listing)) * 32 * config.num_warps / (config.BN * fields * config.KP)


@pytest.mark.parametrize("name", LIMITS)
def test_one_row_runs_on_tensor_cores_without_spills(monkeypatch, tmp_path, name):
    kernels, config = launched(monkeypatch, name, 1)
    counted = counted_per_weight(kernels["multiply"], config, name, tmp_path)
    print(f"{name}: {counted:.2f} instructions a weight for sm_90")
    assert counted <= LIMITS[name]


# The same for gradients, which turn tiles around on the way and hold more accumulators; the probes had 3.3 to 4.3.
GRADIENT_LIMITS = {
    "2bit-float": 2.6, "2bit-codes": 2.8, "3bit-float": 3.0, "4bit-float": 3.0, "8bit-none": 3.8, "binary": 4.3,
    "ternary": 4.3,
}  # fmt: skip


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("name", GRADIENT_LIMITS)
def test_gradients_run_on_tensor_cores_without_spills(monkeypatch, tmp_path, name, num_rows):
    kernels, config = launched(monkeypatch, name, num_rows, transpose=True)
    counted = counted_per_weight(kernels["multiply_back"], config, name, tmp_path)
    print(f"{name}, {num_rows} rows: {counted:.2f} instructions a weight for sm_90")
    assert num_rows > 1 or counted <= GRADIENT_LIMITS[name]


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        *(("2bit-float", 8), ("2bit-float", 16), ("3bit-float", 16), ("4bit-float", 64), ("binary", 16)),
        *(("levels2-row", 16), ("codebook", 16), ("ternary", 16), ("salient", 16)),
    ],
)
def test_more_rows_do_not_spill(monkeypatch, tmp_path, name, num_rows):
    kernels, _ = launched(monkeypatch, name, num_rows)
    for kernel in ("stage", "multiply"):
        listing, stack = sass(compiled(kernels[kernel], 90).asm["cubin"], tmp_path / "cubin")
        assert stack == 0 and not any(op.startswith(("LDL", "STL")) for _, op, _ in listing), kernel


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("name", ["outlier", "outlier-spanned"])
def test_outliers_are_multiplied_without_spills(monkeypatch, tmp_path, name, num_rows):
    recorder = launched(monkeypatch, name, num_rows)[0]["outlier_products"]
    listing, stack = sass(compiled(recorder, 90).asm["cubin"], tmp_path / "cubin")
    assert stack == 0 and not any(op.startswith(("LDL", "STL")) for _, op, _ in listing)
    kwargs = recorder.launches[0][1]
    counted = len(loop(listing)) * 128 / kwargs["BLOCK"]
    print(f"{name}, {num_rows} rows: {counted:.0f} instructions a symbol of the index for sm_90")
    assert counted <= 155 + 14 * num_rows  # what tiling.OUTLIER_ROWS was reckoned from


@pytest.mark.parametrize("rank", [8, 16, 64, 256])
@pytest.mark.parametrize("transpose", [False, True])
def test_adapters_are_added_without_spills_by_long_loads(monkeypatch, tmp_path, transpose, rank):
    kernels, _ = launched(monkeypatch, "2bit-codes", 4, transpose, rank)
    assert not kernels["add_up"].launches
    listing, stack = sass(compiled(kernels["add_up_beside"], 90).asm["cubin"], tmp_path / "cubin")
    assert stack == 0 and not any(op.startswith(("LDL", "STL")) for _, op, _ in listing)
    # Rows of B of other ranks need not begin at a multiple of sixteen bytes that the compiler knows.
    assert rank % 16 or any(op.startswith("LDG") and op.endswith(".128") for _, op, _ in listing)


# Tensor cores are programmed alike before sm_90 and in sm_120, and `multiply` is compiled for sm_90 above.
@pytest.mark.parametrize(
    ("kernel", "name", "capability"),
    [(kernel, "2bit-codes", capability) for capability in CAPABILITIES
     for kernel in ("stage", "multiply", "add_up", "stage_rows", "multiply_back")]
    + [("multiply", name, capability) for name in ("codebook", "levels3-row", "ternary") for capability in (80, 120)]
    + [("stage", "salient", 90)],
)  # fmt: skip
def test_the_fused_product_compiles(monkeypatch, kernel, name, capability):
    kernels, _ = launched(monkeypatch, name, 4, transpose=kernel in ("stage_rows", "multiply_back"))
    result = compiled(kernels[kernel], capability, -1)
    assert result.asm["cubin"][:4] == b"\x7fELF"
    on_tensor_cores = "mma.sync" in result.asm["ptx"] or "wgmma" in result.asm["ptx"]
    assert on_tensor_cores == kernel.startswith("multiply")


@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, 90) for name in ("2bit-codes", "3bit-float", "codebook", "binary", "ternary", "salient", "outlier")]
    + [(name, capability) for name in ("3bit-float", "outlier") for capability in (80, 89, 120)],
)
def test_slabs_compile_and_store_sixteen_bytes(monkeypatch, tmp_path, name, capability):
    packed = weight(name)
    kernel = decode.DECODERS[type(packed).name()](packed)[0]
    recorder = Recorder(kernel)
    monkeypatch.setattr(decode, kernel.__name__, recorder)
    scattered = Recorder(outliers.outlier_tile)
    monkeypatch.setattr(outliers, "outlier_tile", scattered)
    decode.decoder(packed)((0, 256), (0, 1024), torch.empty(256, 1024, dtype=torch.bfloat16))
    listing, stack = sass(compiled(recorder, capability).asm["cubin"], tmp_path / "cubin")
    stores = [op for _, op, _ in listing if op.startswith("STG")]
    assert stores and all(op.endswith(".128") for op in stores), stores
    assert stack == 0
    if name == "outlier":
        assert compiled(scattered, capability).asm["cubin"][:4] == b"\x7fELF"
