"""A training step of each block run on fake tensors: which bytes are live, without one of them being allocated.

What a block keeps for its backward and what it needs while it runs follow from its code, from peft's, from that of
checkpointing and from torch's autograd. So the block itself is asked: torch's fake tensors run it in milliseconds, on
any machine, and every storage made is counted from its birth to its death. A new setting that changes what is kept
changes the figure by itself.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrec import anatomy
from lrec.stream import BlockCall


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


def rehearse(model: nn.Module, input_ids_BL: Tensor) -> list[Kept]:
    """What each block of a model of fake tensors keeps and needs in a training step, in order.

    Blocks that read alike are run once. To be called inside the model's `FakeTensorMode`, in training mode.
    """
    blocks = anatomy.find_blocks(model).modules
    hidden_BLH, calls = _calls(model, blocks, input_ids_BL)
    found: dict[str, Kept] = {}
    for block, call in zip(blocks, calls, strict=True):
        kind = f"{block} {getattr(block, 'layer_type', '')}"
        if kind not in found:
            found[kind] = _block(block, call, hidden_BLH)
    order = [f"{block} {getattr(block, 'layer_type', '')}" for block in blocks]
    return [found[kind] for kind in order]


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


class _Reached(BaseException):
    """Raised by the recorder to leave the forward pass once every block's arguments are known."""


def _calls(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
    hidden, calls = [], []

    def recorder(hidden_states, *args, **kwargs):
        hidden.append(hidden_states)
        calls.append(BlockCall(args, kwargs))
        if len(calls) == len(blocks):
            raise _Reached
        return hidden_states

    for block in blocks:
        block.forward = recorder
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        for block in blocks:
            del block.forward
    return hidden[0], calls
