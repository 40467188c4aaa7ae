"""Uniform 2- and 4-bit weights on the CPU with activations rounded to int8: opt-in, for decoding.

Twice as fast as the exact product and about one per cent off it (each weight stays exact, x is rounded), so it serves
only who asks: `--activation_bits 8`, `LREC_ACTIVATION_BITS=8` in the environment, or `LREC_KERNEL=uniform_cpu_int8`.
Whoever asks gets it for any number of rows, so that what is evaluated is what decodes; gradients stay exact.
"""

import os

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import Call, Kernel, native
from lrec.kernels.uniform_cpu import UniformCPU

WIDTHS = (2, 4)


class UniformCPUInt8(Kernel):
    """x8 W^T, with x8 the activations as `activations` rounds them."""

    priority = 110

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """All that the exact kernel refuses, other widths than 2 and 4, gradients, and who did not ask."""
        if spec["format"] == "uniform" and spec["bits"] not in WIDTHS:
            return f"it multiplies uniform weights of {' or '.join(map(str, WIDTHS))} bits"
        if os.environ.get("LREC_ACTIVATION_BITS") != "8" and os.environ.get("LREC_KERNEL") != "uniform_cpu_int8":
            return "it rounds activations to 8 bits, which --activation_bits 8 or LREC_ACTIVATION_BITS=8 asks for"
        if call.transpose:
            return "gradients are not rounded"
        return UniformCPU.refuses(call, spec)

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """See `Kernel.matmul`."""
        return native.gemv(native.function("uniform_gemv_int8"), UniformCPU.weight(packed), x_TK, *packed.shape)

    @classmethod
    def activations(cls, x_TK: Tensor, packed: Packed) -> Tensor:
        """float32 x8: each run of 256 / bits columns is step * round(x / step) with step = max |x| / 127."""
        size = 256 // packed.bits
        runs = torch.nn.functional.pad(x_TK.float(), (0, -x_TK.shape[1] % size)).unflatten(1, (-1, size))
        step = runs.abs().amax(-1, keepdim=True) / 127
        rounded = (runs * torch.where(step > 0, 1 / step, 0)).round() * step
        return rounded.flatten(1)[:, : x_TK.shape[1]]
