"""GPTQ checkpoints of AutoGPTQ, GPTQModel and AutoRound; the fields are those of lrec.export.gptq.

Version 1 stores zero points less one, and what comes of adding it again is taken modulo 2^bits, as AutoGPTQ does.
"""

import re

import torch
from torch import Tensor

from lrec.formats import Packed, pack_codes, unpack_codes
from lrec.formats.indexed import Indexed
from lrec.formats.uniform import Uniform
from lrec.imports import Import, exact_scale, unless_middle


class Gptq(Import):
    """Uniform integers; with act-order, columns that name their group."""

    mark = "qweight"

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """See `Import.read`."""
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            raise ValueError(f"the layout is {version!r}; allowed: gptq and gptq_v2 (convert it with GPTQModel first)")
        bits = settings(name, config)["bits"]
        qweight, scale = tensors["qweight"].t().contiguous(), tensors["scales"].t().contiguous()
        K, N = qweight.shape[1] * 32 // bits, qweight.shape[0]
        zero_NG = unpack_codes(tensors["qzeros"], bits, N).int().t()
        if version == "gptq":
            zero_NG = (zero_NG + 1) % 2**bits
        return grouped((N, K), bits, qweight, exact_scale(scale), zero_NG, tensors.get("g_idx"))


def grouped(
    shape: tuple[int, int], bits: int, qweight: Tensor, scale: Tensor, zero_NG: Tensor, g_idx: Tensor | None
) -> Packed:
    """The packed weight of codes in `pack_codes` order, in runs of columns where `g_idx` (K,) says so or is None."""
    K, G = shape[1], scale.shape[1]
    zero_NG = unless_middle(zero_NG, bits)
    zero = None if zero_NG is None else pack_codes(zero_NG.t(), bits)
    held = {"shape": shape, "bits": bits, "qweight": qweight, "scale": scale, "zero": zero}
    # The size of the groups follows from their number, but for a short last one.
    size = K // G if K % G == 0 else int((g_idx == 0).sum()) if g_idx is not None else 0
    if size and (g_idx is None or torch.equal(g_idx.long(), torch.arange(K) // size)):
        return Uniform(**held, group_size=size)
    if g_idx is None or int(g_idx.max()) >= G or int(g_idx.min()) < 0:
        raise ValueError(f"{G} groups of {K} columns without a valid g_idx that says which are whose")
    return Indexed(**held, group=g_idx.int())


def settings(name: str, config: dict) -> dict:
    """The settings of a layer: the checkpoint's, under what `dynamic` says of layers that match."""
    for pattern, own in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return config | own
    return config
