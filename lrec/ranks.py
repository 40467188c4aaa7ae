"""The ranks of new adapters: one for all layers, or for each the one that quantizing has allocated to it."""

from pathlib import Path

from torch import nn

from lrec import checkpoint, documents, lowrank
from lrec.assembly import LOWRANK
from lrec.learning import Learning

RANK = 16  # where none is given or allocated


def allocated(model_dir: Path) -> dict[str, int]:
    """Rank by layer, of those that have one above 0, if `lrec quantize --allocate_ranks` chose them; empty if not."""
    path = model_dir / "config.json"
    config = checkpoint.read_json(path, documents.Quantized).get("quantization_config") or {}
    meta = documents.check(config, documents.PackedConfig, path).get("meta") or {}
    return lowrank.ranks(model_dir / LOWRANK) if meta.get("allocate_ranks") else {}


def shape(learning: Learning, model_dir: Path) -> dict:
    """Where new adapters go, of which rank and scaled how, as peft's LoraConfig takes it."""
    everywhere, alpha = learning.lora_target_modules == "all-linear", learning.lora_alpha
    chosen = {}
    if everywhere and learning.lora_r is None and learning.lora_init == "closed_form":
        chosen = allocated(model_dir)
    rank = max(chosen.values(), default=learning.lora_r or RANK)
    others = {layer: own for layer, own in chosen.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "rank_pattern": others,
        "alpha_pattern": others if alpha is None else {},
        "target_modules": sorted(chosen) or ("all-linear" if everywhere else learning.lora_target_modules.split(",")),
    }


def check(model: nn.Module, adapter_name: str = "default") -> None:
    """Raises ValueError for adapters of a larger rank than their layers have, naming these with their sizes."""
    from peft.tuners.lora.layer import LoraLayer

    wrong = [
        f"{name.removeprefix('base_model.model.')} ({layer.out_features} x {layer.in_features})"
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
        if layer.r[adapter_name] > min(layer.in_features, layer.out_features)
    ]
    if wrong:
        raise ValueError(
            f"lora_r = {model.peft_config[adapter_name].r} is larger than {len(wrong)} layers, the first of them "
            f"{', '.join(wrong[:3])}; allowed: up to a layer's smaller side. Lower lora_r, or name other "
            "lora_target_modules"
        )
