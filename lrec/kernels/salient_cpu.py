"""Salient weights on the CPU in native code: x is split once into salient and other columns, and a row is two rows of
codes, of four bits and of one.
"""

from lrec.kernels.native import NativeKernel, structure


class SalientCPU(NativeKernel):
    """The decoded values are those of `Salient.unpack`, bit for bit."""

    format = "salient"

    structure = structure("num_salient", "qweight mask salient salient_zero", "salient_scale scale offset column")
