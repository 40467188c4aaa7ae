"""The corrected model as a dense one: every packed weight decoded, plus its adapter's BA; loads without lrec.

Streamed: one block is in memory at a time, and one shard a block is written.
"""

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from lrec import anatomy, checkpoint
from lrec.export import Export
from lrec.nn import PackedLinear, packed_modules
from lrec.stream import StreamedModel


class Merged(Export):
    """Dense bfloat16 safetensors of base plus adapter."""

    dtype = torch.bfloat16

    @classmethod
    def write(cls, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError for adapters that are not plain LoRA or belong to another base."""
        streamed = StreamedModel(model_dir, torch.float32)
        meta = checkpoint.read_json(model_dir / "config.json").get("quantization_config", {}).get("meta", {})
        adapter = LoraFiles(adapter_dir, meta.get("packed_sha256")) if adapter_dir else None
        shards = []
        for index in range(len(streamed)):
            prefix = streamed.anatomy.name(index)
            dense = dense_block(streamed.load(index), prefix, streamed.stored(index), adapter)
            shards.append(save_shard(dense, output_dir, index, len(streamed) + 1, cls.dtype))
            streamed.free(index)
        rest = dense_rest(streamed)
        shards.append(save_shard(rest, output_dir, len(streamed), len(streamed) + 1, cls.dtype))
        if adapter and adapter.unused():
            raise ValueError(
                f"{adapter_dir} adapts layers that {model_dir} does not have: {', '.join(adapter.unused()[:4])}"
            )
        checkpoint.write_index(output_dir, shards)
        config = streamed.config
        del config.quantization_config
        config.dtype = cls.dtype
        config.save_pretrained(output_dir)
        for path in checkpoint.tokenizer_files(model_dir):
            shutil.copyfile(path, output_dir / path.name)
        return {"dtype": str(cls.dtype).removeprefix("torch.")}


def dense_block(block, prefix: str, stored: dict[str, Tensor], adapter: "LoraFiles | None") -> dict[str, Tensor]:
    """The block's tensors by full name, packed weights decoded and corrected, all others as stored."""
    tensors = {}
    for name, linear in anatomy.linears(block).items():
        if isinstance(linear, PackedLinear):
            delta = adapter.delta(f"{prefix}.{name}") if adapter else None
            weight = linear.packed.unpack()
            tensors[f"{prefix}.{name}.weight"] = weight if delta is None else weight + delta
            for held in linear.spec["tensors"]:
                stored.pop(f"{prefix}.{name}.{held}")
    return {**stored, **tensors}


def dense_rest(streamed: StreamedModel) -> dict[str, Tensor]:
    """What is in no block by full name, packed embeddings and head decoded; a tied head is not written."""
    tensors = streamed.stored(None)
    for name, layer in packed_modules(streamed.model).items():
        if not anatomy.in_block(name):
            tensors[f"{name}.weight"] = layer.packed.unpack()
            for held in layer.spec["tensors"]:
                del tensors[f"{name}.{held}"]
    return tensors


def save_shard(tensors: dict[str, Tensor], directory: Path, index: int, count: int, dtype: torch.dtype) -> Path:
    """Writes one shard, floats in `dtype`."""
    path = directory / f"model-{index + 1:05}-of-{count:05}.safetensors"
    checkpoint.write_tensors(path, {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()})
    return path


class LoraFiles:
    """The LoRA weights in a peft repository, read layer by layer."""

    def __init__(self, directory: Path, packed_sha256: str | None):
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
        self.scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        with checkpoint.open_tensors(directory / "adapter_model.safetensors") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
        self.used: set[str] = set()

    def delta(self, layer: str) -> Tensor | None:
        """scaling * B A in float32 (N, K) for a layer, or None if it is not adapted."""
        prefix = f"base_model.model.{layer}."
        a, b = self.tensors.get(f"{prefix}lora_A.weight"), self.tensors.get(f"{prefix}lora_B.weight")
        if a is None or b is None:
            return None
        self.used |= {f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"}
        return self.scaling * (b.float() @ a.float())

    def unused(self) -> list[str]:
        """Names of tensors no layer asked for."""
        return sorted(set(self.tensors) - self.used)
