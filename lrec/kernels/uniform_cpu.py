"""Uniform weights on the CPU in native code: few rows of x by fields in registers, more by decoded panels and sgemm.

Up to `GEMV_ROWS` rows the product reads the packed weight once and nothing of size N*K exists. Above, and for
gradients, a panel of rows of W is decoded and multiplied by torch; decoding costs a fixed time per panel, which the
rows of x share. Both compute in float32; half and bfloat16 x are converted on the way in and out, but for panels where
the CPU multiplies bfloat16 itself.
"""

import ctypes
from dataclasses import replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lrec.formats.uniform import Uniform
from lrec.kernels.native import NativeKernel, structure

# 8-bit scales -> (their version, the weight with floats in their place), let go with the tensor.
_WIDE = WeakTensorKeyDictionary()


class UniformCPU(NativeKernel):
    """The decoded values are those of `Uniform.unpack`, bit for bit."""

    format = "uniform"

    structure = structure("group_size bits", "qweight", "scale zero")

    @classmethod
    def weight(cls, packed: Uniform) -> ctypes.Structure:
        """See `NativeKernel.weight`; 8-bit scales and zeros are read as floats."""
        return super().weight(wide(packed) if packed.scale.dtype == torch.uint8 else packed)


def wide(packed: Uniform) -> Uniform:
    """The weight with 8-bit scales and zeros in fp16, which holds them exactly; made once a weight."""
    # Inference tensors count no versions; those of a weight that changes in place are not among them.
    version = 0 if packed.scale.is_inference() else packed.scale._version
    known = _WIDE.get(packed.scale)
    if known is None or known[0] != version or known[1].qweight is not packed.qweight:
        zero = packed.zeros().half() if packed.zero is not None and packed.zero.dtype == torch.uint8 else packed.zero
        made = replace(packed, scale=packed.scales().half(), zero=zero, scale_exponent=None)
        known = _WIDE[packed.scale] = version, made
    return known[1]
