"""Ternary weights: w = scale * t with t in {-1, 0, 1}, five to a byte (3^5 = 243 <= 256), 1.6 bits each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats import FLOATS, UINT8, Layout, Packed
from lrec.formats.uniform import groups

TRITS = 5


@dataclass(frozen=True, eq=False, kw_only=True)
class Ternary(Packed):
    """w_NK[n, k] = scale_NG[n, k // group_size] * t_NK[n, k].

    qweight: uint8 (N, ceil(K / 5)), byte i of a row is sum_j (t[5 i + j] + 1) * 3^j; a short last one is filled with 0.
    scale:   float (N, G), G = ceil(K / group_size).
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("scale",)}

    group_size: int
    qweight: Tensor
    scale: Tensor

    @classmethod
    def pack(cls, trits_NK: Tensor, scale_NG: Tensor, group_size: int = 0) -> "Ternary":
        """Packs integers -1, 0, 1; `group_size` 0 is the whole row. Raises ValueError if scale's shape does not fit."""
        N, K = trits_NK.shape
        group_size = group_size or K
        if scale_NG.shape != (N, groups(K, group_size)):
            needed = (N, groups(K, group_size))
            raise ValueError(
                f"scale has shape {tuple(scale_NG.shape)}; {K} columns in groups of {group_size} need {needed}"
            )
        digits = torch.nn.functional.pad(trits_NK.short(), (0, -K % TRITS)).unflatten(1, (-1, TRITS)) + 1
        places = 3 ** torch.arange(TRITS, dtype=torch.int16, device=digits.device)
        packed = (digits * places).sum(-1).to(torch.uint8)
        return cls(shape=(N, K), group_size=group_size, qweight=packed, scale=scale_NG)

    def layout(self) -> Layout:
        """See `Packed.layout`."""
        N, K = self.shape
        if self.group_size < 1:
            raise ValueError(f"groups of {self.group_size}; allowed: 1 or more")
        return {"qweight": [(UINT8, (N, -(-K // TRITS)))], "scale": [(FLOATS, (N, groups(K, self.group_size)))]}

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equation above."""
        t, scale = self.trits(rows).float(), self.scale[rows].float()
        N, K = t.shape
        G = scale.shape[1]
        padded = torch.nn.functional.pad(t, (0, G * self.group_size - K)).view(N, G, self.group_size)
        return (padded * scale[:, :, None]).flatten(1)[:, :K]

    def trits(self, rows: slice = slice(None)) -> Tensor:
        """int8 (n, K) of -1, 0, 1."""
        values = torch.arange(256, device=self.qweight.device)[:, None]
        places = 3 ** torch.arange(TRITS, device=self.qweight.device)
        table = (values // places % 3 - 1).to(torch.int8)
        return table[self.qweight[rows].int()].flatten(1)[:, : self.shape[1]]
