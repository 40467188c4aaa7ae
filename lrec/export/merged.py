"""The corrected model as a dense one: every packed weight decoded, plus its adapter's BA; loads without lrec.

Streamed: one block is in memory at a time, and one shard a block is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import rewrite
from lrec.export import Export
from lrec.formats import Packed
from lrec.lora_files import LoraFiles
from lrec.report import packed_config
from lrec.stream import StreamedModel


@dataclass(frozen=True, kw_only=True)
class Merged(Export):
    """Dense bfloat16 safetensors of base plus adapter."""

    dtype: ClassVar[torch.dtype] = torch.bfloat16
    tolerance: ClassVar[float] = 2e-2  # weights of eight bits

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError for adapters that are not plain LoRA or belong to another base."""
        meta = packed_config(model_dir).get("meta", {})
        streamed = StreamedModel(model_dir, self.dtype)
        adapter = LoraFiles(adapter_dir, meta.get("packed_sha256")) if adapter_dir else None

        def dense(name: str, packed: Packed) -> dict[str, Tensor]:
            delta = adapter.delta(name) if adapter else None
            weight = (adapter.packed(name, packed) if adapter else packed).unpack()
            return {"weight": weight if delta is None else weight.add_(delta)}

        rewrite.rewrite(streamed, output_dir, dense, self.dtype)
        if adapter:
            adapter.check_used(model_dir)
        rewrite.finish(streamed, output_dir, None, self.dtype)
        rank = {"folded_rank": adapter.rank} if adapter and adapter.rank else {}
        return {"dtype": str(self.dtype).removeprefix("torch.")} | rank
