"""compressed-tensors' pack-quantized layout (W2/W3/W4/W8A16), for transformers with compressed-tensors and vLLM.

A linear of shape (N, K) has, with codes and zeros shifted to be signed and stored in the bit order of `pack_codes`,

    weight_packed      int32 (N, ceil(K * bits / 32))   codes, packed along K
    weight_scale       float16 (N, G)
    weight_zero_point  int32 (ceil(N * bits / 32), G)   zero points, packed along N; absent if symmetric
    weight_shape       int64 (2,)                       N, K

and w[n, k] = weight_scale[n, g] * (q[n, k] - zero[n, g]). The shift by 2^(bits-1) is undone by the offset that the
layout adds before it packs, so ours are the same words. Versions of compressed-tensors before the dense packing put
ten 3-bit codes in a word and cannot read these.

transformers (5.23) reads zero points only where it decodes while loading, which `dequantize` asks for, and there it
takes one scheme for all layers (vllm-project/llm-compressor issues 1618, 1704).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import rewrite
from lrec.export import Export
from lrec.formats.uniform import Uniform
from lrec.stream import StreamedModel


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Export):
    """Packed integers in groups or rows, one config group for each width, group size and symmetry."""

    readers: ClassVar[tuple[str, ...]] = ("transformers", "compressed_tensors")

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError for an adapter, and naming the layers that the layout cannot hold."""
        rewrite.without_adapter(adapter_dir, "compressed-tensors")
        rewrite.without_experts(model_dir, "compressed-tensors")
        specs = rewrite.refuse(
            model_dir,
            "compressed-tensors",
            rewrite.misfit,
            "Nearest that can: --format merged, or quantize with --method gptq",
        )
        streamed = StreamedModel(model_dir, torch.float32)
        rewrite.rewrite(streamed, output_dir, lambda name, packed: fields(packed))
        config = quantization_config(specs, rewrite.unpacked(streamed, specs))
        rewrite.finish(streamed, output_dir, config)
        found = {"config_groups": len(config["config_groups"])}
        if found["config_groups"] > 1 and has_zeros(specs):
            found["note"] = "transformers cannot read several schemes with zero points (quantize with --symmetric)"
        return found


def fields(packed: Uniform) -> dict[str, Tensor]:
    """The tensors of one layer, by the layout above."""
    N, K = packed.shape
    tensors = {
        "weight_packed": packed.qweight[:, : words(K, packed.bits)],
        "weight_scale": packed.scales().half(),
        "weight_shape": torch.tensor([N, K]),
    }
    if packed.zero is not None:
        tensors["weight_zero_point"] = packed.zero.t()[: words(N, packed.bits)]
    return tensors


def words(n: int, bits: int) -> int:
    """Number of 32-bit words that n codes touch."""
    return -(-n * bits // 32)


def quantization_config(specs: dict[str, dict], skipped: list[str]) -> dict:
    """What config.json tells: the schemes, and for each the layers by name (all linears, if there is but one)."""
    schemes: dict[tuple, list[str]] = {}
    for name, spec in specs.items():
        per_row = spec["group_size"] == spec["shape"][1]
        kind = (spec["bits"], None if per_row else spec["group_size"], rewrite.zero_kind(spec) == "none")
        schemes.setdefault(kind, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group_size else "channel",
                "group_size": group_size,
            },
        }
        for i, ((bits, group_size, symmetric), names) in enumerate(schemes.items())
    }
    told = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *skipped],
    }
    return told | ({"dequantize": True} if len(groups) == 1 and has_zeros(specs) else {})


def has_zeros(specs: dict[str, dict]) -> bool:
    """Whether some layer stores zero points."""
    return any(rewrite.zero_kind(spec) != "none" for spec in specs.values())
