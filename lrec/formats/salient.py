"""PTQ1.61 (arXiv 2502.13179): a fifth of the input channels in 4 bits, one sign for every other weight.

Which channels are salient is one mask for the whole layer, so it costs one bit per *column*. Of the paper's factors
(r1 r2^T) o (s sign(W - mu) + mu) the row factors are stored multiplied out: scale = r1 s, offset = r1 mu.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrec.formats import FLOATS, INT32, Layout, Packed, pack_codes, unpack_codes, words

SALIENT_BITS = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Salient(Packed):
    """Salient column k, the i-th of S: w_NK[n, k] = salient_scale_N[n] * (q_NS[n, i] - salient_zero_N[n]).
    Other column k, the j-th of M = K - S: w_NK[n, k] = column_M[j] * (scale_N[n] * (2 * b_NM[n, j] - 1) + offset_N[n]).

    qweight: int32 (N, ceil(M / 32)), bit j % 32 of word j // 32 is b.
    mask:    int32 (ceil(K / 32),), bit k % 32 of word k // 32 is 1 where column k is salient.
    salient: int32 (N, ceil(S / 32) * 4), the codes q in the order of `pack_codes`.
    salient_scale, scale, offset: float (N,); column: float (M,).
    salient_zero: int32 (ceil(N / 32) * 4,), integers 0 to 15 packed as codes.
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {"scales": ("salient_scale", "scale", "column")}

    num_salient: int
    qweight: Tensor
    mask: Tensor
    salient: Tensor
    salient_scale: Tensor
    salient_zero: Tensor
    scale: Tensor
    offset: Tensor
    column: Tensor

    @classmethod
    def pack(
        cls,
        mask_K: Tensor,
        salient: tuple[Tensor, Tensor, Tensor],
        signs_NM: Tensor,
        factors: tuple[Tensor, Tensor, Tensor],
    ) -> "Salient":
        """Packs the mask, the salient columns (codes_NS, scale_N, zero_N), bits b, and (scale_N, offset_N, column_M).

        Raises ValueError when the mask does not have as many ones as there are salient columns.
        """
        codes_NS, salient_scale_N, zero_N = salient
        (N, S), M, K = codes_NS.shape, signs_NM.shape[1], len(mask_K)
        if int(mask_K.sum()) != S or S + M != K:
            raise ValueError(f"the mask marks {int(mask_K.sum())} of {K} columns, but {S} are salient and {M} are not")
        scale_N, offset_N, column_M = factors
        return cls(
            shape=(N, K),
            num_salient=S,
            qweight=pack_codes(signs_NM.byte(), 1),
            mask=pack_codes(mask_K.byte(), 1),
            salient=pack_codes(codes_NS, SALIENT_BITS),
            salient_scale=salient_scale_N,
            salient_zero=pack_codes(zero_N, SALIENT_BITS),
            scale=scale_N,
            offset=offset_N,
            column=column_M,
        )

    def layout(self) -> Layout:
        """See `Packed.layout`."""
        (N, K), S = self.shape, self.num_salient
        if not 0 <= S <= K:
            raise ValueError(f"{S} of {K} columns cannot be salient")
        rows = [(FLOATS, (N,))]
        return {
            "qweight": [(INT32, (N, words(K - S, 1)))],
            "mask": [(INT32, (words(K, 1),))],
            "salient": [(INT32, (N, words(S, SALIENT_BITS)))],
            "salient_scale": rows,
            "salient_zero": [(INT32, (words(N, SALIENT_BITS),))],
            "scale": rows,
            "offset": rows,
            "column": [(FLOATS, (K - S,))],
        }

    def check_values(self) -> None:
        """See `Packed.check_values`."""
        if (marked := len(self.columns()[0])) != self.num_salient:
            raise ValueError(f"the mask marks {marked} columns, but {self.num_salient} are salient")

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, K) by the equations above."""
        scale, offset = self.scale[rows].float()[:, None], self.offset[rows].float()[:, None]
        signs = self.signs(rows)
        w = signs.new_empty(len(signs), self.shape[1])
        salient, rest = self.columns()
        w[:, rest] = self.column.float() * (scale * signs + offset)
        w[:, salient] = self.salient_weight(rows)
        return w

    def columns(self) -> tuple[Tensor, Tensor]:
        """Indices (S,) of the salient columns and (M,) of the others, ascending."""
        mask = unpack_codes(self.mask, 1, self.shape[1]).bool()
        return mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]

    def signs(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, M) of -1 and 1."""
        return unpack_codes(self.qweight[rows], 1, self.shape[1] - self.num_salient).float() * 2 - 1

    def salient_weight(self, rows: slice = slice(None)) -> Tensor:
        """float32 (n, S): the decoded salient columns."""
        codes = unpack_codes(self.salient[rows], SALIENT_BITS, self.num_salient).float()
        zero = unpack_codes(self.salient_zero, SALIENT_BITS, self.shape[0])[rows].float()
        return (codes - zero[:, None]) * self.salient_scale[rows].float()[:, None]
