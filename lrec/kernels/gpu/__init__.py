"""Triton kernels for GPUs; on a CPU, Triton's interpreter (`TRITON_INTERPRET=1`) runs the same code to prove it right.

Only the modules that hold kernels import triton, and they are imported when a kernel has not refused.
"""

import contextlib
import importlib.util
import os
from functools import cache

import torch

from lrec.kernels import Call


def missing(call: Call) -> str | None:
    """Why no Triton kernel can run a call, in words, or None."""
    if call.device == "cpu" and not interpreted():
        return "it runs on a GPU, not on the CPU"
    if call.device not in ("cpu", "cuda"):
        return f"it runs on a GPU that torch calls cuda, not on {call.device}"
    return None if _installed() else "triton is not installed: pip install 'lrec[gpu]'"


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as it decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels write for results in `dtype`: the interpreter cuts to bfloat16 where a GPU rounds."""
    return torch.float32 if interpreted() and dtype is torch.bfloat16 else dtype


def nvidia() -> bool:
    """Whether the GPU is one of NVIDIA's: only those run PTX, and only those are known to multiply subnormal halves."""
    return torch.version.hip is None


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, on which Triton launches, whichever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
