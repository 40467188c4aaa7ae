"""What `lrec train` saved, read without peft and without the base model: LoRA weights, trained scales and zeros."""

import math
from pathlib import Path

from torch import Tensor

from lrec import checkpoint, trained
from lrec.formats import Packed


class LoraFiles:
    """The pairs of A and B by layer, their `rank` (0 without any) and the `scaling` of their product; and the tensors
    of the base that were trained, `fields`, by layer.

    Raises ValueError for an adapter that is not plain LoRA, or whose stamp names other packed weights.
    """

    def __init__(self, directory: Path, packed_sha256: str | None):
        self.directory = directory
        self.fields = trained.read(directory, checkpoint.check_stamp(directory, packed_sha256))
        self.tensors: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.rank, self.scaling = 0, 1.0
        if not self.fields or (directory / "adapter_config.json").exists():
            self._read_pairs(directory)

    def _read_pairs(self, directory: Path) -> None:
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
        with checkpoint.open_tensors(directory / checkpoint.ADAPTER_WEIGHTS) as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)

    def packed(self, layer: str, packed: Packed) -> Packed:
        """A layer's weight with the scales and zeros that were trained; the same if none were."""
        self.used.add(f"fields of {layer}")
        return trained.updated(layer, packed, self.fields[layer]) if layer in self.fields else packed

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
        unused = sorted({*self.tensors, *(f"fields of {layer}" for layer in self.fields)} - self.used)
        if unused:
            raise ValueError(f"{self.directory} adapts layers that {model_dir} does not have: {', '.join(unused[:4])}")
