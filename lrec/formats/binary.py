"""Binary coding: w = offset + a sum of P signs times P scales (BCQ; LUT-GEMM arXiv 2206.09557, GPTQT arXiv 2407.02891).

The 2^P levels of a group stand symmetrically about its offset; with scales 1, 2, 4, ... times a step they are evenly
spaced, so an asymmetric uniform grid is the special case.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrec.formats import FLOATS, INT32, Layout, Packed, pack_codes, unpack_codes, words
from lrec.formats.uniform import groups

MAX_PLANES = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Binary(Packed):
    """w_NK[n, k] = offset_NG[n, g] + sum_p alpha_NGP[n, g, p] * (2 * b_NPK[n, p, k] - 1) with g = k // group_size.

    qweight: int32 (N, P, ceil(K / 32)), bit k % 32 of word k // 32 is b.
    alpha:   float (N, G, P), G = ceil(K / group_size).
    offset:  float (N, G).
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("alpha",)}

    group_size: int
    qweight: Tensor
    alpha: Tensor
    offset: Tensor

    @classmethod
    def pack(cls, codes_NK: Tensor, alpha_NGP: Tensor, offset_NG: Tensor, group_size: int = 0) -> "Binary":
        """Packs codes sum_p b_p 2^p; `group_size` 0 is the whole row. Raises ValueError if a shape does not fit."""
        N, K = codes_NK.shape
        group_size = group_size or K
        P = alpha_NGP.shape[-1]
        if not 1 <= P <= MAX_PLANES:
            raise ValueError(f"alpha names {P} bit planes; allowed: 1 to {MAX_PLANES}; choose fewer bits")
        needed = (N, groups(K, group_size))
        if alpha_NGP.shape[:2] != needed or offset_NG.shape != needed:
            raise ValueError(
                f"alpha has shape {tuple(alpha_NGP.shape)} and offset {tuple(offset_NG.shape)}; {K} columns in groups "
                f"of {group_size} need {(*needed, P)} and {needed}"
            )
        planes = torch.stack([codes_NK >> p & 1 for p in range(P)], 1)
        return cls(
            shape=(N, K), group_size=group_size, qweight=pack_codes(planes, 1), alpha=alpha_NGP, offset=offset_NG
        )

    def layout(self) -> Layout:
        """See `Packed.layout`; there are as many planes as scales of a group."""
        (N, K), P = self.shape, self.alpha.shape[-1] if self.alpha.dim() else 0
        if self.group_size < 1 or not 1 <= P <= MAX_PLANES:
            raise ValueError(f"{P} planes in groups of {self.group_size}; allowed: 1 to {MAX_PLANES} in groups above 0")
        G = groups(K, self.group_size)
        return {
            "qweight": [(INT32, (N, P, words(K, 1)))],
            "alpha": [(FLOATS, (N, G, P))],
            "offset": [(FLOATS, (N, G))],
        }

    @property
    def bits(self) -> int:
        """The number of planes."""
        return self.qweight.shape[1]

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equation above."""
        alpha, offset, K = self.alpha[rows].float(), self.offset[rows].float(), self.shape[1]
        bits = unpack_codes(self.qweight[rows], 1, K)
        (n, G, P), g = alpha.shape, self.group_size
        signs = torch.nn.functional.pad(bits, (0, G * g - K)).view(n, P, G, g).float().mul_(2).sub_(1)
        w = offset[:, :, None].expand(n, G, g)
        for p in range(P):
            w = torch.addcmul(w, alpha[:, :, p, None], signs[:, p])
        return w.flatten(1)[:, :K]

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """uint8 (n, K): sum_p b_p 2^p."""
        bits = unpack_codes(self.qweight[rows], 1, self.shape[1])
        return sum((bits[:, p] << p for p in range(1, bits.shape[1])), start=bits[:, 0])


def levels(alpha: Tensor, offset: Tensor) -> Tensor:
    """The 2^P values (..., 2^P) that groups with scales (..., P) and offset (...) can take, in the order of codes."""
    P = alpha.shape[-1]
    codes = torch.arange(2**P, device=alpha.device)
    signs = torch.stack([(codes >> p & 1) * 2 - 1 for p in range(P)]).to(alpha.dtype)
    return offset[..., None] + alpha @ signs
