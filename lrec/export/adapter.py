"""A plain peft repository: `PeftModel.from_pretrained(base, dir)` loads it after `import lrec`.

Its base is the *quantized* model, since an adapter that corrects 2-bit errors is wrong on anything else; the stamp
`lrec_adapter.json`, repeated in the header of the weights, holds the hash of the packed weights, which is checked
whenever peft loads the adapter onto a packed model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import card, checkpoint, text
from lrec.export import Export
from lrec.options import setting


@dataclass(frozen=True, kw_only=True)
class Adapter(Export):
    """`adapter_config.json`, `adapter_model.safetensors`, the stamp and a card."""

    readers: ClassVar[tuple[str, ...]] = ("transformers", "peft")

    base: str | None = setting(None, "Hub id of the packed base (none: that it was fetched by, or its folder)")
    revision: str | None = setting(None, "the base's revision there (none: that it was fetched at)")

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError without an adapter, or if it was made for another base."""
        if adapter_dir is None:
            raise ValueError(
                "--format adapter needs --adapter, the directory that `lrec train` wrote; "
                "to export the base alone use --format merged"
            )
        base = checkpoint.read_json(model_dir / "config.json").get("quantization_config", {}).get("meta", {})
        stamp = checkpoint.without_folders(checkpoint.check_stamp(adapter_dir, base.get("packed_sha256")))
        config = checkpoint.read_json(adapter_dir / "adapter_config.json")
        name, revision = text.origin(model_dir)
        if self.base is not None:
            name, revision = self.base, None
        config |= {"base_model_name_or_path": name, "revision": self.revision or revision}
        checkpoint.write_json(output_dir / "adapter_config.json", config)
        with checkpoint.open_tensors(adapter_dir / "adapter_model.safetensors") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
        header = {checkpoint.STAMP_KEY: json.dumps({k: v for k, v in stamp.items() if k != "history"})}
        checkpoint.write_tensors(output_dir / "adapter_model.safetensors", tensors, header if stamp else None)
        checkpoint.write_json(output_dir / checkpoint.ADAPTER_STAMP, stamp)
        size = checkpoint.weights_bytes(output_dir)
        told = card.adapter(
            output_dir.name.strip("."), card.Base(name=name, revision=config["revision"]), base, config, stamp, size, []
        )
        (output_dir / "README.md").write_text(told)
        return {"base": name, "revision": config["revision"], "rank": config["r"]}

    def logits(self, output_dir: Path, model_dir: Path, ids: Tensor) -> Tensor:
        """See `Export.logits`."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        return PeftModel.from_pretrained(base, output_dir)(ids).logits
