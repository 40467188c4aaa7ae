"""`lrec report` on real runs of a tiny model: the page loads nothing, has all sections and tells the JSON's numbers."""

import contextlib
import json
import re
from html.parser import HTMLParser

import pytest
from checks import tiny_model

from lrec import checkpoint, logbook, memory_curve, progress, run_report
from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
SECTIONS = ("configuration", "layers", "training", "memory", "bytes", "quality", "samples")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model `M`, a text, a packed model `Q` and an adapter `A` made with evaluations, with their reports."""
    place = tmp_path_factory.mktemp("report")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 200)
    text = ["--dataset", str(place / "text.txt"), "--max_length", "32"]
    quantize = ["--model", str(place / "M"), "--bits", "2", "--group_size", "32", "--num_samples", "8"]
    quantize += [*text, "--output_dir", str(place / "Q")]
    train = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--lora_r", "4", "--max_steps", "6"]
    train += ["--eval_steps", "3", "--eval_samples", "2", "--logging_steps", "1"]
    train += [*text, "--output_dir", str(place / "A")]
    with pytest.MonkeyPatch.context() as patch, (place / "log").open("w") as log, contextlib.redirect_stderr(log):
        patch.setattr(progress, "LINE_S", 0.0)  # a line is due at every step
        assert main(["quantize", *quantize]) == 0
        assert main(["train", *train]) == 0
    evaluate = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--num_samples", "2", "--record"]
    assert main(["evaluate", *evaluate, *text]) == 0
    assert main(["report", str(place / "A"), "--samples", "2"]) == 0
    assert main(["report", str(place / "Q"), "--output_dir", str(place / "R")]) == 0
    return place


class Page(HTMLParser):
    """A page taken apart: what it would load, its sections, and its tables as lists of rows by their caption."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.sections, self.tables, self.open, self.text = [], [], {}, [], ""
        self.ids, self.references = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.references += [v[1:] for k, v in attrs if k in ("href", "xlink:href") and v.startswith("#")]
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.text = ""
        if tag == "section":
            self.sections.append(found["id"])
        if tag == "tr":
            self.row = []
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"<{tag}> is closed where it is not open"
        if tag == "caption":
            self.rows = self.tables.setdefault(self.text, [])
        if tag in ("td", "th"):
            self.row.append(self.text)
        if tag == "tr":
            self.rows.append(self.row)


def told(path):
    return json.loads((path / run_report.DATA).read_text())


def test_the_page_is_whole_and_loads_nothing(place):
    for path in (place / "A", place / "R"):
        page = Page(path / run_report.PAGE)
        assert page.open == [] and tuple(page.sections) == SECTIONS
        assert page.loads and not [load for load in page.loads if not load.startswith(("#", "data:,"))]
        raw = (path / run_report.PAGE).read_text(encoding="utf-8")
        assert not any(word in raw for word in ("<script", "@import", "url(http", "NaN", "Undefined"))
        assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
        assert "width=device-width" in raw and "overflow-x: auto" in raw


def test_tables_tell_the_numbers_of_the_json(place):
    found, page = told(place / "A"), Page(place / "A" / run_report.PAGE)
    tables = {
        "Each packed layer": found["layers"],
        "Error of each block’s output": found["blocks"],
        "While training": found["training"]["history"],
        "On held-out text": found["training"]["evaluations"],
        "Predicted for lrec train": found["memory"][1]["predicted"],
        "Where the bytes on disk went": found["bytes"],
        "Measured by lrec evaluate --record": found["quality"],
    }
    for caption, rows in tables.items():
        head, *shown = page.tables[caption]
        assert len(shown) == len(rows) > 0, caption
        for cells, row in zip(shown, rows, strict=True):
            for name, cell in zip(head, cells, strict=True):
                value = row[name.replace(" ", "_")] if name.replace(" ", "_") in row else row[name]
                told_as = f"{value:.4g}" if isinstance(value, float) else str(value)
                assert cell.replace("\u202f", "") == told_as, (caption, name)


