"""Base plus adapter as a packed model again, block by block: what `export --format packed` does.

Where A is constant over each group of columns (QA-LoRA, 2309.14717) and zero points are floats, s B A is a matter of
those: w = scale * (q - zero) + d with one d a group is scale * (q - (zero - d / scale)), and codes and scales stay.
The weights are equal but for one rounding of a zero point to float32. Logits are not bit for bit those of base and
adapter: W x + s B (A x) adds the same products in another order than W' x, and neither order is nearer to the truth.
Scales and zeros that were trained take the place of those that were there. Any other sum lies between the points of the
grid and is rounded again, as in the pass that quantizes (lrec.blocks) but that the target of a layer is Wq + BA. Layers
without an adapter are carried over.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, formats, inputs, rewrite
from lrec.assembly import Assembly
from lrec.formats.uniform import Uniform
from lrec.lora_files import LoraFiles
from lrec.nn import PackedLinear, replace
from lrec.pass_settings import PassSettings
from lrec.progress import Progress
from lrec.quantizers import quantize_layer
from lrec.quantizers.gptq import GPTQ
from lrec.report import packed_config
from lrec.rows import layer_row, packed_row
from lrec.stream import BlockCall, StreamedModel, advance

BATCH = 2  # windows run through a block at once


def misfit(spec: dict) -> str | None:
    """Why a layer of this spec cannot be rounded again, or None."""
    return None if spec["format"] == "uniform" else f"the format is {spec['format']}; GPTQ rounds to uniform integers"


def to_round(adapter: LoraFiles, specs: dict[str, dict]) -> list[str]:
    """The packed layers, of these specs by name, that cannot hold their adapter exactly."""
    pairs = {layer: adapter.pair(layer) for layer in specs}
    return [layer for layer, pair in pairs.items() if changes(pair) and pooled(pair, specs[layer]) is None]


def changes(pair: tuple[Tensor, Tensor] | None) -> bool:
    """Whether an adapter adds anything."""
    return pair is not None and all(bool(half.any()) for half in pair)


def pooled(pair: tuple[Tensor, Tensor], spec: dict) -> Tensor | None:
    """A (R, G), one column a group, of an adapter that zero points of such a layer can hold; None of any other."""
    if spec["format"] != "uniform" or rewrite.zero_kind(spec) != "float":
        return None
    a_RK, group_size = pair[0], spec["group_size"]
    a_RG = a_RK[:, ::group_size]
    return a_RG if torch.equal(a_RG.repeat_interleave(group_size, 1)[:, : a_RK.shape[1]], a_RK) else None


def into_zeros(layer: str, packed: Uniform, adapter: LoraFiles) -> Uniform:
    """The weight with its adapter, which must be `pooled`, in its zero points, in float32. Raises ValueError for scales
    of zero, under which there is no room for anything."""
    a_RK, b_NR = adapter.pair(layer)
    scale_NG = packed.scales().double()
    if not scale_NG.all():
        raise ValueError(
            f"{layer} has groups whose scale is 0, so zero points hold no adapter there; quantize it again"
        )
    delta_NG = adapter.scaling * (b_NR.double() @ a_RK[:, :: packed.group_size].double())
    return dataclasses.replace(packed, zero=(packed.zeros().double() - delta_NG / scale_NG).float())


@torch.no_grad()
def fold(streamed: StreamedModel, adapter: LoraFiles, ids: Tensor | None, output_dir: Path, about: dict) -> None:
    """Writes the packed model with every adapter and all trained scales and zeros in its layer, one block in memory at
    a time.

    ids: the calibration windows (B, L) to round by; None if no layer has to be rounded (`to_round`). `about` is what
    config and manifest say of how the model was made.
    """
    assembly, dense, specs = Assembly(output_dir, "fold", len(streamed)), 0, rewrite.kinds(streamed.directory)
    states, calls = [], [None] * len(streamed)
    if ids is not None:
        states = [streamed.embed(batch) for batch in ids.split(BATCH)]
        calls = streamed.block_calls(ids[:BATCH])
    streamed.free(None)
    for index in Progress(range(len(streamed)), "fold", "block"):
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
    rows = fold_rest(streamed.directory, rest, adapter)
    assembly.save_rest(rest, rows)
    assembly.finish(streamed.config, about, streamed.directory, {"quantized_share": share})


def fold_rest(model_dir: Path, tensors: dict[str, Tensor], adapter: LoraFiles) -> list[dict]:
    """Puts trained scales and zeros into the packed layers that are in no block, among `tensors`; a row for each."""
    rows = []
    for name, spec in rewrite.packed(model_dir).items():
        if not anatomy.in_block(name):
            stored = formats.build({held: tensors.pop(f"{name}.{held}") for held in spec["tensors"]}, spec)
            packed = adapter.packed(name, stored)
            tensors |= {f"{name}.{held}": tensor for held, tensor in packed.tensors().items()}
            rows.append(packed_row(name, packed) | {"bits": spec["bits"]})
    return rows


def fold_block(block: nn.Module, name: str, adapter: LoraFiles, states: list[Tensor], call: BlockCall) -> list[dict]:
    """Puts the adapters into the block's layers, in place, rounded again where they must be; a row for every packed
    layer of it."""
    adapted = add(block, name, adapter)
    before = {n: m.packed for n, m in anatomy.linears(block).items() if isinstance(m, PackedLinear)}
    groups, seen, rows = [], [], []
    if adapted:
        groups = inputs.groups(block, name, lambda: call(block, states[0][:1]))
        groups = [kept for group in groups if (kept := [linear for linear in group if linear in adapted])]
        runs = [partial(call, block, state) for state in states]
        with inputs.attending(block, runs, PassSettings.min_expert_tokens):
            seen = inputs.collect(block, groups, GPTQ.needs, runs)
    for group, statistics in zip(groups, seen, strict=True):
        for linear in group:
            layer, w_NK = f"{name}.{linear}", block.get_submodule(linear).weight
            packed = quantize_layer(layer, w_NK, quantizer_of(adapted[linear]), statistics)
            rows.append(layer_row(layer, packed, w_NK - packed.unpack(), w_NK, statistics.hessian_KK))
            replace(block, linear, packed)
    rows += [packed_row(f"{name}.{linear}", packed) for linear, packed in before.items()]
    return [row | {"bits": row["spec"]["bits"]} for row in rows]


def add(block: nn.Module, name: str, adapter: LoraFiles) -> dict[str, dict]:
    """Adds what was trained to the block's packed layers: scales and zeros in the place of theirs; adapters into zero
    points where these hold them, else as dense linears of Wq + BA. The specs that the dense ones had, by name in the
    block."""
    adapted = {}
    for linear, module in anatomy.linears(block).items():
        layer = f"{name}.{linear}"
        if not isinstance(module, PackedLinear):
            continue
        packed, pair = adapter.packed(layer, module.packed), adapter.pair(layer)
        if packed is not module.packed:
            module.become(packed)
        if not changes(pair):
            continue
        if pooled(pair, module.spec) is not None:
            module.become(into_zeros(layer, packed, adapter))
            continue
        dense = module.to_dense(torch.float32)
        dense.weight += adapter.delta(layer)
        block.set_submodule(linear, dense)
        adapted[linear] = module.spec
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


def about(model_dir: Path, adapter_dir: Path, rounded: bool) -> dict:
    """What config and manifest say of a model that was made of this one and an adapter."""
    config = packed_config(model_dir)
    base = {key: value for key, value in config.get("meta", {}).items() if key.startswith("base_")}
    method = "gptq" if rounded else config.get("method")
    return {"method": method, "settings": config.get("settings", {}), **base, "folded_adapter": str(adapter_dir)}
