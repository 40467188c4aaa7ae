"""The picture of a comparison: every method is in it, and no label lies on another or outside."""

import re

import pytest

from lrec import picture


def rows(points):
    return [{"method": name, "bits_per_weight": x, "kl": y} for name, x, y in points]


def test_crowded_labels_do_not_overlap(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    points = rows([(f"method{i}:2:group_size=128", 2.25 + 0.01 * (i % 4), 1.0 + 0.05 * i) for i in range(9)])
    axes = Figure(figsize=(9, 6)).subplots()
    axes.plot([1, 4], [0.05, 9])
    axes.set_yscale("log")
    axes.figure.draw_without_rendering()
    picture.add_labels(axes, points)
    frame = axes.get_window_extent().extents
    boxes = [picture.text_box(text) for text in axes.texts]
    assert len(boxes) == len(points)
    for i, box in enumerate(boxes):
        assert picture.overlap(box, frame, boxes[:i] + boxes[i + 1 :]) == 0, points[i]


def test_a_long_name_is_broken_behind_colons():
    name = "gptq:2:group_size=128:zero_point=float:scale_bits=8:train=scales,zeros"
    assert picture.broken(name).split("\n") == [
        "gptq:2:group_size=128:zero_point=float:",
        "scale_bits=8:train=scales,zeros",
    ]
    assert picture.broken("x" * 50) == "x" * 50


def test_overlap_counts_pixels_outside_and_on_others():
    assert picture.overlap((0, 0, 10, 4), (0, 0, 20, 20), []) == 0
    assert picture.overlap((-3, 0, 7, 4), (0, 0, 20, 20), []) == 12
    assert picture.overlap((0, 0, 10, 4), (0, 0, 20, 20), [(8, 2, 12, 9), (10, 0, 12, 4)]) == 4


def test_rows_with_a_kl_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    points = rows([("rtn:2", 2.3, 5.0), ("rtn:3", 3.3, 0.9), ("nf4", 4.1, 0.1)])
    odd = [{"method": "bad:2", "error": "no"}, {"method": "odd", "kl": 1.0, "bits_per_weight": None}]
    assert picture.draw([*points, *odd], tmp_path) == str(tmp_path / "quality.svg")
    svg = (tmp_path / "quality.svg").read_text()
    assert [name in svg for name in ("rtn:2", "rtn:3", "nf4", "bad")] == [True, True, True, False]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert re.match("none: no row", picture.draw([{"method": "bad:2", "error": "no"}], tmp_path))


def test_without_matplotlib_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    assert "pip install 'lrec[plots]'" in picture.draw(rows([("rtn:2", 2.3, 5.0)]), tmp_path)
    assert not any(tmp_path.iterdir())
