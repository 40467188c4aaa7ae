"""What enters the linears of a block: the statistics that quantizers are given, of one stream of hidden states or two.

The stream is the quantized model's. Where the full-precision model's runs beside it, window by window, the statistics
can say how the one drifted from the other (`cross_KK`), and quantizing can make up for it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrec import anatomy, experts, processes
from lrec.progress import Progress
from lrec.statistics import Collector, Statistics


def groups(block: nn.Module, name: str, run: Callable[[], object]) -> list[list[str]]:
    """The block's linears that share an input together, in the order in which `run`, called once, runs them; behind
    them those of experts that no token of it is routed to, each alone.

    Raises ValueError that names linears, other than these, which the text does not reach.
    """
    found = anatomy.shared_inputs(block, run)
    unseen = set(anatomy.linears(block)) - {linear for group in found for linear in group}
    idle = [linear for linear in anatomy.linears(block) if linear in unseen and experts.is_part(linear)]
    if lost := sorted(unseen - {*idle}):
        raise ValueError(f"{name}: the calibration text never reaches {', '.join(lost[:4])}; use more text")
    return found + [[linear] for linear in idle]


@contextmanager
def attending(block: nn.Module, runs: Sequence[Callable[[], object]], min_tokens: int) -> Iterator[dict[str, dict]]:
    """Inside, experts of the block that fewer than `min_tokens` tokens of all runs are routed to see every token: too
    few say nothing of the channels that they leave out. Others see those routed to them, as ever.

    Yields for each linear of an expert the number of tokens routed there, and whether it sees all of them. A block
    without experts is not run.
    """
    found = dict(experts.unfused(block))
    counts = {name: Counter() for name in found}
    handles = [
        module.register_forward_pre_hook(lambda _, args, to=counts[name]: to.update(args[1].flatten().tolist()))
        for name, module in found.items()
    ]
    try:
        for run in runs if found else []:
            run()
    finally:
        for handle in handles:
            handle.remove()
    counts = {name: sum(processes.everyones(own), Counter()) for name, own in counts.items()}
    told = {}
    for name, module in found.items():
        parts = experts.weights(module)
        count = len(getattr(module, parts[0]))
        module.attend = frozenset(e for e in range(count) if counts[name][e] < min_tokens)
        told |= {
            f"{name}.{part}.{e}": {"routed_tokens": counts[name][e], "saw_all_tokens": e in module.attend}
            for part in parts
            for e in range(count)
        }
    try:
        yield told
    finally:
        for module in found.values():
            del module.attend


def collect(
    block: nn.Module,
    groups: list[list[str]],
    needs: frozenset[str],
    runs: Sequence[Callable[[], object]],
    beside: Sequence[Callable[[], object]] | None = None,
    weights: list[Sequence[Tensor] | None] | None = None,
) -> list[Statistics]:
    """The input statistics of each group of linears over everything that `runs` feed the block, one after the other, in
    all processes together.

    `beside`, if given, has for each of them what feeds the block the full-precision model's states of the same tokens;
    `weights`, for each group (or None) and each run, what its tokens (T,) count for.
    """
    linears = anatomy.linears(block)
    collectors = [Collector(linears[group[0]].in_features, needs) for group in groups]
    firsts = [linears[group[0]] for group in groups]
    if beside is None and not any(weights or ()):
        # No input is kept until the block has run.
        with _watched(firsts, [collector.add for collector in collectors]):
            for run in Progress(runs, "statistics", "batch", inner=True):
                run()
        return [collector.pool().result() for collector in collectors]
    seen: list[list[Tensor]] = [[] for _ in groups]
    with _watched(firsts, [parts.append for parts in seen]):
        for i, run in enumerate(Progress(runs, "statistics", "batch", inner=True)):
            clean = [None] * len(groups)
            if beside is not None:
                beside[i]()
                clean = _taken(seen)
            run()
            counts = [parts and parts[i] for parts in weights or [None] * len(groups)]
            for collector, x_TK, *given in zip(collectors, _taken(seen), clean, counts, strict=True):
                if x_TK is not None:
                    collector.add(x_TK, *given)
    return [collector.pool().result() for collector in collectors]


@contextmanager
def _watched(linears: list[nn.Linear], sinks: list[Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each of the linears hands the inputs (T, K) that it is given to its sink."""
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, to=sink: to(args[0].flatten(0, -2)))
        for linear, sink in zip(linears, sinks, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _taken(seen: list[list[Tensor]]) -> list[Tensor | None]:
    """What has been seen since the last call, a tensor for each of the lists, which are emptied; None if nothing."""
    found = [torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None for parts in seen]
    for parts in seen:
        parts.clear()
    return found
