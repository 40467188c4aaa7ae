"""Adapters that see the sum of each group's inputs alone: A constant over each group of columns, as QA-LoRA has them
(2309.14717). They say less than others of their rank, but `export --format packed` puts them into float zero points
exactly, and then they cost nothing."""

import math

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lrec.nn import PackedLinear


def pool(model: nn.Module) -> None:
    """Makes every trained A of a peft model constant over the groups of its packed weight, of the size it had, and
    keeps it so: its gradient is averaged over each group. Raises ValueError for weights without groups."""
    for name, weight, group_size in pooled_weights(model):
        if group_size is None:
            raise ValueError(
                f"{name} has no groups to pool inputs over: its format is not uniform; leave lora_pool out"
            )
        with torch.no_grad():
            weight.copy_(means(weight, group_size) * math.sqrt(group_size))
        weight.register_hook(lambda grad, size=group_size: means(grad, size))


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Takes back what rounding in the optimizer has made of A within a group."""
    for _, weight, group_size in pooled_weights(model):
        weight.copy_(means(weight, group_size))


def pooled_weights(model: nn.Module) -> list[tuple[str, Tensor, int | None]]:
    """Name, trained A (R, K) and group size of each adapted packed layer; None for a format without groups."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), PackedLinear):
            parts = [part.weight for part in layer.lora_A.values() if part.weight.requires_grad]
            found += [(name, weight, layer.get_base_layer().spec.get("group_size")) for weight in parts]
    return found


def means(values_RK: Tensor, group_size: int) -> Tensor:
    """Each entry replaced by the mean of its group of columns; the last group may be short."""
    parts = values_RK.split(group_size, 1)
    return torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in parts], 1)
