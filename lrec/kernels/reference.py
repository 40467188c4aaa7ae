"""The reference product: decode a slice of rows, multiply, drop it. Any format, device and dtype; never refuses.

The workspace is one slice of at most `SLICE_WEIGHTS` decoded weights, whatever the size of the matrix.
"""

import torch
from torch import Tensor

from lrec.formats import Packed
from lrec.kernels import Call, Kernel

SLICE_WEIGHTS = 2**21


class Reference(Kernel):
    """x W^T, one slice of output rows at a time; x W, accumulated over the same slices in float32."""

    priority = 0

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """Never."""
        return None

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """See `Kernel.matmul`."""
        N, K = packed.shape
        step = max(1, SLICE_WEIGHTS // K)
        slices = [slice(n, min(n + step, N)) for n in range(0, N, step)]
        if not transpose:
            return torch.cat([x_TK @ packed.unpack(rows).to(x_TK.dtype).t() for rows in slices], 1)
        wide = torch.promote_types(x_TK.dtype, torch.float32)
        dx = x_TK.new_zeros(x_TK.shape[0], K, dtype=wide)
        for rows in slices:
            dx.addmm_(x_TK[:, rows].to(wide), packed.unpack(rows).to(wide))
        return dx.to(x_TK.dtype)
