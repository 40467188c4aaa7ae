"""Outlier weights on the CPU in native code: a row is decoded as if it had none, then the stream of gaps says which
weights to look up again; the product reads the decoded row, which stays in the first-level cache.
"""

from lrec.kernels.native import NativeKernel, structure


class OutlierCPU(NativeKernel):
    """The decoded values are those of `Outlier.unpack`, bit for bit."""

    format = "outlier"

    structure = structure("tile stride bits index_bits", "qweight index starts", "table scale base")
