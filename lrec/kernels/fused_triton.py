"""Few rows of x by packed weights in one Triton kernel: decoding a model, where reading the weights is all the time.

Weights of 2, 3, 4 and 8 bits, sums of signs, trits and codes of levels are multiplied as they lie on disk; see
`gpu.fields` and `gpu.fused`. So are gradients of most of them, by `gpu.gradient`. More rows than the crossover that was
measured on the device go to slabs.
"""

import os

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import Call, Kernel, LowRank, gpu
from lrec.kernels.gpu import tiling, tuning
from lrec.kernels.gpu.tiling import Weight

MAX_RANK = 256  # of an adapter that is added on the way; 16 columns of it fill the registers


class FusedTriton(Kernel):
    """x W^T or x W with float32 accumulators; codes enter tensor cores exactly, scales and zeros by group."""

    priority = 210

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """No Triton or no GPU, other formats, groups that do not fit tiles, float32, many rows."""
        if reason := gpu.missing(call) or tiling.refuses(spec, call.transpose):
            return reason
        if call.dtype not in (torch.float16, torch.bfloat16):
            return f"it multiplies in half precision, which {call.dtype} does not allow"
        if not gpu.nvidia():
            return "it reads codes as subnormal halves, which only NVIDIA's tensor cores are known to take as they are"
        rows, where = tuning.crossover(Weight.of_spec(spec), call.transpose)
        if call.num_rows > rows and os.environ.get("LREC_KERNEL") != "fused_triton":
            return f"beyond {rows} rows slabs serve ({where})"
        return None

    @classmethod
    def chosen(cls, call: Call, spec: dict) -> str | None:
        """The crossover."""
        rows, where = tuning.crossover(Weight.of_spec(spec), call.transpose)
        return f"up to {rows} rows ({where})"

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """See `Kernel.matmul`."""
        return cls._multiply(x_TK, packed, transpose, None)

    @classmethod
    def matmul_plus(cls, x_TK: Tensor, packed: Packed, transpose: bool, added: LowRank) -> Tensor:
        """See `Kernel.matmul_plus`; adapters of a rank above `MAX_RANK` are added to the product that was written."""
        if added.left_TR.shape[1] > MAX_RANK:
            return super().matmul_plus(x_TK, packed, transpose, added)
        return cls._multiply(x_TK, packed, transpose, added)

    @classmethod
    def _multiply(cls, x_TK: Tensor, packed: Packed, transpose: bool, added: LowRank | None) -> Tensor:
        from lrec.kernels.gpu.fused import product
        from lrec.kernels.gpu.gradient import gradient

        if x_TK.shape[0] == 0:
            return x_TK.new_empty(0, packed.shape[1 if transpose else 0])
        with gpu.on(x_TK.device):
            return (gradient if transpose else product)(x_TK, packed, added=added)
