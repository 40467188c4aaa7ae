"""Uniform integers: w = scale * (code - zero), one scale and zero per row and group of columns.

Codes take exactly `bits` bits each (3-bit codes too). Groups run along K; a last group may be short; `group_size = K`
(or 0, made K) is one group per row, the per-channel grid. The zero point is one of three: absent for the symmetric
grid (then it is the middle code 2^(bits-1)), an integer packed as tightly as the codes, or a float (fp16), which a
2-bit grid profits from and which exact merges need.

Scales and float zeros may take 8 bits in place of 16. A scale is then a small float of 3 exponent and 5 mantissa bits
(E3M5: at most 1.6 % from any scale down to 1/128 of the largest, coarser below) under an exponent that 32 rows share,
which costs next to nothing even where rows are short; a zero is a fixed-point number. fp16 holds both exactly, so who
wants floats decodes them once. A quantizer rounds to these numbers before it chooses codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lrec import registry
from lrec.eight_bits import (
    RUN,
    decode_scales,
    decode_zeros,
    dither,
    encode_scales,
    encode_zeros,
    exponents,
    per_row,
    round_scales,
    round_zeros,
)
from lrec.formats import FLOATS, INT32, Layout, Packed, pack_codes, row_slices, unpack_codes, words

WIDTHS = (2, 3, 4, 8)
SCALE_WIDTHS = (8, 16)


@dataclass(frozen=True, eq=False, kw_only=True)
class Uniform(Packed):
    """w_NK[n, k] = scale[n, g] * (q_NK[n, k] - zero[n, g]) with g = k // group_size.

    qweight: int32 (N, ceil(K/32) * bits), codes in the order of `pack_codes`.
    scale:   float16 or float32 (N, G), G = ceil(K / group_size); or uint8 codes c (N, G), which stand for
             (32 + c % 32) * 2^(x + c // 32 - 12), or c * 2^(x - 11) for c < 32, with x = scale_exponent[n // 32].
    zero:    None: symmetric, zero = 2^(bits-1); float (N, G); uint8 codes c (N, G), which stand for
             (c - 64) * 2^(bits - 7); or int32 (G, ceil(N/32) * bits), codes packed along N (GPTQ's qzeros, there
             stored transposed like qweight and, in its version 1, less one).
    scale_exponent: int8 (ceil(N/32),), where scale is uint8.
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("scale",), "zeros": ("zero",), "codes": ("qweight",)}

    bits: int
    group_size: int
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    scale_exponent: Tensor | None = None

    @classmethod
    def pack(
        cls,
        codes_NK: Tensor,
        scale_NG: Tensor,
        zero_NG: Tensor | None,
        bits: int,
        group_size: int,
        scale_bits: int = 16,
    ) -> "Uniform":
        """Packs codes; an integer `zero_NG` is stored in `bits` bits, scales and a float zero as they are or, with
        `scale_bits` 8, in 8 bits, which must hold them exactly (`round_scales` and `round_zeros` make them so).

        Raises ValueError for a width or a group size that does not fit, or scales and zeros that 8 bits do not hold.
        """
        N, K = codes_NK.shape
        group_size = group_size or K
        check(bits, group_size, K)
        if scale_NG.shape != (N, groups(K, group_size)):
            needed = (N, groups(K, group_size))
            raise ValueError(
                f"scale has shape {tuple(scale_NG.shape)}, but {K} columns in groups of {group_size} need {needed}"
            )
        float_zero = zero_NG is not None and zero_NG.is_floating_point()
        exponent = None
        if scale_bits == 8:
            exponent = exponents(scale_NG)
            scale_NG = encode_scales(scale_NG, exponent)
            zero_NG = encode_zeros(zero_NG, bits) if float_zero else zero_NG
        if zero_NG is not None and not float_zero:
            zero_NG = pack_codes(zero_NG.t(), bits)
        return cls(
            shape=(N, K),
            bits=bits,
            group_size=group_size,
            qweight=pack_codes(codes_NK, bits),
            scale=scale_NG,
            zero=zero_NG,
            scale_exponent=exponent,
        )

    def layout(self) -> Layout:
        """See `Packed.layout`."""
        (N, K), bits = self.shape, self.bits
        if bits not in WIDTHS or self.group_size < 1:
            raise ValueError(f"{bits} bits in groups of {self.group_size}; allowed: {WIDTHS} bits, groups of 1 or more")
        G = groups(K, self.group_size)
        grid = [((*FLOATS, torch.uint8), (N, G))]
        if (self.scale.dtype == torch.uint8) != (self.scale_exponent is not None):
            raise ValueError("scales of 8 bits come with scale_exponent, others without")
        return {
            "qweight": [(INT32, (N, words(K, bits)))],
            "scale": grid,
            "zero": [*grid, (INT32, (G, words(N, bits)))],
            "scale_exponent": [((torch.int8,), (-(-N // RUN),))],
        }

    def unpack(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """float32 (n, K) by the equation above; `rows` may also be int64 indices (n,), in any order."""
        q = self.codes(rows).float()
        scale, zero = self.scales(rows), self.zeros(rows)
        N, K = q.shape
        whole = K - K % self.group_size
        w = torch.empty_like(q)
        body = slice(0, whole // self.group_size)
        grouped, out = (t[:, :whole].unflatten(1, (-1, self.group_size)) for t in (q, w))
        torch.mul(grouped.sub_(zero[:, body, None]), scale[:, body, None], out=out)
        if whole < K:
            w[:, whole:] = (q[:, whole:] - zero[:, -1:]) * scale[:, -1:]
        return w

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """uint8 (n, K)."""
        return unpack_codes(self.qweight[rows], self.bits, self.shape[1])

    def scales(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """float32 (n, G), whichever way they are stored."""
        if self.scale.is_floating_point():
            return self.scale[rows].float()
        shared = self.scale_exponent.int()
        exponent = shared[rows // RUN, None] if isinstance(rows, Tensor) else per_row(shared, self.shape[0])[rows]
        return decode_scales(self.scale[rows], exponent)

    def zeros(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """float32 (n, G), whichever of the four ways they are stored."""
        if self.zero is None:
            return torch.full_like(self.scale[rows], 2 ** (self.bits - 1), dtype=torch.float32)
        if self.zero.is_floating_point():
            return self.zero[rows].float()
        if self.zero.dtype == torch.uint8:
            return decode_zeros(self.zero[rows], self.bits)
        if isinstance(rows, Tensor):
            words = self.zero.unflatten(1, (-1, self.bits))[:, rows // RUN]
            codes = unpack_codes(words, self.bits, RUN)
            return codes.gather(2, (rows % RUN).expand(len(codes), -1)[..., None])[..., 0].t().float()
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // RUN, -(-stop // RUN)
        words = self.zero[:, first * self.bits : last * self.bits]
        codes = unpack_codes(words, self.bits, (last - first) * RUN)
        return codes[:, start - first * RUN : stop - first * RUN].t().float()

    def updated(self, tensors: dict[str, Tensor]) -> "Uniform":
        """See `Packed.updated`; scales that are floats have no exponent."""
        floats = "scale" in tensors and tensors["scale"].is_floating_point()
        return replace(self, **({"scale_exponent": None} if floats else {}) | tensors)

    def trainable(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """See `Packed.trainable`: codes, and any scales and zeros but those that a symmetric grid does not store."""
        return tuple(name for kind in kinds for name in self.TRAINED.get(kind, ()) if getattr(self, name) is not None)

    def widened(self, fields: Sequence[str]) -> "Uniform":
        """See `Packed.widened`; 8-bit scales and zeros become floats together. With codes it becomes a `Latent`."""
        wide = {name: getattr(self, f"{name}s")() for name in fields if name != "qweight"}
        if self.scale.dtype == torch.uint8:
            wide = {"scale": self.scales()} | wide
        if self.zero is not None and self.zero.dtype == torch.uint8:
            wide = {"zero": self.zeros()} | wide
        # Kernels read rows; packed zeros are decoded by columns.
        held = self.updated({name: tensor.contiguous() for name, tensor in wide.items()})
        return registry.find("formats", "latent").of(held) if "qweight" in fields else held

    def narrowed(self, fields: Sequence[str], spec: dict, scale_bits: int | None) -> "Uniform":
        """See `Packed.narrowed`: 8 bits if that is what the scales had or is asked for, else float16. Zeros that were
        trained are no integers any more; those that were not stay as they are. Codes of 8 bits are finer than scales
        of 8 bits, so they get float16.

        To 8 bits, what was trained is rounded up or down by chance, so that on average it stays where it is (see
        `eight_bits.dither`)."""
        eight = spec["tensors"]["scale"][0] == "uint8"
        if self.bits == 8 or (scale_bits or (8 if eight else 16)) == 16:
            floats = ("scale", "zero") if eight else fields
            held = {name: getattr(self, name) for name in floats}
            return self.updated({n: t.half() for n, t in held.items() if t is not None and t.is_floating_point()})
        exponent = exponents(self.scales())
        scale_NG = round_scales(self.scales(), exponent, dither(self.scale, 0))
        made = {"scale": encode_scales(scale_NG, exponent), "scale_exponent": exponent}
        if self.zero is not None and self.zero.is_floating_point():
            made["zero"] = encode_zeros(round_zeros(self.zeros(), self.bits, dither(self.zero, 1)), self.bits)
        return self.updated(made)

    def kept_input(self, x_TK: Tensor, fields: Sequence[str]) -> Tensor:
        """See `Packed.kept_input`: zeros alone need no more of x than its sum over each group, (T, G)."""
        return x_TK if {"scale", "qweight"} & set(fields) else _sum_groups(x_TK, self.group_size)

    def gradients(self, dy_TN: Tensor, kept: Tensor, fields: Sequence[str]) -> list[Tensor]:
        """See `Packed.gradients`. Zeros alone need no dW: theirs is -scale * dy^T times the group's sum of x."""
        if not {"scale", "qweight"} & set(fields):
            return [(dy_TN.t() @ kept).float().mul_(self.scales()).neg_()]
        found = {name: torch.empty_like(getattr(self, name), dtype=torch.float32) for name in fields}
        for rows in row_slices(*self.shape):
            parts = self.slice_gradients(rows, (dy_TN[:, rows].t() @ kept).float())
            for name, whole in found.items():
                whole[rows] = parts[name]
        return list(found.values())

    def slice_gradients(self, rows: slice, dw_nK: Tensor) -> dict[str, Tensor]:
        """From dW of these rows, which is used up: by groups, dzero = -scale * sum dW, dscale = sum dW (q - zero)."""
        total_nG = _sum_groups(dw_nK, self.group_size)
        weighted_nG = _sum_groups(dw_nK.mul_(self.codes(rows)), self.group_size)
        scale = torch.addcmul(weighted_nG, total_nG, self.zeros(rows), value=-1)
        return {"scale": scale, "zero": total_nG.mul_(self.scales(rows)).neg_()}


def _sum_groups(values: Tensor, group_size: int) -> Tensor:
    """(n, K) summed over each group of columns, (n, G); the last group may be short."""
    K = values.shape[1]
    whole = K - K % group_size
    sums = values[:, :whole].unflatten(1, (-1, group_size)).sum(2)
    return sums if whole == K else torch.cat([sums, values[:, whole:].sum(1, keepdim=True)], 1)


def stack(parts: list[Uniform]) -> Uniform:
    """The weight whose rows are those of `parts`, one after the other; all but the last have a multiple of 32 rows."""
    assert all(part.shape[0] % RUN == 0 for part in parts[:-1]), [part.shape for part in parts]
    # Packed zeros run along N; all else has rows, or runs of them, first.
    tensors = {
        name: torch.cat([part.tensors()[name] for part in parts], 1 if tensor.dtype == torch.int32 else 0)
        for name, tensor in parts[0].tensors().items()
        if name != "qweight"
    }
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    return replace(parts[0], shape=shape, qweight=torch.cat([part.qweight for part in parts]), **tensors)


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
