"""GGUF files of llama.cpp: layers of Q2_0, Q4_0, Q4_1 and Q8_0 are taken over, all others of the file are decoded.

Config and tokenizer come from the files beside, if there are any, else from the file itself by transformers.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint, documents, foreign
from lrec.formats import Packed
from lrec.ggml import blocks
from lrec.ggml.model import Names
from lrec.imports import Import, exact_scale

KINDS = {blocks.BLOCKS[name].id: name for name in ("q2_0", "q4_0", "q4_1", "q8_0")}


class Gguf(Import):
    """Uniform integers of 2, 4 and 8 bits without zero points; Q4_1, with its minimum, as four binary planes."""

    mark = "blocks"

    @classmethod
    def read(cls, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: dict) -> Packed:
        """See `Import.read`."""
        return blocks.decode(tensors["blocks"].numpy(), KINDS[int(tensors["kind"])])

    @classmethod
    def config(cls, model_dir: Path):
        """See `Import.config`."""
        blocks.teach_q2_0()
        whole(only_file(model_dir))
        if (model_dir / "config.json").exists():
            return foreign.config(model_dir)
        return foreign.config(model_dir, gguf_file=only_file(model_dir).name)

    @classmethod
    def identity(cls, model_dir: Path) -> str:
        """See `Import.identity`."""
        return checkpoint.file_hash(only_file(model_dir))

    @classmethod
    def parts(cls, model_dir: Path, model: nn.Module, found: anatomy.Blocks) -> Callable[[int | None], dict]:
        """See `Import.parts`."""
        blocks.teach_q2_0()
        names = Names(type(model).__name__, model.config)
        held = {tensor.name: tensor for tensor in whole(only_file(model_dir)).tensors}
        linears = {f"{found.name(i)}.{n}" for i, block in enumerate(found.modules) for n in anatomy.linears(block)}

        def read(part: int | None) -> dict[str, Tensor]:
            prefix = None if part is None else f"{found.name(part)}."
            tensors = {}
            for key, expected in model.state_dict().items():
                inside = key.startswith(prefix) if prefix else not key.startswith(f"{found.path}.")
                if inside and names.name(key) in held:
                    check_shape(held[names.name(key)], expected.shape)
                    layer = key.removesuffix(".weight")
                    own = take(held[names.name(key)], names.row_order(key), layer in linears)
                    tensors |= {f"{layer}.{field}" if field else key: tensor for field, tensor in own.items()}
            return tensors

        return read

    @classmethod
    def finish(cls, model_dir: Path, output_dir: Path) -> None:
        """Writes the tokenizer in the file, if there is none beside it."""
        if not (model_dir / "tokenizer.json").exists():
            from transformers import AutoTokenizer

            with foreign.reading(model_dir, "a GGUF file with a tokenizer that transformers can read"):
                tokenizer = AutoTokenizer.from_pretrained(model_dir, gguf_file=only_file(model_dir).name)
            tokenizer.save_pretrained(output_dir)


def whole(path: Path):
    """The gguf package's reader of a file. Raises ValueError if the file is cut short or is no GGUF file."""
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch or make it again") from error


def check_shape(tensor, expected: torch.Size) -> None:
    """Raises ValueError for a tensor of the file, whose sizes stand there from the last to the first, of another shape
    than the model's."""
    shape = [int(size) for size in tensor.shape[::-1]]
    if shape != [*expected]:
        raise ValueError(f"{tensor.name} has shape {shape}, but the model's is {[*expected]}; fetch or make it again")


def take(tensor, order: Tensor | None, is_linear: bool) -> dict[str, Tensor]:
    """A tensor of the file, rows in our order: as `blocks` and their `kind` where those are taken over, else dense
    under no name."""
    import gguf

    kind = int(tensor.tensor_type)
    data = tensor.data if order is None else tensor.data[order.argsort().numpy()]
    if is_linear and kind in KINDS:
        return {"blocks": torch.from_numpy(np.array(data)), "kind": torch.tensor(kind)}
    dense = torch.from_numpy(np.array(gguf.quants.dequantize(data, tensor.tensor_type)))
    return {"": exact_scale(dense) if dense.ndim > 1 else dense}


def only_file(model_dir: Path) -> Path:
    """The GGUF file of a directory. Raises ValueError if there are several, or if it is no file of that directory."""
    files = sorted(model_dir.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{model_dir} has {', '.join(f.name for f in files)}; put the one to import in its own folder")
    return documents.own_file(files[0])
