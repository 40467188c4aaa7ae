"""Decode a slab of the weight in Triton, multiply it by cuBLAS, go on: what training does, forward and backward.

Decoding costs a fixed time per matrix, which the rows of x share. A slab holds about `SLAB_BYTES`, so that the product
reads it from the last-level cache, and up to twice that where it would else be too narrow to keep a large GPU busy.
Slabs are cut along the columns of the result, so each of these is one product and nothing is added up outside of it.
"""

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import Call, Kernel, gpu

SLAB_BYTES = 2**25
BUSY = 2**22  # entries of the result: two tiles of 128 x 128 for each of 132 multiprocessors
STEP = 128  # where slabs of columns may begin, as `decoder` asks
FORMATS = ("uniform", "codebook", "binary", "ternary", "salient", "outlier")


class SlabTriton(Kernel):
    """x W^T or x W by slabs in x's dtype; the decoded values are those of `unpack`, rounded once to that dtype."""

    priority = 200

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """No Triton or no GPU, a format without a decoder, x in float64."""
        if reason := gpu.missing(call):
            return reason
        if spec["format"] not in FORMATS:
            return f"it decodes {', '.join(FORMATS)} weights, not {spec['format']}"
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it decodes in float32, which {call.dtype} does not allow"
        return None

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """See `Kernel.matmul`."""
        from lrec.kernels.gpu.decode import decoder

        (N, K), T = packed.shape, x_TK.shape[0]
        width, inner = (K, N) if transpose else (N, K)
        y = x_TK.new_empty(T, width)
        if T == 0:
            return y
        fits = SLAB_BYTES // (inner * x_TK.element_size())
        step = max(1, min(max(fits, BUSY // T), 2 * fits) // STEP) * STEP
        slab = x_TK.new_empty(min(step, width) * inner)
        decode = decoder(packed)
        for start in range(0, width, step):
            stop = min(start + step, width)
            rows, columns = ((0, N), (start, stop)) if transpose else ((start, stop), (0, K))
            w = slab[: (stop - start) * inner].view(rows[1] - rows[0], columns[1] - columns[0])
            with gpu.on(x_TK.device):
                decode(rows, columns, w)
            torch.mm(x_TK, w if transpose else w.t(), out=y[:, start:stop])
        return y