def test_the_json_tells_what_the_runs_left(place):
    found = told(place / "A")
    report = checkpoint.read_json(place / "Q" / "lrec_report.json")
    stamp = checkpoint.read_json(place / "A" / checkpoint.ADAPTER_STAMP)
    assert found["layers"] == report["layers"] and len(found["layers"]) == 14
    assert all(0 < row["corrected_error"] < row["error"] for row in found["layers"])
    assert found["training"]["history"] == stamp["history"] and len(stamp["history"]) == 6
    assert [row["step"] for row in found["training"]["evaluations"]] == [3, 6]
    assert found["memory"][1]["predicted"] == stamp["parts"]
    assert sum(row["bytes"] for row in found["memory"][0]["predicted"]) > 0
    quantize, train = found["settings"]
    assert (quantize["verb"], train["verb"]) == ("quantize", "train")
    assert quantize["settings"]["bits"] == 2 and quantize["settings"]["group_size"] == 32
    assert train["settings"]["lora_r"] == 4 and train["settings"]["max_steps"] == 6
    assert "dataloader_num_workers" not in train["settings"]  # trl's, as it was


def test_stored_bytes_add_up_to_the_files(place):
    bytes_of = {row["what"]: row["bytes"] for row in told(place / "A")["bytes"]}
    layers = told(place / "A")["layers"]
    assert bytes_of["codes"] + bytes_of["scales, zeros and tables"] == sum(row["bytes"] for row in layers)
    headers = 0
    for path in (place / "Q").glob("model-*.safetensors"):
        headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    tensors = sum(path.stat().st_size for path in (place / "Q").glob("model-*.safetensors")) - headers
    whole_files = ("adapters", "factors to start adapters from", "trained scales and zeros")
    assert sum(n for what, n in bytes_of.items() if what not in whole_files) == tensors
    assert bytes_of["adapters"] == (place / "A" / "adapter_model.safetensors").stat().st_size


def test_samples_and_blocks_are_of_each_model(place):
    found = told(place / "A")
    assert len(found["samples"]) == 2
    assert all(list(row) == ["prompt", "full precision", "packed", "corrected"] for row in found["samples"])
    assert [row["block"] for row in found["blocks"]] == [0, 1]
    # The closed-form start and six steps bring the first block's output nearer.
    assert 0 < found["blocks"][0]["corrected"] < found["blocks"][0]["packed"]


def test_a_log_tells_blocks_and_steps_with_the_time_left(place):
    log = (place / "log").read_text()
    assert re.search(r"^quantize, 2 bits: block 2 of 2, \S+ left$", log, re.M)
    assert re.search(r"^train: step 6 of 6, \S+ left, .*kl=\d", log, re.M)
    assert "{'loss'" not in log  # what transformers prints by itself


def test_memory_is_told_over_the_time_of_a_run(place):
    for name in ("Q", "A"):
        book = logbook.read(place / name)
        seconds, sizes = book["memory"]["seconds"], book["memory"]["bytes"]
        assert len(seconds) == len(sizes) > 0 and seconds == sorted(seconds)
    peak = checkpoint.read_json(place / "A" / checkpoint.ADAPTER_STAMP)["measured_peak_bytes"]
    assert max(sizes) <= 1.05 * peak + 2**20


def test_neighbours_in_a_long_curve_are_joined_and_keep_the_largest(monkeypatch):
    monkeypatch.setattr(memory_curve, "SAMPLE_S", 0)
    values, points = iter(range(10_000)), []

    class Stop:
        count = 0

        def wait(self, _):
            self.count += 1
            return self.count == 1000

    memory_curve.sample(points, lambda: next(values), Stop())
    assert len(points) < memory_curve.MOST_POINTS
    assert points[-1][1] == 1000 and [n for _, n in points] == sorted(n for _, n in points)


def test_what_is_no_run_is_refused_with_the_next_step(place, capsys):
    assert main(["report", str(place / "M")]) == 2
    assert "output_dir of `lrec quantize` or `lrec train`" in capsys.readouterr().err
    (place / "file").write_text("")
    assert main(["report", str(place / "A"), "--output_dir", str(place / "file")]) == 2
    assert "name a path that may be used" in capsys.readouterr().err
    moved = place / "moved"
    (place / "Q").rename(moved)
    try:
        assert main(["report", str(place / "A")]) == 2
        assert "--model DIRECTORY" in capsys.readouterr().err
        assert main(["report", str(place / "A"), "--model", str(moved), "--output_dir", str(place / "R2")]) == 0
    finally:
        moved.rename(place / "Q")
