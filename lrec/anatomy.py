"""Where a decoder model keeps its blocks and linears, found by looking and never by name.

The blocks are the largest list of like modules in what decodes text; the linears are the `nn.Linear`s inside one of
them, those of experts among them (lrec.experts) but not what routes tokens to these; which see the same input tensor is
found by running the block once with hooks. A model that does not fit this shape is refused with what was found instead.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lrec import experts
from lrec.nn import PackedLinear, PackedModule


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model: `path` is the name of their ModuleList, `modules` the blocks in order."""

    path: str
    modules: list[nn.Module]

    def name(self, index: int) -> str:
        """The full name of a block, as parameters are prefixed with it."""
        return f"{self.path}.{index}"


def find_blocks(model: nn.Module) -> Blocks:
    """The decoder blocks: of all outermost ModuleLists whose items share one class, the one with most linear weights.

    Where a model reads images or sound too, only what transformers calls its decoder is looked at. Raises ValueError
    that lists the ModuleLists found if none holds an `nn.Linear`.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {*decoder.modules()}
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and module in inside
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    alike = {n: m for n, m in outermost.items() if len({type(item) for item in m}) == 1}
    path = max(alike, key=lambda n: linear_weights(alike[n]), default=None)
    if path is None or not linear_weights(alike[path]):
        found = ", ".join(f"{n} ({len(m)} x {type(m[0]).__name__})" for n, m in lists.items()) or "no ModuleList at all"
        raise ValueError(
            f"{type(model).__name__} has no decoder blocks that lrec can quantize: it needs a ModuleList of like "
            f"modules that hold nn.Linear layers, but found {found}"
        )
    return Blocks(path, list(alike[path]))


def in_block(name: str) -> bool:
    """Whether a module of this full name lies in a block: a list of modules gives its items numbers for names."""
    return any(part.isdigit() for part in name.split("."))


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by their name inside it, in the order they were defined.

    Routers are none of them, nor are subclasses of `nn.Linear` that do something else: they would not do it packed.
    """
    routers = experts.routers(block)
    return {name: module for name, module in block.named_modules() if is_linear(module) and name not in routers}


def is_linear(module: nn.Module) -> bool:
    """Whether a module does what `nn.Linear` does, and nothing more."""
    return isinstance(module, PackedLinear) or getattr(type(module), "forward", None) is nn.Linear.forward


def unpacked(model: nn.Module) -> str | None:
    """A pattern of the full names of what holds linears but no packed ones, for peft to leave alone when it adapts all
    linears: towers that read images, routers. None if there is nothing such; the output head peft leaves alone itself.
    """
    names, head = [], model.get_output_embeddings()
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in model.named_modules():
        if module is head or name in adapted or any(name.startswith(f"{known}.") for known in [*names, *adapted]):
            continue
        inside = [m for m in module.modules() if isinstance(m, nn.Linear) and m is not head]
        if name and inside and not any(isinstance(m, PackedModule) for m in inside):
            names.append(name)
    return "|".join(rf"(.*\.)?{re.escape(name)}(\..*)?" for name in names) or None


def check_finite(block: nn.Module, name: str) -> None:
    """Raises ValueError naming every linear, norm or other module of the block whose weight holds NaN or infinity.

    To be called before the block runs: there a NaN would only show as a NaN input of the layers behind it.
    """
    bad = [f"{name}.{n.removesuffix('.weight')}" for n, p in block.named_parameters() if not p.isfinite().all()]
    if bad:
        raise ValueError(f"{', '.join(bad)}: the weight holds NaN or infinity; fetch or make the checkpoint again")


def linear_weights(module: nn.Module) -> int:
    """Number of weights in all linears inside a module; packed ones count as what they decode to."""
    return sum(m.in_features * m.out_features for m in linears(module).values())


def shared_inputs(block: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Names of the block's linears in the order they run, those that see the same input tensor together.

    `run` is called once and must run the block. Linears it does not reach are not listed.
    """
    seen: list[tuple[Tensor, int, list[str]]] = []

    def note(name: str) -> Callable:
        def hook(module, args):
            x = args[0]
            for known, version, names in seen:
                same = known.data_ptr() == x.data_ptr() and known.shape == x.shape and known.stride() == x.stride()
                if same and version == x._version:
                    names.append(name)
                    return
            # The tensor is held until the end, so that its memory cannot come back as another input's.
            seen.append((x, x._version, [name]))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears(block).items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [list(dict.fromkeys(names)) for _, _, names in seen]
