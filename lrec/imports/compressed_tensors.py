"""compressed-tensors checkpoints, pack-quantized; the fields are those of lrec.export.compressed_tensors."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrec.formats import Packed, unpack_codes
from lrec.imports import Import, exact_scale
from lrec.imports.gptq import grouped


class CompressedTensors(Import):
    """Uniform integers of 2, 3, 4 or 8 bits; with act-order, columns that name their group."""

    mark = "weight_packed"

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """See `Import.read`."""
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        N, K = tensors["weight_shape"].tolist()
        # Its width follows from the number of words, and need not be looked up among the config groups' targets.
        bits = next((b for b in (2, 3, 4, 8) if packed.shape[1] == -(-K * b // 32)), None)
        if bits is None or packed.dtype != torch.int32 or "weight_global_scale" in tensors:
            raise ValueError(
                f"weight_packed is {packed.dtype} of shape {tuple(packed.shape)}; allowed: dense words of 2, 3, 4 or 8 "
                "bits (3 bits of old versions, ten to a word, are not: save it anew with a newer compressed-tensors)"
            )
        zero_NG = torch.full(scale.shape, 2 ** (bits - 1))
        if "weight_zero_point" in tensors:
            zero_NG = unpack_codes(whole(tensors["weight_zero_point"].t(), N, bits), bits, N).int().t()
        qweight = whole(packed, K, bits)
        return grouped((N, K), bits, qweight, exact_scale(scale), zero_NG, tensors.get("weight_g_idx"))


def whole(words: Tensor, n: int, bits: int) -> Tensor:
    """Rows of words filled up with zeros to whole runs of 32 codes."""
    return pad(words, (0, -(-n // 32) * bits - words.shape[1])).contiguous()
