"""The native CPU library: plain C++ with a C ABI, compiled at install if there is a compiler, loaded by ctypes.

torch must be imported first, as it is here: torch brings its own libgomp, and a library loaded after it that asks for
the same name gets the same one, so both share one pool of threads.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lrec.formats.uniform import Uniform

ABI = 1
GEMV_ROWS = 8
PANEL_WEIGHTS = 2**20
SINGLE_THREAD_WEIGHTS = 2**20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATH = Path(__file__).with_name("liblrec_native.so")
BUILD_LOG = Path(__file__).with_name("build.log")
# 8-bit scales -> (their version, scales and zeros as floats), let go with the tensor.
_WIDE = WeakTensorKeyDictionary()
ZERO_KINDS = {None: 0, torch.int32: 1, torch.float16: 16, torch.float32: 32}


class UniformWeight(ctypes.Structure):
    """`LrecUniform` of lrec_native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "K", "group_size")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_kind", "zero_kind")),
        *((name, ctypes.c_void_p) for name in ("qweight", "scale", "zero")),
    ]


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
    """The loaded library, its functions declared. Asserts that it is not `missing`."""
    assert missing() is None, missing()
    lib = ctypes.CDLL(str(PATH))
    lib.lrec_cpu_path.restype = ctypes.c_char_p
    weight, pointer, i64, i32 = ctypes.POINTER(UniformWeight), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.lrec_uniform_decode.argtypes = [weight, i64, i64, pointer, i32]
    for gemv in (lib.lrec_uniform_gemv, lib.lrec_uniform_gemv_int8):
        gemv.argtypes, gemv.restype = [weight, pointer, i64, i64, pointer, i64, i32], None
    lib.lrec_uniform_decode.restype = None
    return lib


def cpu_path() -> str:
    """`avx2` or `portable`: the implementation that runs on this machine; `LREC_CPU=portable` forces the latter."""
    return library().lrec_cpu_path().decode()


def uniform(packed: Uniform) -> UniformWeight:
    """The C view of a weight whose tensors are contiguous; valid as long as those live."""
    N, K = packed.shape
    scale, zero = wide(packed) if packed.scale.dtype == torch.uint8 else (packed.scale, packed.zero)
    return UniformWeight(
        N,
        K,
        packed.group_size,
        packed.bits,
        ZERO_KINDS[scale.dtype],
        0 if zero is None else ZERO_KINDS[zero.dtype],
        packed.qweight.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
    )


def wide(packed: Uniform) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros as the C code takes them, 8-bit ones in fp16, which holds them exactly; made once a weight."""
    # Inference tensors count no versions; those of a weight that changes in place are not among them.
    version = 0 if packed.scale.is_inference() else packed.scale._version
    known = _WIDE.get(packed.scale)
    if known is None or known[0] != version:
        zero = packed.zeros().half() if packed.zero is not None and packed.zero.dtype == torch.uint8 else packed.zero
        known = _WIDE[packed.scale] = version, packed.scales().half(), zero
    return known[1:]


def threads(num_weights: int) -> int:
    """Threads for so many weights: torch's setting, or one where waking others costs more than it saves."""
    return 1 if num_weights < SINGLE_THREAD_WEIGHTS else torch.get_num_threads()


def decode(function, weight: ctypes.Structure, start: int, stop: int, out: Tensor) -> None:
    """Writes rows start <= n < stop of the decoded weight to the first rows of `out`, contiguous float32 (n, K)."""
    function(weight, start, stop, out.data_ptr(), threads((stop - start) * out.shape[1]))


def gemv(function, weight: ctypes.Structure, x_TK: Tensor, N: int, K: int) -> Tensor:
    """x W^T (T, N) in x's dtype by a native function that takes few rows of x."""
    x = _float32(x_TK)
    y_TN = torch.empty(x.shape[0], N)
    function(weight, x.data_ptr(), x.shape[0], x.stride(0), y_TN.data_ptr(), N, threads(N * K))
    return y_TN.to(x_TK.dtype)


def panels(function, weight: ctypes.Structure, x: Tensor, N: int, K: int, transpose: bool) -> Tensor:
    """x W^T (T, N), or x W (T, K), in x's dtype: panels of rows that `function` decodes, multiplied by torch.

    The workspace is one panel of `PANEL_WEIGHTS` floats, or one row where that is longer.
    """
    wide = _float32(x)
    y = wide.new_zeros(x.shape[0], K) if transpose else wide.new_empty(x.shape[0], N)
    step = max(1, min(N, PANEL_WEIGHTS // K))
    panel_nK = torch.empty(step, K)
    for start in range(0, N, step):
        stop = min(start + step, N)
        decode(function, weight, start, stop, panel_nK)
        if transpose:
            y.addmm_(wide[:, start:stop], panel_nK[: stop - start])
        else:
            torch.mm(wide, panel_nK[: stop - start].t(), out=y[:, start:stop])
    return y.to(x.dtype)


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.stride(-1) == 1 else x.float().contiguous()
