"""A model whose blocks visit memory one at a time.

The skeleton is built without weights; embeddings, norms and head are loaded once, and a block's weights are read from
the safetensors files (mmap) when `load` is called and let go by `free`. Loading goes through transformers' own
loader, one block's keys at a time, so that renamed or fused checkpoint keys come out as they would in
`from_pretrained`. Works for dense and for packed checkpoints.
"""

import ctypes
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint, experts, foreign

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

MMAP_BYTES = 2**16  # tensors as large as this are given back when freed, after `lean_malloc`
_mmap_bytes = 2**20  # the same without it


@dataclass(frozen=True)
class BlockCall:
    """The arguments a block is called with besides the hidden states: masks, rotary embeddings, position ids."""

    args: tuple
    kwargs: dict

    def __call__(self, block: nn.Module, hidden_BLH: Tensor) -> Tensor:
        """The block's output hidden states (B, L, H)."""
        out = block(hidden_BLH, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class StreamedModel:
    """A causal LM, or the text side of a model that sees too, from a local directory, with only its embeddings, norms
    and head in memory (and what reads images).

    `blocks` are the decoder blocks, empty (on the meta device) unless loaded; `dtype` is that of computation.
    Raises ValueError for a directory that is no causal LM or has no safetensors, or a model without decoder blocks.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: str | torch.device = "cpu"):
        self.directory, self.dtype, self.device = Path(directory), dtype, torch.device(device)
        checkpoint.verify(self.directory)
        files = checkpoint.weight_files(self.directory)
        self.config = foreign.config(self.directory)
        self.model = foreign.skeleton(self.config, self.directory, dtype).eval()
        with foreign.reading(self.directory, "a packed model"):
            self._prepare_packed()
        self.anatomy = anatomy.find_blocks(self.model)
        self.blocks = self.anatomy.modules
        self.keys = self._keys_by_part(files)
        experts.unfuse(self.model)
        with foreign.reading(self.directory, f"a checkpoint of {type(self.model).__name__}"):
            self._load_keys(self.keys[None])
            self.model.tie_weights()
        self._settle_rest()

    def __len__(self) -> int:
        return len(self.blocks)

    def load(self, index: int) -> nn.Module:
        """The block with its weights in memory, on the model's device."""
        experts.fuse(self.blocks[index])  # as the loader knows them
        with foreign.reading(self.directory, f"a checkpoint of {type(self.model).__name__}"):
            self._load_keys(self.keys[index])
        experts.unfuse(self.blocks[index])
        missing = [name for name, tensor in self.blocks[index].state_dict().items() if tensor.is_meta]
        if missing:
            raise ValueError(f"{self.directory} has no weights for {self.anatomy.name(index)}: {', '.join(missing)}")
        return self.blocks[index]

    def free(self, index: int | None) -> None:
        """Lets go of a block's weights, or with None of all that is in no block; then nothing embeds any more."""
        if index is not None:
            empty(self.blocks[index])
        else:
            inside = {module for block in self.blocks for module in block.modules()}
            for module in self.model.modules():
                if module not in inside:
                    module._apply(lambda tensor: tensor.to("meta"), recurse=False)
        # Modules and their hooks form cycles, which would hold several blocks' tensors until Python thinks of them.
        gc.collect()
        trim()

    def stored(self, part: int | None) -> dict[str, Tensor]:
        """The checkpoint's own tensors of a block, or with None of all that is not a block, by model name."""
        with ExitStack() as stack:
            files = self._open(self.keys[part], stack)
            return {name: files[path].get_tensor(key) for name, key, path in self.keys[part]}

    def embed(self, input_ids_BL: Tensor) -> Tensor:
        """What enters the first block (B, L, H)."""
        return self._capture(input_ids_BL)[0]

    def block_calls(self, input_ids_BL: Tensor) -> list[BlockCall]:
        """The further arguments of every block for windows of this length, to be broadcast over any batch.

        Raises ValueError if they depend on the text, since then they cannot be shared by all windows.
        """
        _, calls = self._capture(input_ids_BL[:1])
        _, again = self._capture(input_ids_BL[:1].roll(1, -1))
        for index, (a, b) in enumerate(zip(calls, again, strict=True)):
            if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise ValueError(
                    f"{self.anatomy.name(index)} takes arguments that depend on the text; "
                    "such models are not supported yet"
                )
        return calls

    @torch.no_grad()
    def _capture(self, input_ids_BL: Tensor) -> tuple[Tensor, list[BlockCall]]:
        return record_calls(self.model, self.blocks, input_ids_BL.to(self.device))

    def _prepare_packed(self) -> None:
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None:
            return
        from transformers.quantizers import AutoHfQuantizer

        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        if method != "lrec":
            raise ValueError(
                f"{self.directory} is already quantized by {method!r}; "
                "lrec streams full-precision and its own packed models"
            )
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
        quantizer.preprocess_model(self.model, dtype=self.dtype)
        self.model.hf_quantizer = quantizer  # as from_pretrained leaves it: trainers ask

    def _keys_by_part(self, files: list[Path]) -> dict[int | None, list[tuple[str, str, Path]]]:
        """(model name, checkpoint key, file) of every tensor, by block index, None for all that is in no block."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        parts = defaultdict(list)
        for path in files:
            with checkpoint.open_tensors(path) as file:
                keys = list(file.keys())
            for key in keys:
                name, _ = rename_source_key(key, renamings, converters, prefix, state)
                index = name.removeprefix(f"{self.anatomy.path}.").split(".")[0]
                part = int(index) if name.startswith(f"{self.anatomy.path}.") and index.isdigit() else None
                parts[part].append((name, key, path))
        parts.setdefault(None, [])
        return parts

    def _open(self, entries: list, stack: ExitStack) -> dict:
        paths = dict.fromkeys(path for _, _, path in entries)
        return {path: stack.enter_context(checkpoint.open_tensors(path)) for path in paths}

    def _load_keys(self, entries: list) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(dtype=self.dtype, device_map={"": self.device}, weight_mapping=self.mapping)
        # Files are opened for each load: pages of a mapping that stays open would count as memory in use.
        with ExitStack() as stack:
            files = self._open(entries, stack)
            slices = {key: files[path].get_slice(key) for _, key, path in entries}
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        if info.conversion_errors or info.error_msgs or info.mismatched_keys:
            faults = [*map(str, info.mismatched_keys), *info.error_msgs, *info.conversion_errors.values()]
            raise ValueError(f"{self.directory} does not fit {type(self.model).__name__}: {'; '.join(faults)[:500]}")

    def _settle_rest(self) -> None:
        held = self.model.state_dict().items()
        missing = [name for name, tensor in held if tensor.is_meta and not name.startswith(f"{self.anatomy.path}.")]
        if missing:
            raise ValueError(
                f"{self.directory} has no weights for {', '.join(missing[:5])}; the checkpoint is incomplete"
            )
        bad = [
            name
            for name, tensor in held
            if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor)
        ]
        if bad:
            raise ValueError(
                f"{self.directory}: {', '.join(bad[:5])} holds NaN or infinity; fetch or make the checkpoint again"
            )
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; looked at in slices, since a table of embeddings is large."""
    return all(bool(part.isfinite().all()) for part in tensor.split(1024)) if tensor.dim() else bool(tensor.isfinite())


@torch.no_grad()
def advance(block: nn.Module, name: str, states: list[Tensor], call: BlockCall, only: int | None = None) -> None:
    """Runs every batch of hidden states, or `only` one, through the block, in place of the old ones.

    Raises ValueError naming the block if its output is NaN or infinite.
    """
    for i in range(len(states)) if only is None else [only]:
        states[i] = call(block, states[i])
        if not states[i].isfinite().all():
            bad = int((~states[i].isfinite()).sum())
            raise ValueError(
                f"the output of {name} is not finite ({bad} of {states[i].numel()} values in batch {i}); "
                "check the checkpoint's weights, or compute in float32"
            )


def record_calls(model: nn.Module, blocks: list[nn.Module], input_ids_BL: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """What enters the first block (B, L, H), and the further arguments of every block, none of which is run.

    Raises ValueError if the model does not visit all of its blocks.
    """
    hidden, calls = [], []

    def recorder(hidden_states, *args, **kwargs):
        hidden.append(hidden_states)
        calls.append(BlockCall(args, kwargs))
        if len(calls) == len(blocks):
            raise Reached
        return hidden_states

    try:
        with instead(blocks, recorder):
            model(input_ids=input_ids_BL, use_cache=False)
    except Reached:
        return hidden[0], calls
    raise ValueError(f"{type(model).__name__} ran without visiting each of its {len(blocks)} blocks once in order")


@contextmanager
def instead(modules: list[nn.Module], forward: Callable) -> Iterator[None]:
    """Inside, calling any of these modules calls `forward`."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def empty(module: nn.Module) -> None:
    """Moves what a checkpoint would fill to the meta device; other buffers stay, since no loading brings them back."""
    for part in module.modules():
        kept = {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        part._apply(lambda tensor: tensor.to("meta"), recurse=False)
        part._buffers.update(kept)


def trim() -> None:
    """Hands freed memory back to the system where the C library can, now and from now on as soon as a tensor of 1 MB
    or more is freed (glibc otherwise keeps ever larger ones, up to 32 MB, and its heap full of holes)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, _mmap_bytes)
        libc.malloc_trim(0)


def lean_malloc() -> None:
    """From now on every tensor of 64 KB or more is handed back to the system when it is freed, where the C library can.

    glibc's heap cannot reuse most of what aligned tensors leave behind: a step on SmolLM2 with 1024 tokens holds 1.6 GB
    in it, and 0.36 GB so. The price is fresh pages for every such tensor.
    """
    global _mmap_bytes
    _mmap_bytes = MMAP_BYTES
    trim()


class Reached(BaseException):
    """Raised to leave a forward pass once what was wanted of it is known."""


def _same(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (type(a) is type(b) and a == b)
