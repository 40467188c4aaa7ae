"""Uniform weights on the CPU in native code: few rows of x by fields in registers, more by decoded panels and sgemm.

Up to `GEMV_ROWS` rows the product reads the packed weight once and nothing of size N*K exists. Above, and for
gradients, a panel of rows of W is decoded and multiplied by torch; decoding costs a fixed time per panel, which the
rows of x share. Both compute in float32; half and bfloat16 x are converted on the way in and out.
"""

from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import Call, Kernel, native
from lrec.kernels.native import DTYPES, GEMV_ROWS


class UniformCPU(Kernel):
    """The native product; the decoded values are those of `Uniform.unpack`, bit for bit."""

    priority = 100

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """Weights that are not uniform or not on the CPU, x in float64, a missing library."""
        if spec["format"] != "uniform":
            return f"it multiplies uniform weights, not {spec['format']}"
        if call.device != "cpu":
            return f"it runs on the CPU, not on {call.device}"
        if call.dtype not in DTYPES:
            return f"it computes in float32, which {call.dtype} does not allow"
        return native.missing()

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """See `Kernel.matmul`."""
        weight, library = native.uniform(packed), native.library()
        if x_TK.shape[0] <= GEMV_ROWS and not transpose:
            return native.gemv(library.lrec_uniform_gemv, weight, x_TK, *packed.shape)
        return native.panels(library.lrec_uniform_decode, weight, x_TK, *packed.shape, transpose)
