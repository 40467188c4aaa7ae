"""HQQ: half-quadratic quantization of scales and zeros, in groups of 64.

Its README advises groups of 64, axis=1 where fused kernels are wanted and axis=0 for better quality at the same bytes,
above all at 2 bits. On a CPU there are no such kernels, so it is axis=0 for every width; at 2 bits the KL to full
precision was 8.45 with axis=0 and 9.99 with axis=1, on four of the held-out windows.
"""

from collections.abc import Iterator
from pathlib import Path

PACKAGE = "hqq"
ABSENT = {}
SETTINGS = (
    "groups of 64, axis=0 (README: better quality, axis=1 is for fused kernels), bfloat16 scales and zeros; needs no "
    "text. It saves a pickle; at 3 bits it packs 10 codes into 32 bits and, along axis 0, pads 64 to 70: 3.5 bits each"
)


def quantize(source: Path, bits: int, ids, folder: Path) -> None:
    """See `peers`."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=0)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.bfloat16, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(folder))


def load(folder: Path, dtype):
    """See `peers`."""
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoHQQHFModel.from_quantized(str(folder), compute_dtype=dtype, device="cpu")
    model.tie_weights()  # it loads embeddings and head apart
    return model


def stored(folder: Path) -> Iterator[tuple[str, int]]:
    """See `peers`."""
    import torch

    # Read as torch does without running what a pickle says.
    modules = torch.load(folder / "qmodel.pt", weights_only=True, mmap=True)
    seen = set()
    for name, state in modules.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.data_ptr() not in seen:
                seen.add(value.data_ptr())  # tied tensors are in the file once
                yield f"{name}.{key}", value.numel() * value.element_size()
