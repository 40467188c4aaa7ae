"""Several processes of one run: how work is divided, and that all know the same afterwards."""

import itertools
from functools import partial

import pytest
import torch
from checks import assert_close, run_together

from lrec import processes
from lrec.statistics import NEEDS, Collector


@pytest.mark.parametrize("num_items", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_own_items_are_all_items_once_in_order(monkeypatch, num_items, count):
    monkeypatch.setattr(processes, "count", lambda: count)
    found = []
    for index in range(count):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        found.append(list(range(num_items))[processes.own(num_items)])
    assert list(itertools.chain(*found)) == list(range(num_items))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_shares_are_within_a_third_of_the_best():
    costs = [3.0, 1.0, 1.0, 3.0, 8.0, 8.0, 13.0]
    found = processes.shares(costs, 2)
    assert sorted(itertools.chain(*found)) == list(range(7))
    dearest = max(sum(costs[job] for job in share) for share in found)
    best = min(
        max(sum(c for c, side in zip(costs, sides, strict=True) if side == s) for s in (0, 1))
        for sides in itertools.product((0, 1), repeat=7)
    )
    assert dearest <= 4 / 3 * best
    assert processes.shares([1.0], 3) == [[0], [], []]


def test_one_process_hands_each_result_out_before_the_next_job():
    done = []
    for job, result in processes.each([1, 2, 3], lambda job: done.append(job) or 10 * job, float):
        assert result == 10 * job and done[-1] == job
    assert done == [1, 2, 3]


def inputs():
    # Channels of very different size, as real activations have.
    x = torch.randn(1000, 41, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 41)
    return x, x + 0.1 * x.roll(1, 0)


def in_each_process(place):
    index, count = processes.index(), processes.count()
    x, y = (part.split([300, 700, 0])[index] for part in inputs())
    collector = Collector(41, NEEDS)
    collector.add(x, y)
    found = vars(collector.pool().result())
    found["together"] = processes.together(torch.arange(4.0)[: index + 1])
    found["main"] = processes.from_main(lambda: index)
    found["each"] = list(processes.each(range(5), lambda job: (job * job, index), lambda job: 1.0))
    faults = []
    for fail in (
        lambda: processes.from_main(lambda: int(f"main {index}")),
        lambda: list(processes.each(range(3), lambda job: int("no" if job == 1 else job), float)),
    ):
        try:
            fail()
        except ValueError as error:
            faults.append(str(error))
    assert count == 3
    torch.save(found | {"faults": faults}, place / f"{index}.pt")


def test_three_processes_know_what_one_would(tmp_path):
    run_together(partial(in_each_process, tmp_path), 3)
    whole = Collector(41, NEEDS)
    whole.add(*inputs())
    expected = whole.result()
    for index in range(3):
        found = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert found["num_tokens"] == 1000
        assert_close(found["hessian_KK"], expected.hessian_KK, 1e-6, "hessian")
        assert_close(found["cross_KK"], expected.cross_KK, 1e-6, "cross")
        assert torch.equal(found["maxima_K"], expected.maxima_K)
        assert found["together"].tolist() == [0, 0, 1, 0, 1, 2]
        assert found["main"] == 0
        assert [(job, square) for job, (square, _) in found["each"]] == [(i, i * i) for i in range(5)]
        assert {who for _, (_, who) in found["each"]} == {0, 1, 2}
        assert ["'main 0'" in found["faults"][0], "'no'" in found["faults"][1]] == [True, True]
