"""Uniform integers whose columns name their group: act-order checkpoints, where groups are not runs of columns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats import Packed, unpack_codes
from lrec.formats.uniform import Uniform


@dataclass(frozen=True, eq=False, kw_only=True)
class Indexed(Packed):
    """w_NK[n, k] = scale_NG[n, g] * (q_NK[n, k] - zero[n, g]) with g = group[k].

    qweight: int32 (N, ceil(K/32) * bits), codes in the order of `pack_codes`.
    scale:   float16 or float32 (N, G).
    zero:    None: symmetric, zero = 2^(bits-1); or int32 (G, ceil(N/32) * bits), as in `uniform`.
    group:   int32 (K,), each below G.
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("scale",)}

    bits: int
    qweight: Tensor
    scale: Tensor
    group: Tensor
    zero: Tensor | None = None

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equation above."""
        q = unpack_codes(self.qweight[rows], self.bits, self.shape[1]).float()
        group = self.group.long()
        zero = Uniform.zeros(self, rows)[:, group]  # stored alike, so decoded alike
        return self.scale[rows].float()[:, group] * (q - zero)

    def __post_init__(self):
        super().__post_init__()
        if self.group.shape != (self.shape[1],):
            raise ValueError(f"{self.shape[1]} columns need as many groups, but there are {tuple(self.group.shape)}")
        assert self.group.dtype == torch.int32
