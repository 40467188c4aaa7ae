"""Uniform integers whose columns name their group: act-order checkpoints, where groups are not runs of columns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats import FLOATS, INT32, Layout, Packed, unpack_codes, words
from lrec.formats.uniform import WIDTHS, Uniform


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

    def layout(self) -> Layout:
        """See `Packed.layout`; there are as many groups as scales."""
        (N, K), bits = self.shape, self.bits
        if bits not in WIDTHS or self.scale.dim() != 2 or not 1 <= self.scale.shape[1] <= K:
            raise ValueError(f"{bits} bits, scales {list(self.scale.shape)}; allowed: {WIDTHS} bits, 1 to {K} groups")
        G = self.scale.shape[1]
        return {
            "qweight": [(INT32, (N, words(K, bits)))],
            "scale": [(FLOATS, (N, G))],
            "group": [(INT32, (K,))],
            "zero": [(FLOATS, (N, G)), (INT32, (G, words(N, bits)))],
        }

    def check_values(self) -> None:
        """See `Packed.check_values`."""
        if int(self.group.min()) < 0 or int(self.group.max()) >= self.scale.shape[1]:
            raise ValueError(f"group names groups other than 0 to {self.scale.shape[1] - 1}")
