"""The frozen end of a language model: from last hidden states to logits, and what its input is.

Divergences, perplexity and the teacher's cache all need the same two things: the hidden states that the output layer
is given, and the equation by which it makes logits of them. Both are found by looking at the model, and
`verify_head` runs it once to prove that they reproduce its logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lrec import kernels
from lrec.formats import Packed
from lrec.nn import PackedLinear

SLICE_WEIGHTS = 2**20  # weights of a half-precision head that are cast to float32 at once


@dataclass(frozen=True, eq=False)
class Head:
    """The frozen map from hidden states to logits: l = cap * tanh(z / cap) with z = scale * (h W^T + b).

    weight: (V, H), dense or packed; bias: (V,) or None; softcap: None for l = z (Gemma 2 has 30).
    """

    weight: Tensor | Packed
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a causal language model, sharing its tensors; `verify_head` proves it right.

        Raises ValueError if the output layer is not a plain linear one (an adapter on it would never be trained).
        """
        layer = output_layer(model)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"the output layer is a {type(layer).__name__}, but the loss needs a plain linear head; "
                "leave the head out of the adapter's target_modules and modules_to_save"
            )
        weight = layer.packed if isinstance(layer, PackedLinear) else layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        config = model.config.get_text_config()
        return cls(weight, bias, getattr(config, "final_logit_softcapping", None), _logit_scale(config))

    def to(self, device: torch.device) -> "Head":
        """The same head with its tensors on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def logits(self, hidden_nH: Tensor, out: Tensor | None = None) -> Tensor:
        """l of shape (n, V), float32 or float64, in `out` if it is given."""
        x_nH = hidden_nH.to(torch.promote_types(hidden_nH.dtype, torch.float32))
        z_nV = _project(x_nH, self.weight, out=out)
        if self.bias is not None:
            z_nV += self.bias
        if self.scale != 1:
            z_nV *= self.scale
        return z_nV if self.softcap is None else z_nV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits_nV: Tensor, out: Tensor | None = None) -> Tensor:
        """dl/d(h W^T) at these logits: scale * (1 - (l / cap)^2), or scale alone, of shape (1,), without a cap."""
        if self.softcap is None:
            return logits_nV.new_tensor([self.scale])
        return torch.div(logits_nV, self.softcap, out=out).square_().neg_().add_(1).mul_(self.scale)

    def backward(self, grad_nV: Tensor) -> Tensor:
        """dL/dh of shape (n, H) from dL/d(h W^T), which is dL/dl times `slope`."""
        return _project(grad_nV, self.weight, transpose=True)


def _project(x: Tensor, weight: Tensor | Packed, transpose: bool = False, out: Tensor | None = None) -> Tensor:
    if isinstance(weight, Packed):
        y = kernels.matmul(x, weight, transpose)
        return y if out is None else out.copy_(y)
    if weight.dtype == x.dtype:
        return torch.mm(x, weight if transpose else weight.t(), out=out)
    V, H = weight.shape
    y = x.new_empty(len(x), H if transpose else V) if out is None else out
    step = max(1, SLICE_WEIGHTS // H)
    if transpose:
        y.zero_()
    for rows in (slice(v, v + step) for v in range(0, V, step)):
        w = weight[rows].to(x.dtype)
        if transpose:
            y.addmm_(x[:, rows], w)
        else:
            y[:, rows] = x @ w.t()
    return y


def _logit_scale(config) -> float:
    # The names that transformers' models give to a factor on logits; Granite divides. Others are caught by verify_head.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1 / divisor


def output_layer(model: nn.Module) -> nn.Module:
    """The module that makes logits, seen through peft's and DistributedDataParallel's wrappers.

    Raises ValueError if the model has none.
    """
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; load it with AutoModelForCausalLM")
    return layer


@contextmanager
def head_input(model: nn.Module, last_only: bool = False) -> Iterator[list[Tensor]]:
    """Inside, each run of the model appends what its output layer is given, (B, L, H), to the list this yields.

    With `last_only` the layer itself then sees the last position alone, so that logits of (B, 1, V) are all it makes:
    the same as `logits_to_keep=1`, but for every model, and the hidden states are those of all positions.
    """
    seen: list[Tensor] = []

    def hook(module, args):
        seen.append(args[0])
        return (args[0][..., -1:, :], *args[1:]) if last_only else None

    handle = output_layer(model).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def verify_head(model: nn.Module, head: Head) -> None:
    """Runs eight tokens through the model and raises ValueError unless `head` makes the model's own logits from the
    hidden states, to 1e-3 relative (1e-2 for half precision): no model is trained on wrong logits in silence."""
    input_ids = torch.linspace(1, head.weight.shape[0] - 1, 8, device=next(model.parameters()).device).long()[None]
    with head_input(model) as seen:
        logits = model(input_ids=input_ids, use_cache=False).logits
    if len(seen) != 1:
        raise ValueError(
            f"{type(model).__name__} runs its output layer {len(seen)} times a step, but exactly 1 is supported"
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"the logits of {type(model).__name__} ({model.config._name_or_path or 'no folder'}) are not finite: its "
            "checkpoint holds NaN or infinity, or overflows in this dtype; check it, or try --dtype float32"
        )
    expected, actual = logits.flatten(0, 1).double(), head.logits(seen[0].flatten(0, 1)).double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    tolerance = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not error <= tolerance:
        raise ValueError(
            f"the head found in {type(model).__name__} (softcap={head.softcap}, scale={head.scale}) misses the model's "
            f"logits by {error:.2g} relative, allowed is {tolerance:g}; pass a Head whose equation is this model's"
        )
