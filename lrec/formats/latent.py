"""Uniform integers while their codes are trained: behind each code stands a float, the latent, which rounds to it.

Gradients pass the rounding as if it were not there (straight through, Bengio et al. 2013, 1308.3432): dL/du =
scale * dL/dw. A latent beyond the outermost code is not driven further out, where no rounding would ever see it again.
A model on disk is never of this format: when training ends, `narrowed` packs the codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrec.formats import Layout, pack_codes
from lrec.formats.uniform import Uniform


@dataclass(frozen=True, eq=False, kw_only=True)
class Latent(Uniform):
    """w_NK[n, k] = scale[n, g] * (q_NK[n, k] - zero[n, g]) with q = clamp(round(u), 0, 2^bits - 1).

    qweight: float32 (N, K), the latents u, counted in codes.
    The others, and g: as in `uniform`.
    """

    @classmethod
    def of(cls, packed: Uniform) -> "Latent":
        """The same weight, value for value: its codes are the latents."""
        tensors = packed.tensors() | {"qweight": packed.codes().float()}
        return cls(shape=packed.shape, bits=packed.bits, group_size=packed.group_size, **tensors)

    def layout(self) -> Layout:
        """See `Packed.layout`."""
        return super().layout() | {"qweight": [((torch.float32,), self.shape)]}

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """uint8 (n, K)."""
        return self.qweight[rows].round().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def narrowed(self, fields: Sequence[str], spec: dict, scale_bits: int | None) -> Uniform:
        """See `Packed.narrowed`: codes are packed, the rest is rounded as a `Uniform`'s."""
        tensors = self.tensors() | {"qweight": pack_codes(self.codes(), self.bits)}
        packed = Uniform(shape=self.shape, bits=self.bits, group_size=self.group_size, **tensors)
        return packed.narrowed([name for name in fields if name != "qweight"], spec, scale_bits)

    def slice_gradients(self, rows: slice, dw_nK: Tensor) -> dict[str, Tensor]:
        """See `Uniform.slice_gradients`; that of the latents besides."""
        u_nK, columns = self.qweight[rows], torch.arange(self.shape[1], device=dw_nK.device) // self.group_size
        du_nK = dw_nK * self.scales(rows)[:, columns]
        outwards = ((u_nK < -0.5) & (du_nK > 0)) | ((u_nK > 2**self.bits - 0.5) & (du_nK < 0))
        return super().slice_gradients(rows, dw_nK) | {"qweight": du_nK.masked_fill_(outwards, 0)}
