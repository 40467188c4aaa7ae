"""The processes of one run, as `accelerate launch` or `torchrun` starts them: who writes, and what all must know.

All but `count`, `index` and `is_main` are collective: every process must call them, in the same order. With a single
process each is what a plain program would do, and imports nothing.
"""

import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

Job = TypeVar("Job")
Result = TypeVar("Result")

# How long one process waits for another. A launcher notices at once when a process has died; this is for slow layers.
PATIENCE = timedelta(hours=3)


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def index() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return index() == 0


def state():
    """accelerate's `PartialState` of these processes, of which there are several, connected to each other."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if count() > 1 and not torch.accelerator.is_available() and not torch.distributed.is_initialized():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu`; DeepSpeed takes it back
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def wait() -> None:
    """Returns once every process has come here."""
    if count() > 1:
        state().wait_for_everyone()


def everyones(value: Result) -> list[Result]:
    """What each process gives, by its number; tensors should be on the CPU."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    state()
    return gather_object([value])


def from_main(make: Callable[[], Result]) -> Result:
    """What `make()` returns in the main process, in all of them. Raises the ValueError that it raises there."""
    if count() == 1:
        return make()
    value, fault = None, None
    if is_main():
        try:
            value = make()
        except ValueError as error:
            fault = str(error)
    value, fault = everyones((value, fault))[0]
    if fault is not None:
        raise ValueError(fault)
    return value


def together(part_nX: Tensor) -> Tensor:
    """The rows of all processes, one process's after the other's, on this one's device."""
    if count() == 1:
        return part_nX
    return torch.cat(everyones(part_nX.cpu())).to(part_nX.device)


def total(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in the place of this one's."""
    return _reduced(tensor, "SUM")


def largest(tensor: Tensor) -> Tensor:
    """The largest of all processes' tensors, entry by entry, in the place of this one's."""
    return _reduced(tensor, "MAX")


def own(num_items: int) -> slice:
    """The items of this process, of so many in order: a run of them, as long as every other one's or one longer."""
    each_least, over = divmod(num_items, count())
    start = index() * each_least + min(index(), over)
    return slice(start, start + each_least + (index() < over))


def each(
    jobs: Sequence[Job], work: Callable[[Job], Result], cost: Callable[[Job], float]
) -> Iterator[tuple[Job, Result]]:
    """(job, work(job)) of every job, in order. Processes share the jobs out by their cost and tell each other the
    results, whose tensors should be on the CPU; a single one hands each out before it takes up the next.

    Raises in all processes the ValueError that work raises in one.
    """
    if count() == 1:
        for job in jobs:
            yield job, work(job)
        return
    done, fault = {}, None
    try:
        for i in shares([cost(job) for job in jobs], count())[index()]:
            done[i] = work(jobs[i])
    except ValueError as error:
        fault = str(error)
    told = everyones((done, fault))
    faults = [fault for _, fault in told if fault is not None]
    if faults:
        raise ValueError(faults[0])
    found = {i: result for done, _ in told for i, result in done.items()}
    for i, job in enumerate(jobs):
        yield job, found.pop(i)


def shares(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """The numbers of these jobs in shares of like cost: the dearest job first, each to the share that is the cheapest
    (at most 4/3 of the best; Graham, Bounds on multiprocessing timing anomalies, 1969)."""
    found: list[list[int]] = [[] for _ in range(num_shares)]
    spent = [(0.0, share) for share in range(num_shares)]
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        used, share = heapq.heappop(spent)
        found[share].append(job)
        heapq.heappush(spent, (used + costs[job], share))
    return [sorted(share) for share in found]


def _reduced(tensor: Tensor, operation: str) -> Tensor:
    if count() > 1:
        state()
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation))
    return tensor
