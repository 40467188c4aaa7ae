"""What of a model the pass leaves in full precision, how many bytes that is, and why: nothing is skipped silently."""

import torch
from torch import nn

from lrec import experts
from lrec.anatomy import Blocks
from lrec.nn import PackedModule

VECTORS = "norms, biases and other vectors: few, and what they multiply is small"
ROUTERS = "what routes tokens to experts: a small error would choose others"
EXPERTS = "fused experts without the marks of transformers' use_experts_implementation, by which lrec runs them"
OTHER = "convolutions, and matrices that are no plain linear layer"
TABLES = "embeddings and output head: see --quantize_embeddings"
OUTSIDE = "not of the text model: what reads images or sound, and what joins it to the text"


def told(model: nn.Module, blocks: Blocks, packed: int, dtype: torch.dtype) -> dict:
    """What the report says of it, beside a number of `packed` weights in the blocks: see `rows`."""
    left = rows(model, blocks, dtype)
    return {
        "quantized_share_of_model": packed / (packed + sum(row["weights"] for row in left)),
        "unquantized": left,
    }


def rows(model: nn.Module, blocks: Blocks, dtype: torch.dtype) -> list[dict]:
    """A row for each reason: the number of weights left for it, their bytes in `dtype`, that of the checkpoint, and the
    module that holds most of them."""
    tied = getattr(model, "all_tied_weights_keys", {})
    text = {*(model.get_decoder() if hasattr(model, "get_decoder") else model).modules()}
    tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if full in tied or (isinstance(module, PackedModule) and parameter.ndim > 1):
                continue
            if name.startswith(f"{blocks.path}."):
                why = _in_block(model, name, module, parameter)
            elif module in tables:
                why = TABLES
            else:
                why = (VECTORS if parameter.ndim < 2 else OTHER) if module in text else OUTSIDE
            found.setdefault(why, {})[name] = found.get(why, {}).get(name, 0) + parameter.numel()
    return [
        {
            "unquantized": why,
            "weights": sum(held.values()),
            "mb": sum(held.values()) * dtype.itemsize / 1e6,
            "largest": max(held, key=held.get),
        }
        for why, held in found.items()
    ]


def _in_block(model: nn.Module, name: str, module: nn.Module, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return VECTORS
    parent = model.get_submodule(name.rpartition(".")[0])
    if any(isinstance(child, experts.Unfused) for child in parent.children()):
        return ROUTERS
    return EXPERTS if parameter.ndim == 3 and not isinstance(module, nn.Conv1d) else OTHER
