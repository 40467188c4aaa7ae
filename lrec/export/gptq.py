"""A GPTQ checkpoint (AutoGPTQ's and GPTQModel's fields), for transformers with gptqmodel, vLLM and SGLang.

A linear of shape (N, K) has, with g = k // group_size and codes and zeros in the bit order of `pack_codes`,

    qweight  int32 (K / 32 * bits, N)    codes, packed along K
    qzeros   int32 (G, N / 32 * bits)    zero points, packed along N; less one in version 1 (checkpoint_format "gptq")
    scales   float16 (G, N)
    g_idx    int32 (K,)                  k // group_size: no column is reordered (desc_act false)

and w[n, k] = scales[g, n] * (q[n, k] - zero[g, n]). Ours are the same words transposed, so nothing is rounded. Version
1 cannot hold a zero point of 0: readers differ in what they make of it (GPTQModel's upgrade carries into the next).
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import lrec
from lrec import checkpoint, rewrite
from lrec.export import Export
from lrec.formats import pack_codes, unpack_codes
from lrec.formats.uniform import Uniform
from lrec.options import setting
from lrec.registry import nearest
from lrec.stream import StreamedModel

VERSIONS = ("auto", "gptq", "gptq_v2")


@dataclass(frozen=True, kw_only=True)
class Gptq(Export):
    """Packed integers in GPTQ's fields; layers of other widths or groups are told in `dynamic`."""

    readers: ClassVar[tuple[str, ...]] = ("transformers", "optimum", "gptqmodel")

    checkpoint_format: str = setting("auto", "gptq (version 1), gptq_v2, or auto: gptq unless a zero point is 0")

    def __post_init__(self):
        if self.checkpoint_format not in VERSIONS:
            raise ValueError(nearest(self.checkpoint_format, VERSIONS, "checkpoint_format"))

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError for an adapter, and naming the layers that GPTQ cannot hold."""
        rewrite.without_adapter(adapter_dir, "gptq")
        rewrite.without_experts(model_dir, "gptq")
        specs = rewrite.refuse(
            model_dir, "gptq", misfit, "Nearest that can: --format merged, or quantize with --method gptq"
        )
        streamed = StreamedModel(model_dir, torch.float32)
        version = self._version(model_dir, specs)
        rewrite.rewrite(streamed, output_dir, lambda name, packed: fields(packed, version))
        quantization = quantization_config(specs, rewrite.unpacked(streamed, specs), version)
        rewrite.finish(streamed, output_dir, quantization)
        # Where AutoGPTQ and older servers look.
        checkpoint.write_json(output_dir / "quantize_config.json", quantization)
        return {"checkpoint_format": version}

    def _version(self, model_dir: Path, specs: dict[str, dict]) -> str:
        if self.checkpoint_format == "gptq_v2":
            return "gptq_v2"
        name = layer_with_zero(model_dir, specs)
        if name is None:
            return "gptq"
        if self.checkpoint_format == "auto":
            return "gptq_v2"
        raise ValueError(f"{name} has a zero point of 0, which GPTQ version 1 cannot hold; use gptq_v2 (or auto)")


def misfit(spec: dict) -> str | None:
    """Why GPTQ cannot hold a layer of this spec, or None."""
    if why := rewrite.misfit(spec):
        return why
    uneven = [size for size in spec["shape"] if size % 32]
    return f"a side of {uneven[0]} does not fill 32-bit words, which takes a multiple of 32" if uneven else None


def fields(packed: Uniform, version: str) -> dict[str, Tensor]:
    """The tensors of one layer, by the layout above."""
    K = packed.shape[1]
    zero = packed.zeros().int().t() - int(version == "gptq")
    assert int(zero.min()) >= 0, "version 1 was chosen for a zero point of 0"
    return {
        "qweight": packed.qweight.t(),
        "qzeros": pack_codes(zero, packed.bits),
        "scales": packed.scales().half().t(),
        "g_idx": (torch.arange(K) // packed.group_size).int(),
    }


def layer_with_zero(model_dir: Path, specs: dict[str, dict]) -> str | None:
    """The name of a layer that has a zero point of 0, if there is one."""
    for path in checkpoint.weight_files(model_dir):
        with checkpoint.open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not a dict)
                name, _, field = key.rpartition(".")
                if field == "zero" and name in specs:
                    spec = specs[name]
                    if not unpack_codes(file.get_tensor(key), spec["bits"], spec["shape"][0]).all():
                        return name
    return None


def quantization_config(specs: dict[str, dict], skipped: list[str], version: str) -> dict:
    """What config.json tells: the commonest width and group for all, the others' under `dynamic`, by name."""
    per_row = all(spec["group_size"] == spec["shape"][1] for spec in specs.values())
    told = {
        name: (spec["bits"], -1 if per_row else spec["group_size"], rewrite.zero_kind(spec) == "none")
        for name, spec in specs.items()
    }
    (bits, group_size, sym), _ = Counter(told.values()).most_common(1)[0]
    dynamic = {f"-:^{re.escape(name)}$": {} for name in skipped}
    dynamic |= {
        f"+:^{re.escape(name)}$": dict(zip(("bits", "group_size", "sym"), own, strict=True))
        for name, own in told.items()
        if own != (bits, group_size, sym)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"lrec:{lrec.__version__}"]},
    } | ({"dynamic": dynamic} if dynamic else {})
