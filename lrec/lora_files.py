"""What `lrec train` saved, read without peft and without the base model: LoRA weights, trained scales and zeros."""

import math
from pathlib import Path

import torch
from torch import Tensor

from lrec import checkpoint, foreign, lora_bits, trained
from lrec.formats import Packed


class LoraFiles:
    """The pairs of A and B by layer, the largest `rank` (0 without any) and the `scaling` of their product; and the
    tensors of the base that were trained, `fields`, by layer.

    An adapter that was trained on top of another, `below`, is read with it, as one of the rank of both together.
    Raises ValueError for an adapter that is not plain LoRA, whose stamp names other packed weights, or that lacks the
    one it was trained on.
    """

    def __init__(self, directory: Path, packed_sha256: str | None):
        self.directory = directory
        stamp = checkpoint.check_stamp(directory, packed_sha256)
        below = checkpoint.correction_of(directory)
        checkpoint.check_correction(directory, stamp, [checkpoint.adapter_hash(below)] if below else [])
        self.below = LoraFiles(below, packed_sha256) if below else None
        if self.below:
            self.below.fields = {}  # the same as here
        self.fields = trained.read(directory, stamp)
        self.tensors: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.own_rank, self.config = 0, {}
        if not self.fields or (directory / "adapter_config.json").exists():
            self._read_pairs(directory)
        self.rank = self.own_rank + (self.below.rank if self.below else 0)
        self.alike = not (self.below or self.config.get("rank_pattern") or self.config.get("alpha_pattern"))
        self.scaling = self._own_scaling("", self.own_rank) if self.alike and self.config else 1.0

    def _read_pairs(self, directory: Path) -> None:
        config = foreign.lora_config(directory)
        odd = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
        if config.get("peft_type") != "LORA" or odd:
            raise ValueError(
                f"{directory} is not a plain LoRA ({config.get('peft_type')}, {', '.join(odd)}); "
                "merge it with peft's merge_and_unload instead"
            )
        if unsaid := [key for key in ("r", "lora_alpha") if key not in config]:
            raise ValueError(
                f"{directory / 'adapter_config.json'} does not say {', '.join(unsaid)}; train or fetch it again"
            )
        self.config = config
        self.own_rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        self.tensors = lora_bits.read(directory / checkpoint.ADAPTER_WEIGHTS)

    def packed(self, layer: str, packed: Packed) -> Packed:
        """A layer's weight with the scales and zeros that were trained; the same if none were."""
        self.used.add(f"fields of {layer}")
        return trained.updated(layer, packed, self.fields[layer]) if layer in self.fields else packed

    def pair(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """(A, B), (R, K) and (N, R) as stored, int8 in float32, for a layer, or None if it is not adapted.

        With an adapter below, or where ranks or scalings differ between layers, in float32 and B scaled already: A of
        both and B of both, or of the one that adapts the layer.
        """
        own = self._own_pair(layer)
        if self.alike:
            return own
        under = self.below.pair(layer) if self.below else None
        parts = [(under, self.below.scaling)] if under else []
        parts += [(own, self._own_scaling(layer, len(own[0])))] if own else []
        if not parts:
            return None
        scaled = [scaling * b_NR.float() for (_, b_NR), scaling in parts]
        return torch.cat([a_RK.float() for (a_RK, _), _ in parts]), torch.cat(scaled, 1)

    def _own_scaling(self, layer: str, rank: int) -> float:
        alpha, own = self.config["lora_alpha"], self.config.get("alpha_pattern") or {}
        if own:
            from peft.utils.other import get_pattern_key

            alpha = own.get(get_pattern_key(own.keys(), layer), alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _own_pair(self, layer: str) -> tuple[Tensor, Tensor] | None:
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
        if self.below:
            self.below.check_used(model_dir)
        unused = sorted({*self.tensors, *(f"fields of {layer}" for layer in self.fields)} - self.used)
        if unused:
            raise ValueError(
                f"{self.directory} adapts layers that {model_dir} does not have: {', '.join(unused[:4])}; use "
                "the base it was trained on"
            )
