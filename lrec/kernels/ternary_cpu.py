"""Ternary weights on the CPU in native code: bytes of five trits become codes of two bits, a row at a time."""

from lrec.kernels.native import NativeKernel, structure


class TernaryCPU(NativeKernel):
    """The decoded values are those of `Ternary.unpack`, bit for bit."""

    format = "ternary"

    structure = structure("group_size", "qweight", "scale")
