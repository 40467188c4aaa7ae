"""The pictures of `lrec report`, as SVG to be put into a page: drawn by matplotlib, which is the extra `plots`.

They are as wide as a phone and scale with the page, so that their letters stay as large as the text around them.
"""

import re
from collections.abc import Callable
from io import BytesIO

WIDTH, HEIGHT = 3.9, 2.7  # inches; a phone is as wide as 1.3 pixels for each point of that
FONT_POINTS, SMALL_POINTS = 9, 7.5
MB = 1e6


def figure(name: str, title: str, draw: Callable, height: float = HEIGHT) -> str:
    """What `draw(axes)` draws, as a <figure> of an <svg> and its title; `name` keeps its ids apart from others'."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": FONT_POINTS}):
        drawing = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = drawing.subplots()
        axes.grid(True, linewidth=0.3, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = BytesIO()
        drawing.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    drawn = file.getvalue().decode()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', drawn, count=1)
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    return f"<figure>{drawn}<figcaption>{title}</figcaption></figure>"


def layer_errors(layers: list[dict]) -> str:
    """Each kind of layer over the blocks: its error when quantized, and, dashed, with the factors that correct it."""

    def draw(axes) -> None:
        for kind, rows in by_kind(layers).items():
            blocks = [block_of(row["name"]) for row in rows]
            (line,) = axes.plot(blocks, [error_of(row) for row in rows], label=kind, linewidth=1)
            if all(row.get("corrected_error") is not None for row in rows):
                after = [row["corrected_error"] for row in rows]
                axes.plot(blocks, after, "--", color=line.get_color(), linewidth=0.8)
        axes.set(xlabel="block", ylabel="error of the layer's output", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.figure.legend(
            loc="outside upper center", ncols=4, fontsize=SMALL_POINTS, columnspacing=1, handlelength=1, frameon=False
        )

    return figure("layers", "Error of each kind of layer over the blocks", draw, height=3.3)


def block_errors(rows: list[dict]) -> str:
    """How far each block's output is from the full-precision model's, for each of the models."""

    def draw(axes) -> None:
        for name in rows[0]:
            if name != "block":
                axes.plot([row["block"] for row in rows], [row[name] for row in rows], "o-", markersize=2, label=name)
        axes.set(xlabel="block", ylabel="relative error of its output", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=SMALL_POINTS, frameon=False)

    return figure("blocks", "Error of the output of each block", draw)


def training(history: list[dict], evaluations: list[dict], term: str, title: str) -> str:
    """A term of the loss over the steps, as logged while training, and on held-out text if that was measured."""

    def draw(axes) -> None:
        for rows, key, label in ((history, term, "training"), (evaluations, f"eval_{term}", "held out")):
            told = [row for row in rows if key in row]
            if told:
                axes.plot([r["step"] for r in told], [r[key] for r in told], "o-", markersize=2, label=label)
        axes.set(xlabel="step", ylabel="nats per token", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=SMALL_POINTS, frameon=False)

    return figure(f"training-{term}", title, draw)


def memory(name: str, curve: dict, predicted: list[dict]) -> str:
    """Memory over time, and beside it the predicted parts, one on the other."""
    from matplotlib import colormaps

    def draw(axes) -> None:
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        axes.fill_between(curve["seconds"], [n / MB for n in curve["bytes"]], color="0.75", label="measured")
        end, floor = max(curve["seconds"]), 0.0
        for row in sorted(predicted, key=lambda row: -row["bytes"]):
            part = f"{row['part']}, {row['bytes'] / MB:.3g}"
            axes.bar(1.12 * end, row["bytes"] / MB, 0.14 * end, bottom=floor, label=part)
            floor += row["bytes"] / MB
        if predicted:
            axes.axhline(floor, color="black", linewidth=0.8, linestyle=":", label=f"predicted peak, {floor:.4g}")
        axes.set(xlabel="seconds", ylabel="MB above the start", xlim=(0, None), ylim=(0, None))
        axes.figure.legend(
            loc="outside lower center", ncols=2, fontsize=SMALL_POINTS, columnspacing=1, handlelength=1, frameon=False
        )

    return figure(f"memory-{name}", f"Memory of {name} over time", draw, height=2.9 + 0.09 * len(predicted))


def stored(rows: list[dict]) -> str:
    """Where the bytes went, a bar for each kind."""

    def draw(axes) -> None:
        names = [row["what"] for row in reversed(rows)]
        bars = axes.barh(names, [row["bytes"] / MB for row in reversed(rows)], color="tab:blue")
        axes.bar_label(bars, fmt="%.3g", padding=2)
        axes.margins(x=0.15)
        axes.grid(False)
        axes.set(xlabel="MB on disk")

    return figure("bytes", "Bytes on disk by what they hold", draw, height=0.9 + 0.26 * len(rows))


def by_kind(layers: list[dict]) -> dict[str, list[dict]]:
    """Layers of the blocks that have an error, by the last part of their names."""
    found: dict[str, list[dict]] = {}
    for row in layers:
        if error_of(row) is not None and block_of(row["name"]) is not None:
            found.setdefault(row["name"].rpartition(".")[2], []).append(row)
    return found


def error_of(row: dict) -> float | None:
    """A layer's error: on its inputs, or without any that of its weight."""
    return row.get("error", row.get("weight_error"))


def block_of(name: str) -> int | None:
    """The number of the block that a layer is in, from its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
