"""A plain peft repository: `PeftModel.from_pretrained(base, dir)` loads it after `import lrec`.

Its base is the *quantized* model, since an adapter that corrects 2-bit errors is wrong on anything else; the stamp
`lrec_adapter.json`, repeated in the header of the weights, holds the hash of the packed weights, which is checked
whenever peft loads the adapter onto a packed model. Factors in int8 become bfloat16. The adapter of a task on top of a
correction comes out with it, as one LoRA of both ranks.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import card, checkpoint, foreign, load, lora_bits, text, trained
from lrec.export import Export
from lrec.lora_files import LoraFiles
from lrec.options import setting
from lrec.report import packed_config
from lrec.rewrite import kinds


@dataclass(frozen=True, kw_only=True)
class Adapter(Export):
    """`adapter_config.json`, `adapter_model.safetensors`, the stamp and a card."""

    readers: ClassVar[tuple[str, ...]] = ("transformers", "peft")
    recorded: ClassVar[bool] = False  # the stamp tells it

    base: str | None = setting(None, "Hub id of the packed base (none: that it was fetched by, or its folder)")
    revision: str | None = setting(None, "the base's revision there (none: that it was fetched at)")

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError without an adapter, or if it was made for another base."""
        if adapter_dir is None:
            raise ValueError(
                "--format adapter needs --adapter, the directory that `lrec train` wrote; "
                "to export the base alone use --format merged"
            )
        base = packed_config(model_dir).get("meta") or {}
        stamp = checkpoint.check_stamp(adapter_dir, base.get("packed_sha256"))
        if trained.read(adapter_dir, stamp):
            shutil.copyfile(adapter_dir / checkpoint.BASE_TENSORS, output_dir / checkpoint.BASE_TENSORS)
        config = foreign.lora_config(adapter_dir)
        if below := checkpoint.correction_of(adapter_dir):
            config, tensors = joined(LoraFiles(adapter_dir, base.get("packed_sha256")), config, below, model_dir)
            stamp = {key: value for key, value in stamp.items() if key != "correction_sha256"}
        else:
            checkpoint.check_correction(adapter_dir, stamp, [])
            tensors = lora_bits.read(adapter_dir / checkpoint.ADAPTER_WEIGHTS, torch.bfloat16)
        stamp = checkpoint.without_folders(stamp) | ({"lora_bits": 16} if "lora_bits" in stamp else {})
        name, revision = text.origin(model_dir)
        if self.base is not None:
            name, revision = self.base, None
        config |= {"base_model_name_or_path": name, "revision": self.revision or revision}
        checkpoint.write_json(output_dir / "adapter_config.json", config)
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

        base = load.model(str(model_dir), None, "cpu", "float32")
        return PeftModel.from_pretrained(base, output_dir)(ids).logits


def joined(adapter: LoraFiles, config: dict, below: Path, model_dir: Path) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and weights of one plain LoRA that is an adapter and the one below it: their ranks add up.

    Raises ValueError if either names its targets by a pattern.
    """
    targets = [config["target_modules"], foreign.lora_config(below)["target_modules"]]
    if not all(isinstance(names, list) for names in targets):
        raise ValueError(f"{adapter.directory} and {below} cannot be joined: target_modules must be lists of names")
    pairs = {layer: pair for layer in kinds(model_dir) if (pair := adapter.pair(layer))}
    tensors = {
        f"base_model.model.{layer}.lora_{half}.weight": tensor
        for layer, pair in pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    adapter.used |= {f"fields of {layer}" for layer in kinds(model_dir)}  # which go along in their own file
    adapter.check_used(model_dir)
    # Of both together where a layer has both.
    others = {layer: len(a) for layer, (a, _) in pairs.items() if len(a) != adapter.rank}
    ranks = {"r": adapter.rank, "lora_alpha": adapter.rank, "rank_pattern": others, "alpha_pattern": others}
    return config | ranks | {"use_rslora": False, "target_modules": sorted({*targets[0], *targets[1]})}, tensors
