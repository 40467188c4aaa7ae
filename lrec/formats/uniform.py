"""Uniform integers: w = scale * (code - zero), one scale and zero per row and group of columns.

Codes take exactly `bits` bits each (3-bit codes too). Groups run along K; a last group may be short; `group_size = K`
(or 0, made K) is one group per row, the per-channel grid. The zero point is one of three: absent for the symmetric
grid (then it is the middle code 2^(bits-1)), an integer packed as tightly as the codes, or a float (fp16), which a
2-bit grid profits from and which exact merges need.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrec.formats import Packed, pack_codes, unpack_codes

WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, eq=False, kw_only=True)
class Uniform(Packed):
    """w_NK[n, k] = scale_NG[n, g] * (q_NK[n, k] - zero[n, g]) with g = k // group_size.

    qweight: int32 (N, ceil(K/32) * bits), codes in the order of `pack_codes`.
    scale:   float16 or float32 (N, G), G = ceil(K / group_size).
    zero:    None: symmetric, zero = 2^(bits-1); float (N, G); or int32 (G, ceil(N/32) * bits), codes packed along N
             (GPTQ's qzeros, there stored transposed like qweight and, in its version 1, less one).
    """

    bits: int
    group_size: int
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @classmethod
    def pack(cls, codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int) -> "Uniform":
        """Packs codes; an integer `zero_NG` is stored in `bits` bits, a float one as it is.

        Raises ValueError for a width that is not 2, 3, 4 or 8 or a group size that does not fit scale's shape.
        """
        N, K = codes_NK.shape
        group_size = group_size or K
        check(bits, group_size, K)
        if scale_NG.shape != (N, groups(K, group_size)):
            needed = (N, groups(K, group_size))
            raise ValueError(
                f"scale has shape {tuple(scale_NG.shape)}, but {K} columns in groups of {group_size} need {needed}"
            )
        if zero_NG is not None and not zero_NG.is_floating_point():
            zero_NG = pack_codes(zero_NG.t(), bits)
        codes = pack_codes(codes_NK, bits)
        return cls(shape=(N, K), bits=bits, group_size=group_size, qweight=codes, scale=scale_NG, zero=zero_NG)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equation above."""
        q = self.codes(rows).float()
        scale, zero = self.scale[rows].float(), self.zeros(rows)
        N, K = q.shape
        whole = K - K % self.group_size
        w = torch.empty_like(q)
        body = slice(0, whole // self.group_size)
        grouped, out = (t[:, :whole].unflatten(1, (-1, self.group_size)) for t in (q, w))
        torch.mul(grouped.sub_(zero[:, body, None]), scale[:, body, None], out=out)
        if whole < K:
            w[:, whole:] = (q[:, whole:] - zero[:, -1:]) * scale[:, -1:]
        return w

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """uint8 (n, K)."""
        return unpack_codes(self.qweight[rows], self.bits, self.shape[1])

    def zeros(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, G), whichever of the three ways they are stored."""
        if self.zero is None:
            return torch.full_like(self.scale[rows], 2 ** (self.bits - 1), dtype=torch.float32)
        if self.zero.is_floating_point():
            return self.zero[rows].float()
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // 32, -(-stop // 32)
        words = self.zero[:, first * self.bits : last * self.bits]
        codes = unpack_codes(words, self.bits, (last - first) * 32)
        return codes[:, start - first * 32 : stop - first * 32].t().float()


def groups(K: int, group_size: int) -> int:
    """Number of groups along K columns; the last may be short."""
    return -(-K // group_size)


def check(bits: int, group_size: int, K: int) -> None:
    """Raises ValueError if the width is not offered or a group is too small or longer than the row."""
    if bits not in WIDTHS:
        raise ValueError(f"bits = {bits} is not a uniform width; allowed: {', '.join(map(str, WIDTHS))}")
    if not 16 <= group_size <= max(K, 16):
        fits = [g for g in (16, 32, 64, 128, 256, 512) if g <= K]
        raise ValueError(
            f"group_size = {group_size} does not fit {K} columns; allowed: 16 to {K}, or 0 for the whole row "
            f"(sizes that fit: {fits})"
        )
