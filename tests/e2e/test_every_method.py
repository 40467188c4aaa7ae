"""Every quantizer, found by itself, through the whole job by the command line: what a new file in `lrec/quantizers`
must stand. With them every format trains, reloads bit for bit and is told of by `explain`."""

import json

import pytest
import torch
from checks import tiny_model

from lrec import checkpoint, load, registry
from lrec.cli import main
from lrec.nn import PackedLinear

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
METHODS = registry.names("quantizers")
FORMATS = set()  # seen by the tests of methods


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M` and a text file."""
    place = tmp_path_factory.mktemp("methods")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 200)
    return place


def told(capsys, *words) -> dict:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_through_the_whole_job(place, tmp_path, capsys, method):
    data = ("--dataset", place / "text.txt", "--num_samples", "8", "--max_length", "32")
    base, adapter = tmp_path / "Q", tmp_path / "A"
    report = told(capsys, "quantize", "--model", place / "M", "--method", method, *data, "--output_dir", base)
    training = ("--max_steps", "6", "--learning_rate", "5e-3", "--lora_r", "4", "--save_strategy", "no")
    told(capsys, "train", "--model", base, "--teacher", place / "M", *data, *training, "--output_dir", adapter)
    quality = ("evaluate", "--teacher", place / "M", *data, "--model")
    alone, corrected = told(capsys, *quality, base), told(capsys, *quality, base, "--adapter", adapter)
    assert corrected["kl"] < alone["kl"]
    assert alone["bits_per_weight"] == pytest.approx(report["bits_per_weight"])

    model = load.model(str(base))
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    FORMATS.update(registry.name_of(type(module.packed)) for module in packed.values())
    explained = told(capsys, "explain", "--model", base)["layers"]
    for case in {(row["rows"], row["direction"]) for row in explained}:
        rows = [row for row in explained if (row["rows"], row["direction"]) == case]
        assert sum(row["layers"] for row in rows) == len(packed) == 14 and all(row["kernel"] for row in rows)
    assert {row["direction"] for row in explained} == {"forward", "backward"}
    model.save_pretrained(tmp_path / "again")
    again, ids = load.model(str(tmp_path / "again")), torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert checkpoint.packed_sha256(again) == checkpoint.packed_sha256(model)


def test_the_methods_fill_every_format():
    imported_only, while_training = {"indexed"}, {"latent"}
    missing = set(registry.names("formats")) - FORMATS - imported_only - while_training
    assert not missing, f"no method of lrec/quantizers packs into {missing}"
