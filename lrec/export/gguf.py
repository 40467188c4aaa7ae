"""A GGUF file for llama.cpp: packed integers in the smallest block that holds them, the rest in float16 or q8_0.

2-bit symmetric groups of 64 become Q2_0, the only 2-bit block ggml has for them; all else of 2 and 3 bits and 4-bit
symmetric becomes Q4_0, bit for bit. Streamed: one block of the model is in memory at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

import lrec
from lrec import formats, rewrite
from lrec.export import Export
from lrec.ggml import blocks, model, tokenizer
from lrec.options import setting
from lrec.progress import Progress
from lrec.report import packed_config
from lrec.stream import StreamedModel


@dataclass(frozen=True, kw_only=True)
class Gguf(Export):
    """`model.gguf`, with the tokenizer, for the architectures of `lrec.ggml.model`."""

    readers: ClassVar[tuple[str, ...]] = ("llama_cpp",)
    tolerance: ClassVar[float] = 5e-2  # llama.cpp rounds activations to eight bits

    dense: Literal["f16", "q8_0"] = setting("f16", "embeddings and other matrices that are not packed: f16 or q8_0")
    asymmetric: Literal["q4_1", "q5_0"] = setting(
        "q4_1", "4-bit layers with zero points: q4_1 (5 bits, minimum rounded to float16) or q5_0 (5.5 bits, exact)"
    )

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError for an adapter, and for layers, a tokenizer or an architecture that
        GGUF cannot hold."""
        rewrite.without_adapter(adapter_dir, "gguf (--format gguf-lora writes the adapter beside it)")
        rewrite.without_experts(model_dir, "gguf")
        specs = rewrite.refuse(model_dir, "gguf", self.misfit, "Nearest that can: --format merged")
        streamed = StreamedModel(model_dir, torch.float32)
        names = model.Names(type(streamed.model).__name__, streamed.config)
        types = {name: blocks.container(spec, self.asymmetric) for name, spec in specs.items()}
        writer = start(output_dir / "model.gguf", names, model_dir)
        model.describe(writer, streamed.config)
        tokenizer.describe(writer, model_dir, streamed.config.vocab_size)
        counts = Counter(types.values())
        writer.add_file_type(blocks.BLOCKS[counts.most_common(1)[0][0]].file_type)
        writer.add_quantization_version(2)
        # The Prism fork's type 42 has blocks of 128.
        writer.add_uint32("lrec.q2_0.block_size", blocks.BLOCKS["q2_0"].size)
        parts = [*range(len(streamed)), None]

        def tensors() -> Iterator[tuple]:
            for part in Progress(parts, "write", "block"):
                yield from self._tensors(streamed, part, names, types)

        write_tensors(writer, tensors)
        return {"containers": dict(counts)}

    def logits(self, output_dir: Path, model_dir: Path, ids: Tensor) -> Tensor:
        """See `Export.logits`."""
        return llama_cpp_logits(ids, output_dir / "model.gguf")

    def misfit(self, spec: dict) -> str | None:
        """Why GGUF cannot hold a layer of this spec, or None."""
        why = rewrite.misfit(spec | {"group_size": 1} if spec["format"] == "uniform" else spec)
        if why or blocks.container(spec, self.asymmetric):
            return why
        return (
            f"no block of ggml holds {spec['bits']} bits with zero points in groups of {spec['group_size']} of "
            f"{spec['shape'][1]} columns (whole blocks of 32 columns and, for 8 bits, --symmetric are needed)"
        )

    def _tensors(
        self, streamed: StreamedModel, part: int | None, names: model.Names, types: dict
    ) -> Iterator[tuple[str, np.ndarray, tuple, int | None]]:
        """(name, data, shape, ggml type or None if the array's own) of one part of the model."""
        tensors = streamed.stored(part)
        for name, spec in rewrite.packed(streamed.directory).items():
            if f"{name}.qweight" not in tensors:
                continue
            packed = formats.build({held: tensors.pop(f"{name}.{held}") for held in spec["tensors"]}, spec)
            if name not in types:
                tensors |= {f"{name}.{key}": t for key, t in rewrite.decoded(packed, streamed).items()}
                continue
            order = names.row_order(f"{name}.weight")
            rows = blocks.encode(packed, types[name])
            kind = blocks.BLOCKS[types[name]].id
            yield names.name(f"{name}.weight"), rows if order is None else rows[order.numpy()], packed.shape, kind
        for name, tensor in tensors.items():
            order = names.row_order(name)
            yield names.name(name), *self._dense(tensor if order is None else tensor[order])
        factors = model.rope_factors(streamed.config)
        if part is None and factors is not None:
            yield "rope_freqs.weight", factors.numpy(), tuple(factors.shape), None

    def _dense(self, tensor: Tensor) -> tuple[np.ndarray, tuple, int | None]:
        if tensor.ndim == 1:
            return tensor.float().numpy(), tuple(tensor.shape), None
        if self.dense == "q8_0" and tensor.shape[1] % 32 == 0:
            return blocks.encode_q8_0(tensor), tuple(tensor.shape), blocks.BLOCKS["q8_0"].id
        return tensor.half().numpy(), tuple(tensor.shape), None


def start(path: Path, names: model.Names, model_dir: Path):
    """A GGUFWriter for a model's file that tells what it was made from."""
    import gguf

    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_name(model_dir.name)
    writer.add_string("lrec.version", lrec.__version__)
    if stamp := packed_config(model_dir).get("meta", {}).get("packed_sha256"):
        writer.add_string("lrec.packed_sha256", stamp)
    return writer


def write_tensors(writer, tensors: Callable[[], Iterable[tuple[str, np.ndarray, tuple, int | None]]]) -> None:
    """Writes the file: settings, then (name, data, shape, ggml type or None if the array's own) of each tensor.

    `tensors` is called twice, since a file names all tensors before the first's data; none of them is kept.
    """
    for name, array, shape, kind in tensors():
        # Given as int8, so that the writer takes the shape in weights, as it is, and asks nothing of the type: the
        # gguf package has no name for that of Q2_0.
        dtype = np.dtype(np.int8) if kind is not None else array.dtype
        writer.add_tensor_info(name, shape, dtype, array.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, array, _, _ in tensors():
        writer.write_tensor_data(array)
    writer.close()


def llama_cpp_logits(ids: Tensor, model: Path, lora: Path | None = None) -> Tensor:
    """Logits (1, L, V) of llama.cpp for `ids` (1, L), by a model's file and, on top, a LoRA's."""
    reader = llama_cpp_reader(model, lora, ids.shape[1])
    reader.eval(ids[0].tolist())
    return torch.from_numpy(reader.scores[: ids.shape[1]].copy())[None]


def llama_cpp_reader(model: Path, lora: Path | None, num_tokens: int):
    """A `llama_cpp.Llama` that keeps all logits and multiplies by weights as they are in the file.

    Left to itself it repacks them for AMX, whose instructions some virtual machines announce and then forbid, and
    rounds cached keys and values to float16.
    """
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def as_in_the_file():
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = as_in_the_file
    try:
        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        lora_path = lora and str(lora)
        return Llama(str(model), lora_path=lora_path, n_ctx=num_tokens, logits_all=True, verbose=False, **cache)
    finally:
        llama_cpp.llama_model_default_params = defaults
