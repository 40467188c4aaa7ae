"""`make peers` without the peers: their files have what the driver asks of them, bytes are counted, and finished rows
become the table, the JSON and the picture, with those that failed or that a peer does not have."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from checks import tiny_model

from lrec import checkpoint
from peers import PEERS, WIDTHS, __main__, measure, ours, rows, sizes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_well_formed(name):
    peer = importlib.import_module(f"peers.{name}")
    assert peer.__doc__ and peer.SETTINGS
    assert set(peer.ABSENT) < set(WIDTHS) and all(peer.ABSENT.values())
    assert list(inspect.signature(peer.quantize).parameters) == ["source", "bits", "ids", "folder"]
    assert list(inspect.signature(peer.load).parameters) == ["folder", "dtype"]
    locks = "".join((ROOT / place / "requirements.lock").read_text() for place in ("", "peers"))
    assert re.search(rf"^{peer.PACKAGE}==\S+$", locks, re.MULTILINE)


def test_every_file_of_the_folder_is_a_peer_or_the_driver():
    files = {path.stem for path in (ROOT / "peers").glob("*.py")}
    assert files == {*PEERS, "__init__", "__main__", "measure", "ours", "rows", "sizes"}


@pytest.mark.parametrize("path", sorted((ROOT / "peers").glob("*.py")), ids=lambda path: path.stem)
def test_what_is_imported_of_lrec_inside_functions_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "lrec":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name


def test_a_command_line_of_ours_runs_once_and_tells_its_report(tmp_path):
    tiny_model(tmp_path / "M")
    command = f"quantize --model {tmp_path / 'M'} --method rtn --bits 4 --group_size 32 --output_dir {tmp_path / 'Q'}"
    told = measure.lrec(command)
    written = (tmp_path / "Q" / checkpoint.MANIFEST).stat().st_mtime_ns
    assert told["seconds"] > 0 and measure.lrec(command) == told
    assert (tmp_path / "Q" / checkpoint.MANIFEST).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="bits = 5 is not offered"):
        measure.lrec(command.replace("--bits 4", "--bits 5").replace("/Q", "/R"))


def test_every_peer_has_a_row_of_every_width_and_adapters_where_it_has_a_model():
    labels = {label.text: label for label in rows.labels()}
    assert len(labels) == len(rows.labels())
    for peer in PEERS:
        for bits in WIDTHS:
            base = labels[f"{peer}:{bits}"]
            adapted = labels.get(base.text + ":lora_r=16")
            assert (adapted is None) == (base.absent is not None)
            if adapted:
                assert adapted.absent == getattr(adapted.peer, "NO_LORA", None)
    assert {row.label for row in ours.ROWS} < set(labels)
    assert len({label.place for label in labels.values()}) == len(labels)


def test_a_row_with_other_settings_is_another_row(monkeypatch):
    before = {label.text: label.place for label in rows.labels()}
    monkeypatch.setattr(ours, "TRAIN", ours.TRAIN.replace("--max_steps 64", "--max_steps 32"))
    monkeypatch.setitem(rows.LORA, "lora_alpha", 32)
    changed = {label.text for label in rows.labels() if label.place != before[label.text]}
    assert changed == {text for text in before if text.startswith("lrec:") or ":lora_r" in text}


@pytest.mark.parametrize("text", ["gptq:2", "hqq", "hqq:two", "lrec:5", "hqq:2:lora_r=16:more"])
def test_a_name_of_no_row_is_refused(text):
    with pytest.raises(ValueError, match="names no row; rows are full precision, lrec:2"):
        rows.Label(text)


def test_bytes_of_quantized_layers_and_of_the_rest_are_counted_apart(tmp_path):
    stored = {
        "model.layers.1.mlp.up.weight": torch.zeros(10, dtype=torch.uint8),
        "model.layers.1.mlp.up.weight.absmax": torch.zeros(3, dtype=torch.bfloat16),
        "model.layers.10.mlp.up.scale": torch.zeros(5, dtype=torch.float32),
        "model.layers.1.norm.weight": torch.zeros(7, dtype=torch.bfloat16),
        "model.embed.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
    }
    path = tmp_path / "deeper" / "model.safetensors"
    path.parent.mkdir()
    checkpoint.write_tensors(path, stored)
    weights = {"model.layers.1.mlp.up": 40, "model.layers.10.mlp.up": 60}
    found = sizes.size(tmp_path, sizes.tensors(tmp_path), weights, adapter_bytes=9)
    assert found == {
        "bits_per_weight": 8 * (10 + 6 + 20 + 9) / 100,
        "total_bytes": path.stat().st_size + 9,
        "unquantized_bytes": 14 + 64,
        "adapter_bytes": 9,
    }


def row(method: str, total_bytes: int, kl: float) -> dict:
    return {"method": method, "bits_per_weight": total_bytes / 40, "total_bytes": total_bytes, "kl": kl}


def test_a_peer_stands_beside_the_best_of_ours_that_takes_no_more_bytes():
    table = [row("lrec:2", 90, 0.8), row("lrec:3", 100, 0.3), row("lrec:4", 111, 0.1), {"method": "lrec:8"}]
    beside = {total: __main__.shown(row("hqq:3", total, 0.5), table) for total in (89, 90, 110, 111)}
    assert [cells["lrec_row"] for cells in beside.values()] == [None, "lrec:2", "lrec:3", "lrec:4"]
    assert [cells["lrec_kl"] for cells in beside.values()] == [None, 0.8, 0.3, 0.1]
    assert __main__.shown(row("lrec:4", 111, 0.1), table)["lrec_row"] is None


def test_finished_rows_become_table_json_and_picture_and_a_failure_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'hqq', asked $3\"\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    some = [label for label in rows.labels() if re.match("full|hqq:2|quanto|lrec:4", label.text)]
    monkeypatch.setattr(__main__, "labels", lambda: some)
    for number, label in enumerate(some):
        if not label.absent and label.text != "hqq:2":
            label.place.mkdir(parents=True)
            label.row.write_text(json.dumps(row(label.text, 80 + number, 1 / (1 + number))))
    (tmp_path / "data/results").mkdir(parents=True)
    assert __main__.main([]) == 1
    told = capsys.readouterr().out
    found = json.loads((tmp_path / __main__.RESULTS).read_text())["rows"]
    assert [made["method"] for made in found] == [label.text for label in some]
    errors = {made["method"]: made["error"] for made in found if "error" in made}
    assert set(errors) == {"quanto:3", "hqq:2"}
    assert errors["hqq:2"].startswith("ModuleNotFoundError: No module named 'hqq', asked hqq:2 (exit code 1")
    assert all(error in told for error in errors.values())
    svg = (tmp_path / "runs/peers/quality.svg").read_text()
    assert "lrec:4:group_size=128" in svg and "quanto:2:lora_r=16" in svg and "hqq:2<" not in svg
