"""Adapters stored in int8: trained, loaded by every way, resumed, exported, built upon, counted and refused."""

import json
import shutil

import pytest
import torch
from checks import assert_close, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lrec import checkpoint, load, lora_bits
from lrec.cli import main
from lrec.lora_files import LoraFiles

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
SHORT = ["--num_samples", "8", "--max_length", "32"]
LEARN = ["--lora_r", "8", "--max_length", "32", "--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps"]
WEIGHTS = checkpoint.ADAPTER_WEIGHTS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model `M`, a packed one `Q` with closed-form factors, and adapters on it: `A8` in int8, `A16` in bfloat16."""
    place = tmp_path_factory.mktemp("int8")
    tiny_model(place / "M", intermediate_size=128)
    (place / "text.txt").write_text(TEXT * 200)
    words = ["--model", str(place / "M"), "--bits", "2", "--group_size", "32", "--dataset", str(place / "text.txt")]
    assert main(["quantize", *words, *SHORT, "--output_dir", str(place / "Q")]) == 0
    assert train(place, "A8", "--lora_bits", "8") == train(place, "A16") == 0
    return place


def train(place, name, *words):
    where = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    return main(["train", *where, *LEARN, *words, "--output_dir", str(place / name)])


def evaluated(place, capsys, name):
    where = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    capsys.readouterr()
    assert main(["evaluate", *where, *SHORT, "--adapter", str(place / name), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 49).reshape(2, 24)).logits


def test_it_takes_half_the_bytes_and_says_the_same(place, capsys):
    narrow, wide = evaluated(place, capsys, "A8"), evaluated(place, capsys, "A16")
    saved = (place / "A16" / WEIGHTS).stat().st_size - (place / "A8" / WEIGHTS).stat().st_size
    codes = sum(t.numel() for t in load_file(place / "A8" / WEIGHTS).values() if t.dtype == torch.int8)
    pairs = len(load_file(place / "A16" / WEIGHTS)) // 2
    headers = 8192  # a name more for each half
    assert codes - 2 * pairs * 8 * 4 - headers < saved < codes
    assert wide["total_bytes"] - narrow["total_bytes"] == saved
    assert narrow["bits_per_weight"] == pytest.approx(wide["bits_per_weight"] - 8 * saved / 73728, abs=1e-9)
    assert abs(narrow["kl"] - wide["kl"]) < 5e-3
    assert checkpoint.read_stamp(place / "A8")["lora_bits"] == 8


def test_every_way_to_load_decodes_it(place):
    expected = logits(load.model(str(place / "Q"), str(place / "A8")))
    assert torch.equal(logits(PeftModel.from_pretrained(load.model(str(place / "Q")), place / "A8")), expected)
    base = load.model(str(place / "Q"))
    files = LoraFiles(place / "A8", checkpoint.packed_sha256(base))
    model = load.model(str(place / "Q"), str(place / "A8"))
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            assert_close(files.delta(name), layer.get_delta_weight("default").detach(), 1e-6, name)
    with pytest.raises(ValueError, match="holds int8 factors, which transformers' load_adapter does not decode"):
        base.load_adapter(str(place / "A8"))


def test_a_resumed_run_is_the_straight_run(place):
    shutil.copytree(place / "A8", place / "resumed")
    shutil.rmtree(place / "resumed" / "checkpoint-4")
    assert train(place, "resumed", "--lora_bits", "8", "--resume_from_checkpoint", "true") == 0
    assert (place / "resumed" / WEIGHTS).read_bytes() == (place / "A8" / WEIGHTS).read_bytes()


def test_exports_carry_it(place, tmp_path):
    expected = logits(load.model(str(place / "Q"), str(place / "A8")))
    words = ["export", "--model", str(place / "Q"), "--adapter", str(place / "A8")]
    assert main([*words, "--format", "adapter", "--check", "--output_dir", str(tmp_path / "plain")]) == 0
    held, decoded = load_file(tmp_path / "plain" / WEIGHTS), lora_bits.read(place / "A8" / WEIGHTS)
    assert all(torch.equal(held[key], decoded[key].bfloat16()) for key in decoded) and held.keys() == decoded.keys()
    assert checkpoint.read_stamp(tmp_path / "plain")["lora_bits"] == 16
    assert main([*words, "--format", "merged", "--output_dir", str(tmp_path / "merged")]) == 0
    assert_close(logits(load.model(str(tmp_path / "merged"))), expected, 2e-2)


def test_a_task_on_top_of_it_measures_what_it_stores(place, capsys):
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} and {2 * i}"}) + "\n" for i in range(12)))
    words = ["--objective", "sft", "--model", str(place / "Q"), "--dataset", str(place / "rows.jsonl"), "--lora_r", "4"]
    words += ["--adapter", str(place / "A8"), "--eval_dataset", str(place / "rows.jsonl"), "--max_steps", "3"]
    capsys.readouterr()
    assert main(["train", *words, "--lora_bits", "8", "--json", "--output_dir", str(place / "T")]) == 0
    measured = json.loads(capsys.readouterr().out)["held_out_loss"]
    assert (place / "T/correction" / WEIGHTS).read_bytes() == (place / "A8" / WEIGHTS).read_bytes()
    assert lora_bits.holds_codes(place / "T" / WEIGHTS)
    words = ["--model", str(place / "Q"), "--adapter", str(place / "T"), "--dataset", str(place / "rows.jsonl")]
    assert main(["evaluate", *words, "--rows", "--num_samples", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(measured, rel=1e-6)


def test_damaged_codes_and_other_widths_are_refused(place, tmp_path, capsys):
    shutil.copytree(place / "A8", tmp_path / "A")
    held = load_file(tmp_path / "A" / WEIGHTS)
    del held[next(key for key in held if key.endswith(".scale"))]
    save_file(held, tmp_path / "A" / WEIGHTS)
    with pytest.raises(ValueError, match="is no int8 half of an adapter"):
        load.model(str(place / "Q"), str(tmp_path / "A"))
    assert train(place, "X", "--lora_bits", "4") == 2
    assert "lora_bits = 4 is not offered; allowed: 16, 8" in capsys.readouterr().err
    assert train(place, "X", "--lora_bits", "8", "--lora_pool", "true") == 2
    assert "leave lora_bits at 16" in capsys.readouterr().err
