"""Bits by rules and to a target: the greedy choice against all choices, on small cases where it must be the best."""

import itertools
import random

import pytest

from lrec import allocation
from lrec.quantizers.gptq import GPTQ
from lrec.quantizers.nf4 import Nf4
from lrec.quantizers.rtn import RTN

NAMES = [f"model.layers.{i}.{part}" for i in range(11) for part in ("attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


def table(seed, num_layers, sizes):
    """Random layers whose error falls convexly with their bytes; each has one of `sizes` as bytes a step."""
    rng = random.Random(seed)
    rows = []
    for layer in range(num_layers):
        step, error, gain = rng.choice(sizes), rng.uniform(5, 9), rng.uniform(1, 3)
        choices = []
        for k, bits in enumerate((2, 3, 4, 8)):
            choices.append({"bits": bits, "bytes": step * (k + 2), "error": error})
            error, gain = error - gain, gain * rng.uniform(0.1, 0.9)
        rng.shuffle(choices)
        rows.append({"name": f"layer{layer}", "weights": 4 * step, "choices": choices})
    return rows


def bits(chosen):
    return {name: choice["bits"] for name, choice in chosen.items()}


def brute_force(rows, budget_bytes):
    """The least total error of all choices within the budget."""
    picks = itertools.product(*(row["choices"] for row in rows))
    return min(sum(c["error"] for c in pick) for pick in picks if sum(c["bytes"] for c in pick) <= budget_bytes)


def totals(rows, chosen):
    """Bytes and error of an allocation."""
    picked = [chosen[row["name"]] for row in rows]
    assert all(choice in row["choices"] for choice, row in zip(picked, rows, strict=True))
    return sum(c["bytes"] for c in picked), sum(c["error"] for c in picked)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_best_of_all_for_equal_steps(seed):
    rows = table(seed, 5, [100])
    weights = sum(row["weights"] for row in rows)
    for budget in range(1000, 2501, 130):
        found = totals(rows, allocation.to_target(rows, 8 * budget / weights))
        assert found[0] <= budget
        assert found[1] == pytest.approx(brute_force(rows, budget), rel=1e-12), budget


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_best_of_its_own_size_for_any_steps(seed):
    rows = table(seed, 5, [70, 100, 310])
    weights = sum(row["weights"] for row in rows)
    low = sum(min(c["bytes"] for c in row["choices"]) for row in rows)
    # At the sizes where the steps, taken by falling gain, end.
    steps = []
    for row in rows:
        curve = sorted(row["choices"], key=lambda c: c["bytes"])
        steps += [
            ((a["error"] - b["error"]) / (b["bytes"] - a["bytes"]), b["bytes"] - a["bytes"])
            for a, b in itertools.pairwise(curve)
        ]
    for size in itertools.accumulate((size for _, size in sorted(steps, reverse=True)), initial=low):
        found = totals(rows, allocation.to_target(rows, 8 * size / weights))
        assert found[0] == size
        assert found[1] == pytest.approx(brute_force(rows, size), rel=1e-12)


def test_a_width_off_the_hull_is_passed_over():
    def layer(name, *errors):
        choices = [{"bits": b, "bytes": 10 * b, "error": e} for b, e in zip((2, 3, 4), errors, strict=True)]
        return {"name": name, "weights": 80, "choices": choices}

    # a saves nothing at 3 bits and much at 4; b is worse at 4 bits than at 3, as measured errors can be.
    rows = [layer("a", 9.0, 9.5, 1.0), layer("b", 5.0, 4.0, 4.5)]
    assert bits(allocation.to_target(rows, 8 * 70 / 160)) == {"a": 4, "b": 3}
    assert bits(allocation.to_target(rows, 8 * 60 / 160)) == {"a": 4, "b": 2}
    assert bits(allocation.to_target(rows, 8 * 50 / 160)) == {"a": 2, "b": 3}


def test_ranks_are_offered_up_to_the_largest():
    found = {most: allocation.ranks_to(most) for most in (1, 4, 12, 32)}
    assert found == {1: [0, 1], 4: [0, 4], 12: [0, 4, 8, 12], 32: [0, 4, 8, 16, 32]}


def test_an_adapter_is_taken_where_its_bytes_save_more_than_bits_do():
    def choice(bits, rank, nbytes, error):
        return {"bits": bits, "rank": rank, "bytes": nbytes, "error": error}

    low = [choice(2, 0, 20, 8.0), choice(2, 4, 24, 2.0), choice(3, 0, 30, 2.5), choice(3, 4, 34, 0.5)]
    flat = [choice(2, 0, 20, 8.0), choice(2, 4, 24, 7.5), choice(3, 0, 30, 2.0), choice(3, 4, 34, 1.9)]
    rows = [{"name": name, "weights": 80, "choices": found} for name, found in (("low", low), ("flat", flat))]
    for size, expected in ((44, (low[1], flat[0])), (54, (low[1], flat[2])), (64, (low[3], flat[2]))):
        assert tuple(allocation.to_target(rows, 8 * size / 160).values()) == expected


def test_a_target_out_of_reach_names_the_nearest():
    rows = table(0, 3, [100])
    for target, nearest in ((3.9, "nearest is 4$"), (10.1, "nearest is 10$")):
        with pytest.raises(ValueError, match=nearest):
            allocation.to_target(rows, target)
    assert set(bits(allocation.to_target(rows, 4.0)).values()) == {2}
    assert set(bits(allocation.to_target(rows, 10.0)).values()) == {8}


def test_the_last_rule_that_matches_holds():
    found = allocation.by_rules("mlp.*=3,re:.*\\.1\\..*=4,model.layers.10.mlp.up_proj=8", NAMES, RTN())
    assert found.pop("model.layers.10.mlp.up_proj") == 8
    assert found == {
        **{n: 3 for n in NAMES if ".mlp." in n and n != "model.layers.10.mlp.up_proj"},
        **{n: 4 for n in NAMES if n.startswith("model.layers.1.")},
    }
    # A name is matched whole or from a dot on, and a comma may stand in an expression.
    assert allocation.by_rules("re:model\\.layers\\.\\d{2,3}\\.mlp\\.down_proj=2,q_proj=4", NAMES, RTN()) == {
        "model.layers.10.mlp.down_proj": 2,
        **{n: 4 for n in NAMES if n.endswith("q_proj")},
    }


@pytest.mark.parametrize(
    ("rules", "quantizer", "message"),
    [
        ("_proj=3", RTN(), r"'_proj' matches no layer; there are model.layers.\*.attn.q_proj, model"),
        ("re:down_proj=3", RTN(), "matches no layer"),
        ("re:(=3", RTN(), "is not a regular expression"),
        ("down_proj", RTN(), "is not PATTERN=BITS"),
        ("down_proj=3.5", RTN(), "is not PATTERN=BITS"),
        ("q_proj=3,down_proj=5", GPTQ(), "'down_proj=5': bits = 5 is not offered; allowed: 2, 3, 4, 8"),
        ("down_proj=3", Nf4(), "nf4 has 4 bits"),
    ],
)
def test_a_wrong_rule_is_refused(rules, quantizer, message):
    with pytest.raises(ValueError, match=message):
        allocation.by_rules(rules, NAMES, quantizer)


def test_widths_are_those_a_method_offers():
    assert allocation.widths(GPTQ(bits=3, group_size=32)) == [2, 3, 4, 8]
    assert allocation.widths(Nf4()) == [4]
