"""The LoRA weights of a peft repository, read without peft and without the base model."""

import math
from pathlib import Path

from torch import Tensor

from lrec import checkpoint


class LoraFiles:
    """The pairs of A and B by layer, their `rank`, and the `scaling` of their product.

    Raises ValueError for an adapter that is not plain LoRA, or whose stamp names other packed weights.
    """

    def __init__(self, directory: Path, packed_sha256: str | None):
        self.directory = directory
        checkpoint.check_stamp(directory, packed_sha256)
        config = checkpoint.read_json(directory / "adapter_config.json")
        odd = [
            key
            for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
            if config.get(key)
        ]
        if config.get("peft_type") != "LORA" or odd:
            raise ValueError(
                f"{directory} is not a plain LoRA ({config.get('peft_type')}, {', '.join(odd)}); "
                "merge it with peft's merge_and_unload instead"
            )
        self.rank = config["r"]
        self.scaling = config["lora_alpha"] / (math.sqrt(self.rank) if config.get("use_rslora") else self.rank)
        with checkpoint.open_tensors(directory / "adapter_model.safetensors") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
        self.used: set[str] = set()

    def pair(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """(A, B), (R, K) and (N, R) as stored, for a layer, or None if it is not adapted."""
        keys = [f"base_model.model.{layer}.lora_{half}.weight" for half in "AB"]
        if not all(key in self.tensors for key in keys):
            return None
        self.used.update(keys)
        return self.tensors[keys[0]], self.tensors[keys[1]]

    def delta(self, layer: str) -> Tensor | None:
        """scaling * B A in float32 (N, K) for a layer, or None if it is not adapted."""
        pair = self.pair(layer)
        return None if pair is None else self.scaling * (pair[1].float() @ pair[0].float())

    def check_used(self, model_dir: Path) -> None:
        """Raises ValueError naming layers that are adapted, but that no `pair` or `delta` was asked for."""
        unused = sorted(set(self.tensors) - self.used)
        if unused:
            raise ValueError(f"{self.directory} adapts layers that {model_dir} does not have: {', '.join(unused[:4])}")
