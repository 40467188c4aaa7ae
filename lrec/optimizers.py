"""Any optimizer, stepped one parameter at a time: for adapters in bfloat16, and for gradients that never pile up.

In bfloat16 a weight of 1 cannot take a step below 1/256, so an update that is rounded to the nearest is lost, again and
again. Here a parameter is widened to float32 for its own step and rounded back up or down at random, with the odds that
make the mean exact: E[round(w)] = w. No float32 master is kept; the optimizer's state is float32, or 8-bit if it is one
of bitsandbytes'.

Fused into backward (Lv et al., "LOMO", 2306.09782), each parameter steps as soon as its gradient is there, and the
gradient is freed: one lives at a time. What needs all gradients at once, a norm to clip by or a sum over batches, is
then impossible.
"""

import functools

import torch
from torch import Tensor

from lrec import processes

SIXTEEN_BITS = 1 << 16


def stochastic_round(w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 as bfloat16: of the two neighbours the upper one with probability (w - lower) / (upper - lower)."""
    noise = torch.randint(SIXTEEN_BITS, w.shape, dtype=torch.int32, device=w.device, generator=generator)
    # A bfloat16 is the upper half of a float32, so adding below and cutting off carries with the right odds.
    rounded = (w.view(torch.int32) + noise).bitwise_and_(-SIXTEEN_BITS).view(torch.float32)
    return torch.where(w.isfinite(), rounded, w).to(torch.bfloat16)


class OneByOne(torch.optim.Optimizer):
    """`inner`'s steps, one parameter at a time; bfloat16 ones in float32 with stochastic rounding.

    Shares parameter groups and state with `inner`, so schedules and checkpoints work as ever.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.state = inner, inner.state
        self.all_finite: dict[torch.device, Tensor] = {}
        self.noise: torch.Generator | None = None  # torch's own

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Steps every parameter that has a gradient, and frees that. Raises ValueError if a gradient that a fused
        backward has applied was not finite."""
        finite, self.all_finite = all(self.all_finite.values()), {}
        if not finite:
            raise ValueError("a gradient was not finite, and fused_backward has applied it: lower learning_rate")
        stepped = [(g, parameter) for g in self.param_groups for parameter in g["params"] if parameter.grad is not None]
        if stepped and processes.count() > 1:
            # Rounded alike in all processes, whose own random numbers may have been used up at different rates.
            seed = processes.from_main(lambda: int(torch.randint(2**62, ())))
            self.noise = torch.Generator(stepped[0][1].device).manual_seed(seed)
        for group, parameter in stepped:
            self.step_one(group, parameter)

    def fuse(self) -> list:
        """From now on backward itself steps each parameter. Returns the handles by which hooks are removed."""
        return [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._in_backward, index))
            for index, group in enumerate(self.param_groups)
            for parameter in group["params"]
        ]

    @torch.no_grad()
    def step_one(self, group: dict, parameter: Tensor) -> None:
        """One step of one parameter; its gradient is freed."""
        narrow = parameter.dtype == torch.bfloat16
        if narrow:
            wide_grad, parameter.grad = parameter.grad.float(), None
            parameter.data = parameter.data.float()
            parameter.grad = wide_grad
        self.inner.state, self.inner.param_groups = self.state, [{**group, "params": [parameter]}]
        self.inner.step()
        parameter.grad = None
        if narrow:
            parameter.data = stochastic_round(parameter.data, self.noise)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch does it, but the state keeps its dtype instead of taking that of a bfloat16 parameter."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(self.state[parameter][name].device)

    def _in_backward(self, index: int, parameter: Tensor) -> None:
        finite = parameter.grad.isfinite().all()
        # Read in `step`, once: asking here would make a GPU wait for every parameter.
        self.all_finite[parameter.device] = finite & self.all_finite.get(parameter.device, finite)
        # By number: loading a state dict replaces the groups themselves.
        self.step_one(self.param_groups[index], parameter)
