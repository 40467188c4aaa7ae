"""How large a model is as it lies on disk, whichever package wrote it."""

from collections.abc import Iterator
from pathlib import Path


def tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor in a folder's safetensors files."""
    from safetensors import safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not a dict)
                tensor = file.get_tensor(key)
                yield key, tensor.numel() * tensor.element_size()


def quantized_weights(source: Path) -> dict[str, int]:
    """Name -> number of weights of the linears of a full-precision model that are quantized: all that lie in blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lrec import anatomy

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and anatomy.in_block(name)
    }


def size(folder: Path, stored: Iterator[tuple[str, int]], weights: dict[str, int], adapter_bytes: int = 0) -> dict:
    """Bits per weight of what is stored for the linears named in `weights`, and bytes on disk, an adapter's included.

    `unquantized_bytes` is what else is stored: of SmolLM2 56.7 MB of embeddings, once, and norms in bfloat16.
    """
    layers = other = 0
    for name, nbytes in stored:
        if any(owner in weights for owner in owners(name)):
            layers += nbytes
        else:
            other += nbytes
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
    return {
        "bits_per_weight": 8 * (layers + adapter_bytes) / sum(weights.values()),
        "total_bytes": sum(path.stat().st_size for path in files) + adapter_bytes,
        "unquantized_bytes": other,
        "adapter_bytes": adapter_bytes,
    }


def owners(name: str) -> Iterator[str]:
    """The modules that a tensor's name lies in, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
