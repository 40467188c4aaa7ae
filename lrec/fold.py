"""Rounding base plus adapter onto the base's kind of grid again, block by block: what `export --format packed` does.

Like the pass that quantizes (lrec.blocks), but that the target of a layer is Wq + BA, and that layers without an
adapter are carried over.
"""

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, formats, rewrite
from lrec.assembly import Assembly
from lrec.blocks import layer_row, packed_row
from lrec.inputs import collect
from lrec.lora_files import LoraFiles
from lrec.nn import PackedLinear, replace
from lrec.quantizers import quantize_layer
from lrec.quantizers.gptq import GPTQ
from lrec.report import packed_config
from lrec.stream import BlockCall, StreamedModel, advance

BATCH = 2  # windows run through a block at once


def misfit(spec: dict) -> str | None:
    """Why a layer of this spec cannot be rounded again, or None."""
    return None if spec["format"] == "uniform" else f"the format is {spec['format']}; GPTQ rounds to uniform integers"


@torch.no_grad()
def fold(streamed: StreamedModel, adapter: LoraFiles, specs: dict[str, dict], ids: Tensor, output_dir: Path) -> None:
    """Writes the packed model with every adapted layer rounded again, one block in memory at a time.

    `specs` are those of the packed layers by name, `ids` the calibration windows (B, L).
    """
    assembly, dense = Assembly(output_dir, "fold", len(streamed)), 0
    states = [streamed.embed(batch) for batch in ids.split(BATCH)]
    calls = streamed.block_calls(ids[:BATCH])
    streamed.free(None)
    for index in range(len(streamed)):
        start, name = time.monotonic(), streamed.anatomy.name(index)
        block = streamed.load(index)
        rows = fold_block(block, name, adapter, states, calls[index])
        kept = {key: t for key, t in streamed.stored(index).items() if key.rpartition(".")[0] not in specs}
        tensors = {f"{name}.{key}": tensor for key, tensor in block.state_dict().items()}
        assembly.save(tensors | kept, rows, {}, time.monotonic() - start)
        dense += sum(p.numel() for p in block.parameters() if p.ndim >= 2)
        advance(block, name, states, calls[index])
        streamed.free(index)
    weights = sum(row["shape"][0] * row["shape"][1] for row in assembly.rows)
    share = weights / (weights + dense)
    rest = streamed.stored(None)
    assembly.save_rest(rest, rest_rows(streamed.directory, rest))
    assembly.finish(streamed.config, about(streamed, adapter), streamed.directory, share)


def rest_rows(model_dir: Path, tensors: dict[str, Tensor]) -> list[dict]:
    """A row for each packed layer that is in no block, of the tensors there."""
    rows = []
    for name, spec in rewrite.packed(model_dir).items():
        if not anatomy.in_block(name):
            packed = formats.build({held: tensors[f"{name}.{held}"] for held in spec["tensors"]}, spec)
            rows.append(packed_row(name, packed) | {"bits": spec["bits"]})
    return rows


def fold_block(block: nn.Module, name: str, adapter: LoraFiles, states: list[Tensor], call: BlockCall) -> list[dict]:
    """Rounds the block's adapted layers again, in place; a row for every packed layer of it."""
    before = {n: m.packed for n, m in anatomy.linears(block).items() if isinstance(m, PackedLinear)}
    adapted = add(block, name, adapter)
    groups = anatomy.shared_inputs(block, lambda: call(block, states[0][:1]))
    groups = [kept for group in groups if (kept := [linear for linear in group if linear in adapted])]
    seen = collect(block, groups, GPTQ.needs, [partial(call, block, state) for state in states])
    rows = []
    for group, statistics in zip(groups, seen, strict=True):
        for linear in group:
            layer, w_NK = f"{name}.{linear}", block.get_submodule(linear).weight
            quantizer = quantizer_of(before.pop(linear).spec())
            packed = quantize_layer(layer, w_NK, quantizer, statistics)
            rows.append(layer_row(layer, packed, w_NK - packed.unpack(), w_NK, statistics.hessian_KK))
            replace(block, linear, packed)
    rows += [packed_row(f"{name}.{linear}", packed) for linear, packed in before.items()]
    return [row | {"bits": row["spec"]["bits"]} for row in rows]


def add(block: nn.Module, name: str, adapter: LoraFiles) -> list[str]:
    """Puts dense linears of Wq + BA in the place of the packed layers that are adapted; their names in the block."""
    adapted = []
    for linear, module in anatomy.linears(block).items():
        delta_NK = adapter.delta(f"{name}.{linear}") if isinstance(module, PackedLinear) else None
        if delta_NK is not None and bool(delta_NK.any()):
            dense = module.to_dense(torch.float32)
            dense.weight += delta_NK
            block.set_submodule(linear, dense)
            adapted.append(linear)
    return adapted


def quantizer_of(spec: dict) -> GPTQ:
    """GPTQ onto a grid like a layer's own."""
    kind = rewrite.zero_kind(spec)
    return GPTQ(
        bits=spec["bits"],
        group_size=spec["group_size"],
        symmetric=kind == "none",
        zero_point="float" if kind == "float" else "int",
        scale_bits=8 if spec["tensors"]["scale"][0] == "uint8" else 16,
    )


def about(streamed: StreamedModel, adapter: LoraFiles) -> dict:
    """What config and manifest say of how the model was made."""
    config = packed_config(streamed.directory)
    base = {key: value for key, value in config.get("meta", {}).items() if key.startswith("base_")}
    settings = config.get("settings", {})
    return {"method": "gptq", "settings": settings, **base, "folded_adapter": str(adapter.directory)}
