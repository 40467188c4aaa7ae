"""How many bits each layer gets, and adapters of which rank: by rules on its name, or so that a size is met with the
least error.

Rules (`bits_map`) are PATTERN=BITS parted by commas. A pattern is `re:` and a regular expression for the whole name,
or a glob for the whole name or for its last parts (`down_proj`, `mlp.*`, `model.layers.0.*`). Where several rules
match, the last one holds: general rules first, exceptions behind them.

A target (`target_bpw`) is met greedily: every layer starts at its narrowest width, and the step to more bits that
saves most error per byte is taken, again and again, while it fits. Only steps on the lower convex hull of a layer's
(bytes, error) are considered, so that the gains of a layer fall; then the greedy choice has the least total error of
all choices of its size (Fox, Discrete optimization via marginal analysis, 1966). Where ranks are allocated too, each
width is offered with adapters of several ranks, whose bytes count like those of codes.
"""

import dataclasses
import heapq
import math
import re
from fnmatch import fnmatchcase

from lrec.quantizers import Quantizer

MAX_BITS = 8


def by_rules(bits_map: str, names: list[str], quantizer: Quantizer) -> dict[str, int]:
    """Bits of the layers that a rule matches, by name.

    Raises ValueError for a rule that cannot be read, for one that matches no layer, with the layers there are, and
    for a width that the method has not.
    """
    found: dict[str, int] = {}
    for rule in re.split(r"(?<==\d),", bits_map):
        pattern, sign, bits = rule.strip().rpartition("=")
        if not (pattern and sign and bits.isdigit()):
            raise ValueError(f"bits_map: {rule!r} is not PATTERN=BITS, such as down_proj=3 or re:.*down_proj=3")
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            raise ValueError(f"bits_map: {pattern!r} matches no layer; there are {', '.join(kinds)}")
        try:
            found |= dict.fromkeys(hits, with_bits(quantizer, int(bits)).bits)
        except ValueError as error:
            raise ValueError(f"bits_map: {rule!r}: {error}") from error
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern means the layer of this full name. Raises ValueError for a broken expression."""
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise ValueError(f"bits_map: {pattern!r} is not a regular expression ({error})") from error


def with_bits(quantizer: Quantizer, bits: int) -> Quantizer:
    """The same settings at another width. Raises ValueError for a width that the method has not."""
    return quantizer if bits == quantizer.bits else dataclasses.replace(quantizer, bits=bits)


def widths(quantizer: Quantizer) -> list[int]:
    """The widths that a method offers with these settings, ascending."""
    found = []
    for bits in range(1, MAX_BITS + 1):
        try:
            found.append(with_bits(quantizer, bits).bits)
        except ValueError:
            continue
    return found


def ranks_to(most: int) -> list[int]:
    """The ranks that are offered up to `most`: 0, 4, 8, 16 ... and `most` itself."""
    return [0, *(2**i for i in range(2, most.bit_length()) if 2**i < most), most]


def to_target(table: list[dict], target_bpw: float) -> dict[str, dict]:
    """The choice of each layer, by name: the least total error at `target_bpw` stored bits per weight or less.

    A row of the table is a layer: `name`, `weights`, and `choices`, each with `bytes`, `error` and what it stands for
    (`bits`, `rank`); errors of different layers must add up. Raises ValueError with the nearest size that can be
    reached if the target cannot.
    """
    weights = sum(row["weights"] for row in table)
    hulls = [hull(row["choices"]) for row in table]
    least, most = (sum(choices[end]["bytes"] for choices in hulls) for end in (0, -1))
    # Sizes are whole bytes: the rest is the rounding of a target that was computed.
    budget, used = target_bpw * weights / 8 * (1 + 1e-12), least
    if not least <= budget <= most * (1 + 1e-9):
        low, high = math.ceil(8e4 * least / weights) / 1e4, math.floor(8e4 * most / weights) / 1e4
        raise ValueError(
            f"target_bpw = {target_bpw:g} cannot be reached: with these settings layers take {low:g} to {high:g} "
            f"stored bits per weight; the nearest is {low if budget < least else high:g}"
        )
    level = [0] * len(table)
    steps: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        if level[layer] + 1 < len(hulls[layer]):
            heapq.heappush(steps, (-gain(*hulls[layer][level[layer] :][:2]), layer))

    for layer in range(len(table)):
        offer(layer)
    while steps:
        _, layer = heapq.heappop(steps)
        now, wider = hulls[layer][level[layer] :][:2]
        if used + wider["bytes"] - now["bytes"] <= budget:
            used += wider["bytes"] - now["bytes"]
            level[layer] += 1
            offer(layer)
    return {row["name"]: choices[i] for row, choices, i in zip(table, hulls, level, strict=True)}


def hull(choices: list[dict]) -> list[dict]:
    """The choices on the lower convex hull of (bytes, error), from the fewest bytes to the least error."""
    kept: list[dict] = []
    for choice in sorted(choices, key=lambda choice: (choice["bytes"], choice["error"])):
        if kept and choice["error"] >= kept[-1]["error"]:
            continue
        while len(kept) > 1 and gain(kept[-2], kept[-1]) <= gain(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def gain(a: dict, b: dict) -> float:
    """Error saved per byte by going from choice a to b."""
    return (a["error"] - b["error"]) / (b["bytes"] - a["bytes"])
