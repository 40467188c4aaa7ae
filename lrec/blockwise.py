"""The second stage of quantizing a block: all its layers together, judged by what the whole block puts out.

Quantizers whose `refines` is true have one of their own, and `lrec.reconstruct` is one for all. For them the pass
carries a second stream of hidden states, those of the full-precision model, which is run block by block beside the
quantized one (also for blocks that are done: a resumed run sees what a straight one sees). It costs one forward pass of
the block, and as much memory as the first stream: samples * length * hidden size values, and as much again inside a
stage that keeps targets of its own.
"""

import torch
from torch import Tensor, nn

from lrec import anatomy, processes
from lrec.formats import Packed
from lrec.quantizers import BlockView, Quantizer
from lrec.reconstruct import Reconstruct, Stream
from lrec.stream import BlockCall


def wanted(quantizer: Quantizer, settings: Reconstruct) -> bool:
    """Whether there is a second stage. Raises ValueError for one under several processes."""
    stages = {"refine_epochs": quantizer.refines, "reconstruct_epochs": settings.reconstruct_epochs > 0}
    asked = [name for name, there in stages.items() if there]
    if asked and processes.count() > 1:
        raise ValueError(
            f"{' and '.join(asked)} above 0 train a block on one window after the other, which {processes.count()} "
            "processes cannot divide; start one process, or set them to 0"
        )
    return bool(asked)


def train(
    block: nn.Module, name: str, packed: dict[str, Packed], stream: Stream, quantizer: Quantizer, settings: Reconstruct
) -> tuple[dict[str, Packed], dict]:
    """The block's layers, by name in the block, after the second stages that are wanted: the quantizer's own, then
    reconstruction; and what the report is to say of each layer."""
    told = {}
    if quantizer.refines:
        packed, told = refine(name, quantizer, packed, view(block, stream.states, stream.targets, stream.call))
    if settings.reconstruct_epochs:
        packed, history = settings.reconstruct(block, name, packed, stream)
        told |= history
    return packed, told


def view(block: nn.Module, states: list[Tensor], full: list[Tensor], call: BlockCall) -> BlockView:
    """The block, still in full precision, on `states` of the quantized model; `full` are the full model's behind it.

    Batches are cut into single windows, whatever their size; no state or weight is copied.
    """
    block.requires_grad_(False)
    windows, targets = ([window for batch in batches for window in batch.split(1)] for batches in (states, full))

    def run(weights: dict[str, Tensor], i: int) -> Tensor:
        placed = {f"{name}.weight": w_NK.to(windows[i].dtype) for name, w_NK in weights.items()}
        return call(lambda *args, **kwargs: torch.func.functional_call(block, placed, args, kwargs), windows[i])

    weights = {name: linear.weight for name, linear in anatomy.linears(block).items()}
    return BlockView(weights=weights, targets=targets, run=run)


def refine(name: str, quantizer: Quantizer, packed: dict[str, Packed], seen: BlockView) -> tuple[dict, dict]:
    """The refined layers by name, and what the report is to say of each: `refine_loss`, the history of the loss.

    What the quantizer refuses is raised again with the block's name before it.
    """
    try:
        refined, losses = quantizer.refine(packed, seen)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return refined, {"refine_loss": losses}
