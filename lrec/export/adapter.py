"""A plain peft repository: `PeftModel.from_pretrained(base, dir)` loads it after `import lrec`.

Its base is the *quantized* model, since an adapter that corrects 2-bit errors is wrong on anything else; the stamp
`lrec_adapter.json` holds the hash of the packed weights, and loading through lrec checks it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lrec import checkpoint
from lrec.export import Export


@dataclass(frozen=True, kw_only=True)
class Adapter(Export):
    """`adapter_config.json`, `adapter_model.safetensors`, the stamp and a card."""

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError without an adapter, or if it was made for another base."""
        if adapter_dir is None:
            raise ValueError(
                "--format adapter needs --adapter, the directory that `lrec train` wrote; "
                "to export the base alone use --format merged"
            )
        base = checkpoint.read_json(model_dir / "config.json").get("quantization_config", {}).get("meta", {})
        stamp = checkpoint.check_stamp(adapter_dir, base.get("packed_sha256"))
        config = checkpoint.read_json(adapter_dir / "adapter_config.json")
        config["base_model_name_or_path"] = str(model_dir)
        checkpoint.write_json(output_dir / "adapter_config.json", config)
        shutil.copyfile(adapter_dir / "adapter_model.safetensors", output_dir / "adapter_model.safetensors")
        checkpoint.write_json(output_dir / checkpoint.ADAPTER_STAMP, stamp)
        (output_dir / "README.md").write_text(card(str(model_dir), base, config, stamp))
        return {"base": str(model_dir), "rank": config["r"]}


def card(model_dir: str, base: dict, config: dict, stamp: dict) -> str:
    """The model card: what it corrects, how it was trained, and the lines that load it."""
    trained = "\n".join(
        f"- {key}: {value}" for key, value in stamp.items() if key not in ("packed_sha256", "format_version")
    )
    return f"""---
base_model: {model_dir}
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
tags: [lrec, quantized, lora]
---

# Low-rank error correction for {Path(model_dir).name}

A LoRA (rank {config["r"]}) that corrects the quantization error of `{model_dir}`, itself
{base.get("base_model", "a model")} at {base.get("bits_per_weight", 0):.2f} bits per weight. It is valid on that
packed base only.

```python
import lrec  # registers the packed format with transformers and peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{model_dir}")
model = PeftModel.from_pretrained(base, "<this repository>")
```

{trained}
"""
