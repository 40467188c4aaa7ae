"""A packed model directory written anew as another tool reads it, one block in memory and one shard a block.

`kinds` tells a model's layers from its config alone, so that a target can refuse before anything is written; `rewrite`
replaces the tensors of each packed layer by those that the target has for it, and leaves all others as stored.
"""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint, experts, formats
from lrec.formats import Packed
from lrec.progress import Progress
from lrec.report import packed_config
from lrec.stream import StreamedModel

Convert = Callable[[str, Packed], dict[str, Tensor]]


def kinds(model_dir: Path) -> dict[str, dict]:
    """The spec of each packed layer of the blocks by its full name. Raises ValueError if lrec has not packed them."""
    return {name: spec for name, spec in packed(model_dir).items() if anatomy.in_block(name)}


def packed(model_dir: Path) -> dict[str, dict]:
    """The same with packed embeddings and head, if there are any."""
    return {name: entry["spec"] for entry in packed_config(model_dir)["layers"] for name in entry["modules"]}


def refuse(
    model_dir: Path,
    target: str,
    reason: Callable[[dict], str | None],
    instead: str,
    layers: Collection[str] | None = None,
) -> dict[str, dict]:
    """The kinds of a model whose every layer, or of which `layers`, the target can hold, `reason(spec)` being why it
    cannot, or None.

    Raises ValueError naming the first layer for each distinct reason and how many have it; `instead` says what to do.
    """
    specs, found = kinds(model_dir), {}
    for name, spec in specs.items():
        if layers is not None and name not in layers:
            continue
        if why := reason(spec):
            found.setdefault(why, []).append(name)
    if found:
        told = "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}" for why, names in found.items()
        )
        raise ValueError(f"{target} cannot hold {model_dir}: {told}. {instead}")
    return specs


def without_adapter(adapter_dir: Path | None, target: str) -> None:
    """Raises ValueError if there is an adapter: added to integers it would have to be rounded."""
    if adapter_dir is not None:
        raise ValueError(
            f"{target} holds the packed base alone: {adapter_dir} cannot be added to integer weights without rounding "
            "them again. Fold it in first with --format packed and export what that writes, or use --format merged"
        )


def without_experts(model_dir: Path, target: str) -> None:
    """Raises ValueError if experts are packed: they are layers of their own here, and one tensor to the readers."""
    if parts := [name for name in kinds(model_dir) if experts.is_part(name)]:
        raise ValueError(
            f"{target} cannot hold {model_dir}: {parts[0]} and {len(parts) - 1} more are single experts' matrices, and "
            "its readers take fused experts only in layouts of their own, which lrec does not write. Nearest that can: "
            "--format merged"
        )


def zero_kind(spec: dict) -> str:
    """How a uniform layer stores zero points: none (symmetric), int or float."""
    kind = spec["tensors"].get("zero")
    return "none" if kind is None else "int" if kind[0] == "int32" else "float"


def misfit(spec: dict) -> str | None:
    """What any target of plain integers with a half-precision scale and an integer zero refuses in a layer's spec."""
    if spec["format"] != "uniform":
        return f"the format is {spec['format']}, not uniform integers"
    if zero_kind(spec) == "float":
        return "zero points are floats, and the target's are integers (quantize with --zero_point int)"
    # Scales of 8 bits are float16 numbers.
    if spec["tensors"]["scale"][0] not in ("float16", "uint8"):
        return f"scales are {spec['tensors']['scale'][0]}, and the target's are float16"
    K = spec["shape"][1]
    if K % spec["group_size"]:
        return f"{K} columns are no multiple of the group, {spec['group_size']}, and the target has no short last group"
    return None


def unpacked(streamed: StreamedModel, specs: dict[str, dict]) -> list[str]:
    """The linears that are not packed: some inside the blocks, and what reads images. The output head is apart."""
    head = streamed.model.get_output_embeddings()
    linears = {name: module for name, module in streamed.model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, module in linears.items() if name not in specs and module is not head]


def rewrite(streamed: StreamedModel, output_dir: Path, convert: Convert, dtype: torch.dtype | None = None) -> None:
    """Writes shards and index: of each packed layer, `convert(name, packed)` by the names that follow the layer's.

    Packed embeddings and head, which other tools do not know, are decoded in the model's own dtype. All other tensors
    are as stored; with a `dtype` all floats are in that.
    """
    specs, shards = packed(streamed.directory), []
    streamed.free(None)  # all is read as stored
    for part in Progress([*range(len(streamed)), None], "write", "block"):
        tensors = streamed.stored(part)
        for name, spec in specs.items():
            if f"{name}.qweight" in tensors:
                weight = formats.build({held: tensors.pop(f"{name}.{held}") for held in spec["tensors"]}, spec)
                own = convert(name, weight) if anatomy.in_block(name) else decoded(weight, streamed)
                tensors |= {f"{name}.{key}": cast(tensor, dtype) for key, tensor in own.items()}
        tensors = experts.fuse_tensors(streamed.model, {name: cast(t, dtype) for name, t in tensors.items()})
        path = output_dir / f"model-{len(shards) + 1:05}-of-{len(streamed) + 1:05}.safetensors"
        checkpoint.write_tensors(path, tensors)
        shards.append(path)
    checkpoint.write_index(output_dir, shards)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in this dtype if it holds floats and a dtype is given, else as it is."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def decoded(weight: Packed, streamed: StreamedModel) -> dict[str, Tensor]:
    """A dense weight in the model's own dtype."""
    return {"weight": weight.unpack().to(own_dtype(streamed))}


def own_dtype(streamed: StreamedModel) -> torch.dtype:
    """That of the vectors stored outside the blocks (a final norm): the config may tell that of the computation."""
    vectors = (t.dtype for t in streamed.stored(None).values() if t.is_floating_point() and t.ndim == 1)
    return next(vectors, streamed.dtype)


def finish(
    streamed: StreamedModel, output_dir: Path, quantization: dict | None, dtype: torch.dtype | None = None
) -> None:
    """Writes config and tokenizer; `quantization` is the config's quantization_config, None for a dense model."""
    config = streamed.config
    del config.quantization_config
    if quantization is not None:
        config.quantization_config = quantization
    config.dtype = dtype or own_dtype(streamed)
    config.save_pretrained(output_dir)
    for path in checkpoint.tokenizer_files(streamed.directory):
        shutil.copyfile(path, output_dir / path.name)
