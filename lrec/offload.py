"""Packed weights that stay on disk and visit the device one block at a time, forward and backward.

Every packed layer asks for its tensors just before it uses them (`PackedLinear.visit`). That brings in its whole block
from the safetensors files, lets the block before go, and starts to fetch the one that comes next, so that two blocks
at most are there. Backward needs no code: with checkpointing a block is run again in backward, which asks again, and
autograd holds the tensors until it has used them. On a CPU the tensors are mapped pages of the files; a GPU gets copies
through pinned memory on a stream of their own. What the page cache holds is read from there: memory that is to spare
speeds this up, and none is needed.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint, text
from lrec.load import device_of, dtype_of
from lrec.nn import PackedLinear
from lrec.stream import StreamedModel

Tensors = dict[str, dict[str, Tensor]]  # layer's name -> its packed tensors by field


class Offload:
    """The packed layers of a model, block by block, whose tensors lie in files.

    layers: for each block its packed layers by name; files: where each tensor `layer.field` is. Raises ValueError,
    when a block is fetched, for a tensor that is missing or is not as its layer's spec has it.
    """

    def __init__(self, layers: list[dict[str, PackedLinear]], files: dict[str, Path], device: torch.device):
        self.layers, self.files, self.device = layers, files, device
        self.current: int | None = None
        self.backwards = False
        self.coming: tuple[int, Future] | None = None
        self.worker = ThreadPoolExecutor(1, "lrec-offload")
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for index in range(len(layers)):
            self.release(index)
            for layer in layers[index].values():
                layer.visit = partial(self.visit, index)

    def visit(self, index: int) -> None:
        """Makes a block's tensors its layers' buffers, and starts to fetch the block that will be visited next."""
        if index == self.current:
            return
        if self.current is not None:
            self.release(self.current)
        tensors = self._take(index)
        for name, layer in self.layers[index].items():
            if self.side is not None:
                for tensor in tensors[name].values():
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            layer.hold(tensors[name])
        previous, self.current = self.current, index
        if previous is not None and abs(index - previous) == 1:
            self.backwards = index < previous
        if index == (0 if self.backwards else len(self.layers) - 1):
            self.backwards = not self.backwards  # the next pass starts at this end, with this block
        following = index - 1 if self.backwards else index + 1
        if 0 <= following < len(self.layers):
            self.coming = following, self.worker.submit(self.fetch, following)

    def release(self, index: int) -> None:
        """Lets go of a block's tensors; empty ones on the same device stand in their place."""
        for layer in self.layers[index].values():
            kinds = layer.spec["tensors"].items()
            layer.hold({f: torch.empty(0, dtype=getattr(torch, dtype), device=self.device) for f, (dtype, _) in kinds})

    def fetch(self, index: int) -> Tensors:
        """A block's packed tensors, read from their files to the device."""
        names = {(name, field) for name, layer in self.layers[index].items() for field in layer.spec["tensors"]}
        found: Tensors = {name: {} for name in self.layers[index]}
        with ExitStack() as stack:
            paths = {self._file(f"{name}.{field}") for name, field in names}
            files = {path: stack.enter_context(checkpoint.open_tensors(path)) for path in paths}
            for name, layer in self.layers[index].items():
                for field, kind in layer.spec["tensors"].items():
                    key = f"{name}.{field}"
                    tensor = files[self._file(key)].get_tensor(key)
                    if [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] != list(kind):
                        raise ValueError(
                            f"{key} is {tensor.dtype} {list(tensor.shape)} in {self._file(key)}, but the layer has "
                            f"{kind}; the files belong to another model"
                        )
                    found[name][field] = self._arrived(tensor)
        return found

    def _arrived(self, tensor: Tensor) -> Tensor:
        if self.side is None:
            # One read of each page: the disk is waited for here, in the fetching thread.
            tensor.flatten().view(torch.uint8)[::4096].sum()
            return tensor
        with torch.cuda.stream(self.side):
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
        self.side.synchronize()
        return moved

    def _take(self, index: int) -> Tensors:
        if self.coming is None:
            return self.fetch(index)
        (expected, future), self.coming = self.coming, None
        fetched = future.result()
        if expected == index:
            return fetched
        del fetched, future  # a pass of another order, evaluation after training say: that block goes before this comes
        return self.fetch(index)

    def _file(self, key: str) -> Path:
        if key not in self.files:
            raise ValueError(f"no file of the packed model has {key}; the copy is incomplete, fetch or make it again")
        return self.files[key]


def attach(model: nn.Module, files: dict[str, Path], device: torch.device) -> Offload:
    """Takes the packed tensors out of a model's blocks; from then on they come from `files` (tensor name -> file).

    Raises ValueError if the model's blocks hold no packed layer.
    """
    blocks = anatomy.find_blocks(model)
    layers = [dict(_packed(block, blocks.name(i))) for i, block in enumerate(blocks.modules)]
    if not all(layers):
        raise ValueError("stream_weights is for packed models; make one with `lrec quantize`")
    return Offload(layers, files, device)


def load(directory: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A packed model from a local directory whose packed weights stay there and visit the device block by block.

    Everything else (embeddings, norms, biases, head) is in memory. Raises ValueError as `StreamedModel` and `attach`.
    """
    streamed = StreamedModel(directory, dtype, device)
    packed = {f"{n}.{field}" for b, i in _each(streamed) for n, m in _packed(b, i) for field in m.spec["tensors"]}
    files = {}
    for index, entries in streamed.keys.items():
        files |= {name: path for name, _, path in entries}
        if index is not None:
            streamed.keys[index] = [entry for entry in entries if entry[0] not in packed]
    offload = attach(streamed.model, files, device)
    for index in range(len(streamed)):
        streamed.load(index)
    streamed.model.lrec_offload = offload
    return streamed.model


def load_for_training(model: str, device: str, dtype: str, gradient_checkpointing: bool) -> nn.Module:
    """`load` by the names that the command line has. Raises ValueError without checkpointing: backward would then
    hold the weights of all blocks."""
    if not gradient_checkpointing:
        raise ValueError("stream_weights needs --gradient_checkpointing true: else backward holds every block")
    place = device_of(device)
    return load(text.model_path(model), place, dtype_of(dtype, place))


def _each(streamed: StreamedModel) -> Iterator[tuple[nn.Module, str]]:
    return ((block, streamed.anatomy.name(i)) for i, block in enumerate(streamed.blocks))


def _packed(block: nn.Module, prefix: str) -> Iterator[tuple[str, PackedLinear]]:
    return ((f"{prefix}.{name}", m) for name, m in block.named_modules() if isinstance(m, PackedLinear))
