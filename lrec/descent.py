"""The loop by which second stages of quantizing train a block: every batch a step, again for each epoch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def descend(
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    num_batches: int,
    loss_of: Callable[[int], Tensor],
    fault: Callable[[int, float], str],
) -> list[float]:
    """Steps down `loss_of(batch)`, a scalar, for every batch in each epoch, while rates fall along a cosine to zero.

    Returns the mean loss of each epoch.
    Raises ValueError with `fault(epoch, mean)`, epochs being counted from 1, after an epoch whose mean is not finite.
    """
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * num_batches)
    history = []
    for epoch in range(1, num_epochs + 1):
        total = 0.0
        for batch in range(num_batches):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            total += loss.item()
        history.append(total / num_batches)
        if not math.isfinite(history[-1]):
            raise ValueError(fault(epoch, history[-1]))
    return history
