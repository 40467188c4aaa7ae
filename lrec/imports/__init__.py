"""What others have quantized, taken over without quantizing again: one source a file, each an `Import`.

A source tells how the tensors of one layer are to be read; walking the blocks and writing the packed directory are the
same for all. The file's name is the checkpoint's `quant_method`.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint, documents, foreign, registry, text
from lrec.assembly import Assembly
from lrec.formats import Packed
from lrec.progress import Progress
from lrec.rows import packed_row


class Import:
    """One kind of checkpoint. A layer is packed if it has the tensor `mark`."""

    mark: ClassVar[str]

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """A layer from its tensors, by what follows its name; `config` is the checkpoint's quantization_config.

        Decodes to what the source library makes of it, bit for bit in float32. Raises ValueError for what no packed
        format of lrec holds.
        """
        raise NotImplementedError

    @classmethod
    def config(cls, model_dir: Path):
        """The model's configuration, without that of its quantization."""
        config = foreign.config(model_dir)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    @classmethod
    def identity(cls, model_dir: Path) -> str:
        """A hash of the checkpoint's weights."""
        return checkpoint.fingerprint(model_dir)

    @classmethod
    def parts(cls, model_dir: Path, model: nn.Module, blocks: anatomy.Blocks) -> Callable[[int | None], dict]:
        """A function that reads the tensors of a block, or with None those of none, by full name."""
        keys = keys_by_block(model_dir, blocks)
        return lambda part: {key: t for file, own in keys[part].items() for key, t in read_keys(file, own)}

    @classmethod
    def finish(cls, model_dir: Path, output_dir: Path) -> None:
        """What remains to be written beside weights, config and the tokenizer's files."""


Base = Import


def take_over(model_dir: Path, output_dir: Path) -> dict:
    """Writes a quantized checkpoint as a packed model of lrec, one block in memory at a time; the report.

    Raises ValueError naming the layer for whatever cannot be taken over, or if the checkpoint is not quantized.
    """
    method, told = method_of(model_dir)
    source = registry.find("imports", method.replace("-", "_"))
    config = source.config(model_dir)
    model = foreign.skeleton(config, model_dir)
    blocks = anatomy.find_blocks(model)
    assembly = Assembly(output_dir, source.identity(model_dir), len(blocks.modules))
    read = source.parts(model_dir, model, blocks)
    for index in Progress(range(assembly.num_done, len(blocks.modules)), "import", "block"):
        start, rows, tensors = time.monotonic(), [], read(index)
        for linear, module in anatomy.linears(blocks.modules[index]).items():
            name = f"{blocks.name(index)}.{linear}"
            if f"{name}.{source.mark}" in tensors:
                packed = read_layer(source, name, tensors, tuple(module.weight.shape), told)
                tensors |= {f"{name}.{key}": tensor for key, tensor in packed.tensors().items()}
                rows.append(packed_row(name, packed) | {"bits": packed.bits})
        assembly.save(tensors, rows, {}, time.monotonic() - start)
    weights = sum(row["shape"][0] * row["shape"][1] for row in assembly.rows)
    if not weights:
        raise ValueError(f"{model_dir} says {method}, but no layer of its blocks has a {source.mark}")
    rest = read(None)
    if packed := [key for key in rest if key.endswith(f".{source.mark}")]:
        raise ValueError(
            f"{', '.join(packed)}: lrec takes over layers inside the blocks only; use a checkpoint without"
        )
    assembly.save_rest(rest, [])
    about = {"method": method, "settings": {}, "base_model": str(model_dir), "imported_from": told}
    share = weights / sum(anatomy.linear_weights(block) for block in blocks.modules)
    report = assembly.finish(config, about, model_dir, {"quantized_share": share})
    source.finish(model_dir, output_dir)
    return {"source": method} | report


def folder_of(model: str) -> Path:
    """The folder of a checkpoint, fetched if it is a Hub id. Raises ValueError for pickled ones, which are not read."""
    folder = Path(model)
    if (folder / "qmodel.pt").exists():
        raise ValueError(
            f"{folder / 'qmodel.pt'} is a pickle, which lrec never reads: load it by hqq's from_quantized and write it "
            "anew by AutoHQQHFModel.save_to_safetensors"
        )
    return folder if any(folder.glob("*.gguf")) else text.model_path(model)


def method_of(model_dir: Path) -> tuple[str, dict]:
    """By what a checkpoint is quantized, and what its config says of that. Raises ValueError if it is not."""
    if any(model_dir.glob("*.gguf")):
        return "gguf", {}
    told = checkpoint.read_json(model_dir / "config.json", documents.Quantized).get("quantization_config")
    if told is None and holds(model_dir, ".W_q"):
        return "hqq", {}  # hqq's own files say nothing of it in their config
    if told is None or told.get("quant_method") == "lrec":
        raise ValueError(f"{model_dir} is {'packed by lrec already' if told else 'not quantized: use `lrec quantize`'}")
    return str(told.get("quant_method")), told


def holds(model_dir: Path, ending: str) -> bool:
    """Whether a checkpoint has a tensor whose name ends so."""
    for path in checkpoint.weight_files(model_dir):
        with checkpoint.open_tensors(path) as file:
            if any(key.endswith(ending) for key in file.keys()):  # noqa: SIM118  (safe_open is not a dict)
                return True
    return False


def read_layer(source: type[Import], name: str, tensors: dict, shape: tuple[int, int], config: dict) -> Packed:
    """Takes a layer's tensors, but its bias, out of `tensors` and reads them; errors begin with the layer's name."""
    own = [key for key in tensors if key.startswith(f"{name}.") and key != f"{name}.bias"]
    held = {key.removeprefix(f"{name}."): tensors.pop(key) for key in own}
    try:
        packed = source.read(name, held, shape, config)
        packed.check()
        packed.check_values()
    except KeyError as error:
        raise ValueError(f"{name}: the tensor or setting {error} is missing") from error
    # What tensors of odd shapes and dtypes come to; torch says RuntimeError, IndexError and TypeError.
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{name}: {error}") from error
    if packed.shape != shape:
        raise ValueError(f"{name}: holds a weight of shape {packed.shape}, but the model's is {shape}")
    return packed


def keys_by_block(model_dir: Path, blocks: anatomy.Blocks) -> dict[int | None, dict[Path, list[str]]]:
    """The checkpoint's keys by block, None for all outside, and in each by file."""
    parts = defaultdict(lambda: defaultdict(list))
    for path in checkpoint.weight_files(model_dir):
        with checkpoint.open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not a dict)
                index = key.removeprefix(f"{blocks.path}.").split(".")[0]
                inside = key.startswith(f"{blocks.path}.") and index.isdigit()
                parts[int(index) if inside else None][path].append(key)
    return parts


def read_keys(path: Path, keys: list[str]) -> list[tuple[str, Tensor]]:
    """(key, tensor) of some keys of a file."""
    with checkpoint.open_tensors(path) as file:
        return [(key, file.get_tensor(key)) for key in keys]


def exact_scale(scale: Tensor) -> Tensor:
    """A float scale as float16 if that holds it, else as float32."""
    return half if torch.equal((half := scale.half()).float(), scale.float()) else scale.float()


def unless_middle(zero_NG: Tensor, bits: int) -> Tensor | None:
    """None for zero points that are all in the middle, which the symmetric grid need not store."""
    return None if bool((zero_NG == 2 ** (bits - 1)).all()) else zero_NG
