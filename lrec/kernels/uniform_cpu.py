"""Uniform weights on the CPU in native code: few rows of x by fields in registers, more by decoded panels and sgemm.

Up to `GEMV_ROWS` rows the product reads the packed weight once and nothing of size N*K exists. Above, a panel of
`PANEL_WEIGHTS` weights is decoded and multiplied by torch, forward and backward alike; decoding costs a fixed time per
panel, which the rows of x share. Both compute in float32; half and bfloat16 x are converted on the way in and out.
"""

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import Call, Kernel, native

GEMV_ROWS = 8
PANEL_WEIGHTS = 2**20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        x = x_TK if x_TK.dtype is torch.float32 and x_TK.stride(-1) == 1 else x_TK.float().contiguous()
        if transpose:
            y = _backward(x, packed)
        elif x.shape[0] <= GEMV_ROWS:
            y = _gemv(x, packed)
        else:
            y = _forward(x, packed)
        return y.to(x_TK.dtype)


def _gemv(x_TK: Tensor, packed: Packed) -> Tensor:
    T = x_TK.shape[0]
    N, K = packed.shape
    y_TN = x_TK.new_empty(T, N)
    native.library().lrec_uniform_gemv(
        native.uniform(packed), x_TK.data_ptr(), T, x_TK.stride(0), y_TN.data_ptr(), N, native.threads(N * K)
    )
    return y_TN


def _forward(x_TK: Tensor, packed: Packed) -> Tensor:
    y_TN = x_TK.new_empty(x_TK.shape[0], packed.shape[0])
    for start, stop, panel_nK in _panels(packed):
        torch.mm(x_TK, panel_nK.t(), out=y_TN[:, start:stop])
    return y_TN


def _backward(dy_TN: Tensor, packed: Packed) -> Tensor:
    dx_TK = dy_TN.new_zeros(dy_TN.shape[0], packed.shape[1])
    for start, stop, panel_nK in _panels(packed):
        dx_TK.addmm_(dy_TN[:, start:stop], panel_nK)
    return dx_TK


def _panels(packed: Packed):
    N, K = packed.shape
    step = min(N, max(1, PANEL_WEIGHTS // K))
    panel_nK = torch.empty(step, K)
    weight = native.uniform(packed)
    for start in range(0, N, step):
        stop = min(start + step, N)
        native.decode(packed, weight, start, stop, panel_nK)
        yield start, stop, panel_nK[: stop - start]
