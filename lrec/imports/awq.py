"""AWQ checkpoints of AutoAWQ (version GEMM, 4 bits): w[n, k] = scales[g, n] * (q[n, k] - zero[g, n]).

qweight  int32 (K, N / 8)    field i of word j is column 8 j + ORDER[i] of the row
qzeros   int32 (G, N / 8)    as qweight
scales   float16 (G, N)
"""

import torch
from torch import Tensor

from lrec.formats import Packed, pack_codes
from lrec.imports import Import, exact_scale
from lrec.imports.gptq import grouped

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Import):
    """Uniform integers of 4 bits."""

    mark = "qweight"

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """See `Import.read`."""
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise ValueError(f"AWQ version {version!r} with {bits} bits; allowed: gemm with 4 bits")
        codes_NK, zero_NG = (columns(tensors[field]).t() for field in ("qweight", "qzeros"))
        scale = exact_scale(tensors["scales"].t().contiguous())
        return grouped(tuple(codes_NK.shape), 4, pack_codes(codes_NK, 4), scale, zero_NG.int(), None)


def columns(words: Tensor) -> Tensor:
    """The fields of int32 words (rows, N / 8) in the order of their columns, uint8 (rows, N)."""
    fields = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).to(torch.uint8)
    return fields[..., torch.tensor(ORDER).argsort()].flatten(1)
