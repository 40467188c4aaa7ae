"""Quality against size as a picture: KL to full precision, on a log axis, over bits per weight.

Drawn with matplotlib, which is the extra `plots`. A method's widths share a colour and a line; every point carries
its method's name, at the first place near it that covers no other label or point.
"""

import re
from importlib.util import find_spec
from pathlib import Path

# Offsets of a label from its point, in points of type, the best first; the far ones get a line to the point.
NEAR = [(7, 0), (-7, 0), (0, 7), (0, -7), (6, 6), (6, -6), (-6, 6), (-6, -6)]
FAR = [(x, y) for y in (18, -18, 30, -30, 42, -42) for x in (14, -14, 40, -40)]
LINE = 40  # characters of a label's line
DOT = 5  # half the side of a point's square, in pixels


def draw(rows: list[dict], directory: Path) -> str:
    """Writes quality.svg and quality.png from the rows that have a `kl` and `bits_per_weight`.

    Returns where the picture is, or why there is none.
    """
    points = sorted((row for row in rows if row.get("kl") and row.get("bits_per_weight")), key=place)
    if not points:
        return "none: no row has a KL"
    if find_spec("matplotlib") is None:
        return "none: matplotlib is missing, pip install 'lrec[plots]'"
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    series: dict[tuple, list[dict]] = {}
    for row in points:
        method, *parts = row["method"].split(":")
        series.setdefault((method, *(part for part in parts if "=" in part)), []).append(row)
    for some in series.values():
        axes.plot(*zip(*map(place, some), strict=True), "o-", markersize=5, linewidth=0.8)
    axes.set(xlabel="stored bits per weight", ylabel="KL to full precision, nats per token", yscale="log")
    axes.margins(0.12)
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    figure.draw_without_rendering()
    add_labels(axes, points)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        for kind in ("svg", "png"):
            figure.savefig(directory / f"quality.{kind}", dpi=150)
    return str(directory / "quality.svg")


def place(row: dict) -> tuple[float, float]:
    """Where a row stands in the picture."""
    return float(row["bits_per_weight"]), float(row["kl"])


def add_labels(axes, points: list[dict]) -> None:
    """Writes each point's method beside it, inside the axes and over no other label or point where that can be."""
    dots = [axes.transData.transform(place(row)) for row in points]
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    frame = axes.get_window_extent().extents
    for row in points:
        tries = []
        for x, y in NEAR + FAR:
            note = axes.annotate(
                broken(row["method"]),
                place(row),
                (x, y),
                textcoords="offset points",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3},
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey"} if (x, y) in FAR else None,
            )
            box = text_box(note)
            tries.append((overlap(box, frame, taken), len(tries), note, box))
            if not tries[-1][0]:
                break
        best = min(tries, key=lambda a_try: a_try[:2])
        for _, _, note, _ in tries:
            if note is not best[2]:
                note.remove()
        taken.append(best[3])


def broken(name: str) -> str:
    """A name in lines of about `LINE` characters, broken behind colons."""
    lines = [""]
    for part in re.split("(?<=:)", name):
        if lines[-1] and len(lines[-1] + part) > LINE:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def text_box(note) -> tuple[float, ...]:
    """(left, bottom, right, top) in pixels of an annotation's text, its line to the point left out."""
    from matplotlib.text import Text

    note.get_window_extent()  # puts the text in its place; what it returns has the line in it
    return tuple(Text.get_window_extent(note).extents)


def overlap(box: tuple, frame: tuple, taken: list[tuple]) -> float:
    """Pixels of the box (left, bottom, right, top) that lie outside the frame or on boxes that are taken."""

    def common(a: tuple, b: tuple) -> float:
        return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    return common(box, box) - common(box, frame) + sum(common(box, other) for other in taken)
