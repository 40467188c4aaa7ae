"""When a training must not go on: a loss or gradient that is not finite, a loss that runs away."""

import warnings

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lrec.teacher import final_hidden

# Two windows of logging in a row with a loss so many times the first one logged, and the least: no noise does that.
ABOVE_FIRST, ABOVE_LEAST = 1.5, 3.0


class DivergedError(ValueError):
    """Training cannot go on from the step it names."""


class AlreadyTrained(Exception):  # noqa: N818  (says where training stands, not what went wrong)
    """Training goes on from a checkpoint that has made all steps already."""


class Watch(TrainerCallback):
    """Raises `DivergedError` before a gradient that is not finite is applied, and when the loss runs away; and
    `AlreadyTrained` before a step too many, which transformers would make of a run that ended after its last one."""

    def __init__(self):
        self.first = self.least = None
        self.above = 0

    def on_step_begin(self, args, state, control, **kwargs):
        """See `TrainerCallback`."""
        if state.global_step >= state.max_steps:
            raise AlreadyTrained

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """See `TrainerCallback`."""
        # Under fp16 the gradient scaler skips such steps by itself.
        grads = [] if args.fp16 else [p.grad for p in model.parameters() if p.grad is not None]
        if grads and not torch.stack([g.isfinite().all() for g in grads]).all():
            raise DivergedError(
                f"the gradient is not finite at step {state.global_step + 1}; training stopped and nothing was saved "
                "since the last checkpoint. Lower learning_rate, or train in bf16 or fp32"
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """See `TrainerCallback`."""
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])
        self.first = loss if self.first is None else self.first
        self.least = loss if self.least is None else min(self.least, loss)
        self.above = self.above + 1 if loss > max(ABOVE_FIRST * self.first, ABOVE_LEAST * self.least) else 0
        if self.above == 2:
            raise DivergedError(
                f"the loss has run away at step {state.global_step}: {loss:.4g}, after {self.first:.4g} at first and "
                f"{self.least:.4g} at best; training stopped and nothing was saved since the last checkpoint. Lower "
                "learning_rate or scales_learning_rate"
            )


def kept_best(error: DivergedError, checkpoint: str | None) -> dict[str, str]:
    """Warns that training has diverged and the best checkpoint is kept; what is to be told of it.

    Raises the error again if there is none."""
    if checkpoint is None:
        raise error
    warnings.warn(f"{error}. Kept: the best on held-out text, {checkpoint}", stacklevel=2)
    return {"diverged": str(error)}


@torch.no_grad()
def first_not_finite(model: nn.Module, batch: dict[str, Tensor]) -> str | None:
    """Name of the first module to run whose output holds NaN or infinity; None if there is none."""
    found: list[str] = []

    def hook_for(name):
        def hook(module, args, output):
            tensors = torch.utils._pytree.tree_leaves(output)
            if not all(t.isfinite().all() for t in tensors if isinstance(t, Tensor) and t.is_floating_point()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        final_hidden(model, **batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
