"""What enters the linears of a block: the statistics that quantizers are given, of one stream of hidden states or two.

The stream is the quantized model's. Where the full-precision model's runs beside it, window by window, the statistics
can say how the one drifted from the other (`cross_KK`), and quantizing can make up for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrec import anatomy
from lrec.statistics import Collector, Statistics


def collect(
    block: nn.Module,
    groups: list[list[str]],
    needs: frozenset[str],
    runs: Sequence[Callable[[], object]],
    beside: Sequence[Callable[[], object]] | None = None,
    weights: list[Sequence[Tensor] | None] | None = None,
) -> list[Statistics]:
    """The input statistics of each group of linears over everything that `runs` feed the block, one after the other.

    `beside`, if given, has for each of them what feeds the block the full-precision model's states of the same tokens;
    `weights`, for each group (or None) and each run, what its tokens (T,) count for.
    """
    linears = anatomy.linears(block)
    collectors = [Collector(linears[group[0]].in_features, needs) for group in groups]
    with _inputs([linears[group[0]] for group in groups]) as inputs:
        for i, run in enumerate(runs):
            clean = [None] * len(groups)
            if beside is not None:
                beside[i]()
                clean = inputs()
            run()
            counts = [parts and parts[i] for parts in weights or [None] * len(groups)]
            for collector, *given in zip(collectors, inputs(), clean, counts, strict=True):
                collector.add(*given)
    return [collector.result() for collector in collectors]


@contextmanager
def _inputs(linears: list[nn.Linear]) -> Iterator[Callable[[], list[Tensor]]]:
    """Inside, a call returns, and forgets, the inputs (T, K) that each of the linears was given since the last one."""
    seen: list[list[Tensor]] = [[] for _ in linears]
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].flatten(0, -2)))
        for linear, to in zip(linears, seen, strict=True)
    ]

    def take() -> list[Tensor]:
        found = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in seen]
        for parts in seen:
            parts.clear()
        return found

    try:
        yield take
    finally:
        for hook in hooks:
            hook.remove()
