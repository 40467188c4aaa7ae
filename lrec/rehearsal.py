"""A training step of each block run on fake tensors: which bytes are live, without one of them being allocated.

What a block keeps for its backward and what it needs while it runs follow from its code, from peft's, from that of
checkpointing and from torch's autograd. So the block itself is asked: torch's fake tensors run it in milliseconds, on
any machine, and every storage made is counted from its birth to its death. A new setting that changes what is kept
changes the figure by itself.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from lrec import anatomy
from lrec.stream import BlockCall, record_calls


@dataclass(frozen=True)
class Kept:
    """Bytes of one block: `kept` from its forward to its backward, its output included, `forward` and `backward` at
    the most beyond that while it runs forward, or backward (recomputed first if it is checkpointed)."""

    kept: int
    forward: int
    backward: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside: `live` now, `peak` at the most since it was last set."""

    def __init__(self, before: list[Tensor]):
        """`before` existed already: views of them make no storage."""
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


def rehearse(model: nn.Module, batch_size: int, max_length: int, fused: bool = False) -> list[Kept]:
    """What each block of a model in training mode keeps and needs in a training step, in order; with `fused` the
    gradients of parameters are freed as they are made.

    The model's tensors become fake ones, whatever they were. Blocks that read alike are run once.
    """
    with FakeTensorMode(), _one_window():
        _make_fake(model)
        if fused:
            for p in model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_free_gradient)
        blocks = anatomy.find_blocks(model).modules
        hidden_BLH, calls = record_calls(model, blocks, torch.ones(batch_size, max_length, dtype=torch.int64))
        found: dict[str, Kept] = {}
        for block, call in zip(blocks, calls, strict=True):
            if _kind(block) not in found:
                found[_kind(block)] = _block(block, call, hidden_BLH)
        return [found[_kind(block)] for block in blocks]


@contextmanager
def _one_window() -> Iterator[None]:
    """transformers looks into position ids for sequences packed into one window, and where it cannot, as with fake
    tensors, makes masks and copies of keys that a real step has not."""
    original, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, lambda *_: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _kind(block: nn.Module) -> str:
    return f"{block} {getattr(block, 'layer_type', '')}"


def _make_fake(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = torch.empty(p.shape, dtype=p.dtype)
            module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _block(block: nn.Module, call: BlockCall, hidden_BLH: Tensor) -> Kept:
    hidden = hidden_BLH.detach().requires_grad_()
    there = [*block.parameters(), *block.buffers(), hidden, *tree_leaves((call.args, call.kwargs))]
    with LiveBytes([t for t in there if isinstance(t, Tensor)]) as bytes:
        out = call(block, hidden)
        kept = bytes.live
        forward, bytes.peak = bytes.peak - kept, bytes.live
        out.backward(torch.ones_like(out))
        backward = bytes.peak - kept
    for p in block.parameters():
        p.grad = None
    return Kept(kept, forward, backward)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None
