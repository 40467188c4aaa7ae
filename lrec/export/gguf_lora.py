"""A LoRA file for llama.cpp (`--lora`), to be used on the GGUF file of the same packed base.

Each pair is `<tensor>.lora_a` (R, K) and `<tensor>.lora_b` (N, R), rows of q and k in the file's order; llama.cpp
scales the product by adapter.lora.alpha / R.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from lrec import foreign
from lrec.export import Export
from lrec.export.gguf import Gguf, llama_cpp_logits, start, write_tensors
from lrec.ggml.model import Names
from lrec.lora_files import LoraFiles
from lrec.report import packed_config
from lrec.rewrite import kinds


@dataclass(frozen=True, kw_only=True)
class GgufLora(Export):
    """`adapter.gguf` in float32."""

    readers: ClassVar[tuple[str, ...]] = ("llama_cpp",)
    tolerance: ClassVar[float] = 5e-2

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError without an adapter, or for one that is not plain LoRA on this base."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if adapter_dir is None:
            raise ValueError(
                "--format gguf-lora needs --adapter, the directory that `lrec train` wrote; the base is --format gguf"
            )
        adapter = LoraFiles(adapter_dir, packed_config(model_dir).get("meta", {}).get("packed_sha256"))
        if adapter.fields:
            raise ValueError(
                f"gguf-lora holds low-rank factors alone, but {adapter_dir} has trained scales and zeros of the base "
                "too; fold those in first (--format packed), or use --format merged"
            )
        config = foreign.config(model_dir)
        names = Names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type), config)
        writer = start(output_dir / "adapter.gguf", names, model_dir)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        arrays = {}
        for layer in kinds(model_dir):
            if pair := adapter.pair(layer):
                order, name = names.row_order(f"{layer}.weight"), names.name(f"{layer}.weight")
                a_RK, b_NR = (half.float() for half in pair)
                arrays[f"{name}.lora_a"] = a_RK.numpy()
                # llama.cpp divides alpha by each layer's own rank.
                b_NR = b_NR * (len(a_RK) / adapter.rank)
                arrays[f"{name}.lora_b"] = (b_NR if order is None else b_NR[order]).numpy()
        adapter.check_used(model_dir)
        writer.add_float32("adapter.lora.alpha", adapter.scaling * adapter.rank)
        write_tensors(writer, lambda: ((name, array, array.shape, None) for name, array in arrays.items()))
        return {"rank": adapter.rank, "num_layers": len(arrays) // 2}

    def logits(self, output_dir: Path, model_dir: Path, ids: Tensor) -> Tensor:
        """See `Export.logits`: on the GGUF file of the base, written for the purpose."""
        with tempfile.TemporaryDirectory() as directory:
            Gguf().write(model_dir, None, Path(directory))
            return llama_cpp_logits(ids, Path(directory) / "model.gguf", output_dir / "adapter.gguf")
