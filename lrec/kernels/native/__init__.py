"""The native CPU library: plain C++ with a C ABI, compiled at install if there is a compiler, loaded by ctypes.

torch must be imported first, as it is here: torch brings its own libgomp, and a library loaded after it that asks for
the same name gets the same one, so both share one pool of threads.
"""

import ctypes
import threading
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lrec import formats
from lrec.formats import Packed
from lrec.kernels import Call, Kernel

ABI = 3
GEMV_ROWS = 16
PANEL_WEIGHTS = 2**22
SINGLE_THREAD_WEIGHTS = 2**20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATH = Path(__file__).with_name("liblrec_native.so")
BUILD_LOG = Path(__file__).with_name("build.log")
# LrecKind of lrec_native.h, by the dtype that a spec names.
KINDS = {"uint8": 1, "int32": 1, "float16": 16, "bfloat16": 17, "float32": 32}

_held = threading.local()


class Floats(ctypes.Structure):
    """`LrecFloats` of lrec_native.h; all zero where a tensor is absent."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int64))


class NativeKernel(Kernel):
    """The native product with one format: few rows of x by a `gemv`, more and gradients by decoded panels and sgemm.

    A subclass names the C structure of its format, which `weight` fills: a field typed `Floats` or pointer with the
    tensor of that name, an integer with the number of that name in the spec, or with what `numbers` adds.
    """

    priority = 100
    format: str
    structure: type[ctypes.Structure]

    @classmethod
    def numbers(cls, spec: dict) -> dict[str, int]:
        """Values of integer fields that the spec does not hold under their names."""
        return {}

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """Other formats and devices, x or stored numbers in float64, a missing library."""
        if spec["format"] != cls.format:
            return f"it multiplies {cls.format} weights, not {spec['format']}"
        if call.device != "cpu":
            return f"it runs on the CPU, not on {call.device}"
        if call.dtype not in DTYPES:
            return f"it computes in float32, which {call.dtype} does not allow"
        numbers = [name for name, kind in cls.structure._fields_ if kind is Floats and name in spec["tensors"]]
        stored = {spec["tensors"][name][0] for name in numbers} - KINDS.keys()
        if stored:
            return f"it reads no tensors in {', '.join(sorted(stored))}"
        return missing()

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """See `Kernel.matmul`."""
        if x_TK.shape[0] <= GEMV_ROWS and not transpose:
            return gemv(function(f"{cls.format}_gemv"), cls.weight(packed), x_TK, *packed.shape)
        return panels(function(f"{cls.format}_decode"), cls.weight(packed), x_TK, *packed.shape, transpose)

    @classmethod
    def weight(cls, packed: Packed) -> ctypes.Structure:
        """The C view of a weight whose tensors are contiguous; valid as long as those live."""
        return _view(cls, packed.key, tuple(t.data_ptr() for t in packed.tensors().values()))


@lru_cache(maxsize=16384)
def _view(kernel: type[NativeKernel], key: str, pointers: tuple[int, ...]) -> ctypes.Structure:
    # Nothing but the arguments enters a view, so it holds for whatever tensors come to stand at these addresses.
    spec = formats.parse_key(key)
    N, K = spec["shape"]
    numbers = {"N": N, "K": K} | spec | kernel.numbers(spec)
    places = dict(zip(spec["tensors"], pointers, strict=True))
    view = kernel.structure()
    for name, kind in kernel.structure._fields_:
        if kind is Floats and name in places:
            setattr(view, name, Floats(places[name], KINDS[spec["tensors"][name][0]]))
        elif kind is ctypes.c_void_p:
            setattr(view, name, places.get(name, numbers.get(name)))
        elif kind is not Floats:
            setattr(view, name, numbers[name])
    return view


def structure(integers: str, pointers: str, floats: str) -> type[ctypes.Structure]:
    """A structure of lrec_native.h: N and K, then the fields of these names, which stand apart by spaces."""
    kinds = ((f"N K {integers}", ctypes.c_int64), (pointers, ctypes.c_void_p), (floats, Floats))
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("Weight", (ctypes.Structure,), {"_fields_": fields})


@cache
def missing() -> str | None:
    """Why there is no native library, in words (with the compiler's own message), or None if there is one."""
    if not PATH.exists():
        told = f"; the build said: {BUILD_LOG.read_text().strip()}" if BUILD_LOG.exists() else ""
        return f"the native library {PATH} was not built: install a C++17 compiler and reinstall lrec{told}"
    try:
        found = ctypes.CDLL(str(PATH)).lrec_abi()
    except OSError as error:
        return f"the native library {PATH} does not load: {error}; reinstall lrec on this machine"
    if found != ABI:
        return f"the native library {PATH} has ABI {found}, but this lrec needs {ABI}: reinstall lrec"
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded library. Asserts that it is not `missing`."""
    assert missing() is None, missing()
    return ctypes.CDLL(str(PATH))


@cache
def function(name: str):
    """The library's function `lrec_<name>`, its arguments declared: a `decode` or a `gemv`."""
    found = getattr(library(), f"lrec_{name}")
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    decodes = name.endswith("_decode")
    found.argtypes = [pointer, i64, i64, pointer, i32] if decodes else [pointer, pointer, i64, i64, pointer, i64, i32]
    found.restype = None
    return found


def cpu_path() -> str:
    """`avx512`, `avx2` or `portable`: the implementation that runs here. `LREC_CPU` names one not to go beyond."""
    path = library().lrec_cpu_path
    path.restype = ctypes.c_char_p
    return path().decode()


def threads(num_weights: int) -> int:
    """Threads for so many weights: torch's setting, or one where waking others costs more than it saves."""
    return 1 if num_weights < SINGLE_THREAD_WEIGHTS else torch.get_num_threads()


def decode(function, weight: ctypes.Structure, start: int, stop: int, out: Tensor) -> None:
    """Writes rows start <= n < stop of the decoded weight to the first rows of `out`, contiguous float32 (n, K)."""
    function(ctypes.byref(weight), start, stop, out.data_ptr(), threads((stop - start) * out.shape[1]))


def gemv(function, weight: ctypes.Structure, x_TK: Tensor, N: int, K: int) -> Tensor:
    """x W^T (T, N) in x's dtype by a native function that takes few rows of x."""
    x = _float32(x_TK)
    y_TN = torch.empty(x.shape[0], N)
    function(ctypes.byref(weight), x.data_ptr(), x.shape[0], x.stride(0), y_TN.data_ptr(), N, threads(N * K))
    return y_TN.to(x_TK.dtype)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own, which torch then uses: about twice as fast as
    float32. Where it does not, bfloat16 products are slower than those of float32."""
    return torch.backends.mkldnn.is_available() and bool(library().lrec_multiplies_bfloat16())


def panels(function, weight: ctypes.Structure, x: Tensor, N: int, K: int, transpose: bool) -> Tensor:
    """x W^T (T, N), or x W (T, K), in x's dtype: panels of rows that `function` decodes, multiplied by torch; those of
    bfloat16 x in bfloat16 where the CPU can, else in float32. Sums over panels are float32."""
    inner = x if x.dtype is torch.bfloat16 and multiplies_bfloat16() else _float32(x)
    y = inner.new_empty(x.shape[0], K if transpose else N, dtype=torch.float32 if transpose else inner.dtype)
    step = max(1, min(N, PANEL_WEIGHTS // K))
    workspace_nK = _workspace(step * K, torch.float32).view(step, K)
    for start in range(0, N, step):
        stop = min(start + step, N)
        panel_nK = workspace_nK[: stop - start]
        decode(function, weight, start, stop, panel_nK)
        if inner.dtype is not torch.float32:
            panel_nK = _workspace(panel_nK.numel(), inner.dtype).view_as(panel_nK).copy_(panel_nK)
        if not transpose:
            torch.mm(inner, panel_nK.t(), out=y[:, start:stop])
        elif inner.dtype is torch.float32:
            y.addmm_(inner[:, start:stop], panel_nK, beta=float(start > 0))
        else:
            product = torch.mm(inner[:, start:stop], panel_nK)
            y = y.add_(product) if start else product.float()
    return y.to(x.dtype)


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    # Buffers of each thread, kept: memory fresh from the system costs a page fault every 1024 weights, more than to
    # decode them. They hold a panel of PANEL_WEIGHTS numbers, or one row where that is longer.
    kept = _held.__dict__
    held = kept.get(str(dtype))
    if held is None or held.numel() < size:
        held = kept[str(dtype)] = torch.empty(size, dtype=dtype)
    return held[:size]


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.stride(-1) == 1 else x.float().contiguous()
