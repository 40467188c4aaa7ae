"""Fused experts taken apart: what holds (experts, out, in) in one parameter becomes a list of linears.

transformers keeps the experts of a mixture as 3-D parameters of one module, `gate_up_proj` and `down_proj`, and gives
that module a contract which all of its mixtures share: `use_experts_implementation` marks the class with how the
parameters are laid out, and its forward takes (hidden_states, top_k_index, top_k_weights). That contract is what is
looked for here, not a model. Taken apart, every expert's matrix is an `nn.Linear` of its own, so that all that lrec and
peft do with linears holds for it: statistics, packing, kernels, LoRA, saving. The module keeps its place and its class,
of which a subclass brings a forward that runs each expert on the tokens routed to it; no dense stack is ever made.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# What `use_experts_implementation` sets on every module it marks.
CONTRACT = ("is_transposed", "has_bias", "has_gate", "has_post_expert_norm", "_apply_gate")


class Unfused(nn.Module):
    """Mixed into a class of fused experts once their parameters are lists of linears."""

    attend: frozenset[int] = frozenset()  # experts that see every token, while statistics are taken

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs (T, H), weighted and summed, for hidden states (T, H) and each token's choice (T, k).

        Experts run in their order, each once, on the tokens that chose it, as transformers' eager forward does.
        """
        up_projs, down_projs = (getattr(self, name) for name in weights(self))
        k = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = _loads(top_k_index, len(up_projs))
        out = torch.zeros_like(hidden_states)
        for expert, chosen in enumerate(order.split(counts)[: len(up_projs)]):
            tokens = chosen // k
            everything = expert in self.attend
            if not everything and not len(tokens):
                continue
            x = up_projs[expert](hidden_states if everything else hidden_states[tokens])
            x = down_projs[expert](self._apply_gate(x) if self.has_gate else self.act_fn(x))
            x = x[tokens] if everything else x
            x = self.post_expert_norm(x) if self.has_post_expert_norm else x
            x = x * top_k_weights.flatten()[chosen, None]
            out.index_add_(0, tokens, x.to(out.dtype))
        return out


def weights(module: nn.Module) -> tuple[str, str]:
    """The names under which a module of experts, fused or not, holds their first and their last matrices."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def is_fused(module: nn.Module) -> bool:
    """Whether a module keeps the contract of fused experts with its matrices in one 3-D parameter each."""
    if isinstance(module, Unfused) or not all(hasattr(module, name) for name in CONTRACT):
        return False
    held = module._parameters
    return all(held.get(name) is not None and held[name].ndim == 3 for name in weights(module))


def unfused(model: nn.Module) -> Iterator[tuple[str, Unfused]]:
    """The modules of experts that were taken apart, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Unfused))


def unfuse(model: nn.Module, under: Iterable[str] | None = None) -> None:
    """Takes all fused experts of a model apart, in place, or those alone that names in `under` lie in.

    The linears are views of what was one parameter, unless that was stored as (experts, in, out).
    """
    inside = None if under is None else {name.rsplit(".", 2)[0] for name in under if is_part(name)}
    for name, module in [*model.named_modules()]:
        if not is_fused(module) or (inside is not None and name not in inside):
            continue
        for part in weights(module):
            w_ENK = module._parameters.pop(part)
            bias_EN = module._parameters.pop(f"{part}_bias", None)
            w_ENK = w_ENK.detach().transpose(1, 2).contiguous() if module.is_transposed else w_ENK.detach()
            biases = [None] * len(w_ENK) if bias_EN is None else bias_EN.detach()
            module.add_module(part, nn.ModuleList(map(_linear, w_ENK, biases)))
        module.__class__ = _unfused_class(type(module))
        module._is_hf_initialized = True  # transformers would look for the parameters to draw random ones


def fuse(model: nn.Module) -> None:
    """Puts experts that were taken apart together again, in place, unless any of their linears is not a plain one."""
    for _, module in unfused(model):
        if any(type(linear) is not nn.Linear for part in weights(module) for linear in getattr(module, part)):
            continue
        for part in weights(module):
            linears = module._modules.pop(part)
            for name, tensor in _stacked(module, part, [linear.state_dict() for linear in linears]).items():
                module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        module.__class__ = type(module).__bases__[1]


def fuse_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by full name, those of dense experts taken apart as the fused parameters that they were."""
    fused = dict(tensors)
    for name, module in unfused(model):
        for part in weights(module):
            stems = [f"{name}.{part}.{expert}" for expert in range(len(getattr(module, part)))]
            if all(f"{stem}.weight" in fused for stem in stems):
                own = [
                    {key: fused.pop(f"{stem}.{key}") for key in ("weight", "bias") if f"{stem}.{key}" in fused}
                    for stem in stems
                ]
                fused |= {f"{name}.{key}": tensor for key, tensor in _stacked(module, part, own).items()}
    return fused


def is_part(name: str) -> bool:
    """Whether a layer of this full name is one expert's matrix: it has a number for a name, as blocks have."""
    return name.rpartition(".")[2].isdigit()


def routers(block: nn.Module) -> set[str]:
    """The linears of a block that choose between its experts or weigh one that all tokens see: beside them, and with
    one output for each expert, or one in all."""
    found = set()
    for name, module in unfused(block):
        parent, count = name.rpartition(".")[0], len(getattr(module, weights(module)[1]))
        beside = block.get_submodule(parent).named_modules() if parent else block.named_modules()
        for own, linear in beside:
            if isinstance(linear, nn.Linear) and linear.out_features in (1, count) and not is_part(own):
                found.add(f"{parent}.{own}" if parent else own)
    return found


def _loads(top_k_index: Tensor, count: int) -> list[int]:
    """How many of the choices fall on each of `count` experts, and, behind them, on none (expert parallelism)."""
    if isinstance(top_k_index, FakeTensor):  # a rehearsal of memory has no values: choices spread evenly
        total = top_k_index.numel()
        return [total * (expert + 1) // count - total * expert // count for expert in range(count)]
    return torch.bincount(top_k_index.flatten(), minlength=count).tolist()


@functools.cache
def _unfused_class(fused: type[nn.Module]) -> type[nn.Module]:
    return type(f"Unfused{fused.__name__}", (Unfused, fused), {})


def _linear(w_NK: Tensor, bias_N: Tensor | None) -> nn.Linear:
    linear = nn.Linear(w_NK.shape[1], w_NK.shape[0], bias=bias_N is not None, device="meta")
    linear.weight = nn.Parameter(w_NK, requires_grad=False)
    if bias_N is not None:
        linear.bias = nn.Parameter(bias_N, requires_grad=False)
    return linear


def _stacked(module: nn.Module, part: str, experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    w_ENK = torch.stack([tensors["weight"] for tensors in experts])
    stacked = {part: w_ENK.transpose(1, 2).contiguous() if module.is_transposed else w_ENK}
    if "bias" in experts[0]:
        stacked[f"{part}_bias"] = torch.stack([tensors["bias"] for tensors in experts])
    return stacked
