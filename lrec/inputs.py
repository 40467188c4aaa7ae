"""What enters the linears of a block: the statistics that quantizers are given, of one stream of hidden states or two.

The stream is the quantized model's. Where the full-precision model's runs beside it, window by window, the statistics
can say how the one drifted from the other (`cross_KK`), and quantizing can make up for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrec import anatomy
from lrec.progress import Progress
from lrec.statistics import Collector, Statistics


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
            for collector, *given in zip(collectors, _taken(seen), clean, counts, strict=True):
                collector.add(*given)
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


def _taken(seen: list[list[Tensor]]) -> list[Tensor]:
    """What has been seen since the last call, a tensor for each of the lists, which are emptied."""
    found = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in seen]
    for parts in seen:
        parts.clear()
    return found
