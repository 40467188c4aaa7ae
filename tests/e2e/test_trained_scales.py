"""Scales and zeros trained by the command line and by the trainer: saved, loaded, resumed, exported, refused."""

import json
import shutil

import pytest
import torch
from checks import assert_close, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lrec
from lrec import checkpoint, load, trained
from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
SHORT = ["--num_samples", "8", "--max_length", "32"]
WHAT = {"S": "scales,zeros", "A": "all", "C": "all,codes"}
STEPS = ["--max_steps", "6", "--save_steps", "3", "--learning_rate", "5e-3", "--scales_learning_rate", "1e-2",
         "--codes_reach", "1.5"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M`, a packed one `Q`, text, and what training it made by its name."""
    place = tmp_path_factory.mktemp("trained")
    tiny_model(place / "M", intermediate_size=128)
    (place / "text.txt").write_text(TEXT * 200)
    words = ["--model", str(place / "M"), "--bits", "2", "--group_size", "32", "--dataset", str(place / "text.txt")]
    assert main(["quantize", *words, *SHORT, "--output_dir", str(place / "Q")]) == 0
    for name, what in WHAT.items():
        assert train(place, name, what) == 0
    return place


def train(place, name, what, *words):
    where = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    settings = ["--train", what, "--lora_r", "8", "--max_length", "32", "--save_strategy", "steps"]
    return main(["train", *where, *settings, *STEPS, *words, "--output_dir", str(place / name)])


def report(place, capsys, *words):
    capsys.readouterr()
    where = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    assert main(["evaluate", *where, *SHORT, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits(model):
    ids = torch.arange(1, 49).reshape(2, 24)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", WHAT)
def test_training_helps_and_the_report_counts_every_byte(place, name, capsys):
    before, after = report(place, capsys), report(place, capsys, "--adapter", str(place / name))
    if name != "C":  # six steps that move codes as far as to the next one are too few to help
        assert after["kl"] < before["kl"]
    held = [place / name / "base_tensors.safetensors", place / name / "adapter_model.safetensors"]
    added = [path.stat().st_size for path in held if path.exists()]
    assert len(added) == (1 if name == "S" else 2)
    assert after["total_bytes"] == before["total_bytes"] + sum(added)
    model, base = load.model(str(place / "Q"), str(place / name)), load.model(str(place / "Q"))
    layers = trained.layers_of(model).values()
    same = [
        torch.equal(new.qweight, old.qweight) for new, old in zip(layers, trained.layers_of(base).values(), strict=True)
    ]
    assert not any(same) if name == "C" else all(same)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.packed.nbytes for layer in layers) + (added[1] if name != "S" else 0)
    assert after["bits_per_weight"] == 8 * stored / weights
    assert all(layer.packed.zero.dtype == layer.packed.scale.dtype == torch.uint8 for layer in layers)


@pytest.mark.parametrize("name", WHAT)
def test_loading_gives_the_logits_of_the_trained_model_bit_for_bit(place, name):
    """Every way to load: ours, peft's, and by hand from the files."""
    expected = logits(load.model(str(place / "Q"), str(place / name)))
    base = AutoModelForCausalLM.from_pretrained(place / "Q", dtype=torch.float32)
    plain = logits(base)
    for key, tensor in load_file(place / name / "base_tensors.safetensors").items():
        layer, _, field = key.rpartition(".")
        base.get_submodule(layer).become(base.get_submodule(layer).packed.updated({field: tensor}))
    if name != "S":
        for layer in trained.layers_of(base).values():
            assert not layer.trained
        other = AutoModelForCausalLM.from_pretrained(place / "Q", dtype=torch.float32)
        assert torch.equal(logits(PeftModel.from_pretrained(other, place / name)), expected)
        base = PeftModel.from_pretrained(base, place / name)
    assert torch.equal(logits(base), expected)
    assert not torch.equal(plain, expected)


def test_what_is_saved_is_what_the_trainer_held(place, tmp_path):
    shutil.copytree(place / "Q", tmp_path / "Q")
    seen = {}
    settle = trained.settle

    def spy(model, scale_bits=None):
        settle(model, scale_bits)
        seen["logits"] = logits(model.eval())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "settle", spy)
        assert train(place, "again", "scales,zeros") == 0
    assert torch.equal(seen["logits"], logits(load.model(str(place / "Q"), str(place / "again"))))
    assert torch.equal(seen["logits"], logits(load.model(str(place / "Q"), str(place / "S")))), "one seed, one result"


@pytest.mark.parametrize("name", WHAT)
def test_a_resumed_run_is_the_straight_run(place, name, tmp_path):
    shutil.copytree(place / name, place / f"{name}-resumed")
    resumed = place / f"{name}-resumed"
    shutil.rmtree(resumed / "checkpoint-6")
    assert train(place, resumed.name, WHAT[name], "--resume_from_checkpoint", "true") == 0
    for file in ("base_tensors.safetensors", *(["adapter_model.safetensors"] if name != "S" else [])):
        first, second = load_file(place / name / file), load_file(resumed / file)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), file
    kept = load_file(place / name / "checkpoint-3" / "base_tensors.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["A", "C"])
def test_a_merged_export_and_an_exported_adapter_carry_them(name, place, tmp_path):
    expected = logits(load.model(str(place / "Q"), str(place / name)))
    words = ["export", "--model", str(place / "Q"), "--adapter", str(place / name)]
    assert main([*words, "--format", "merged", "--output_dir", str(tmp_path / "merged")]) == 0
    assert_close(logits(load.model(str(tmp_path / "merged"))), expected, 2e-2)
    assert main([*words, "--format", "adapter", "--output_dir", str(tmp_path / "adapter")]) == 0
    assert torch.equal(logits(load.model(str(place / "Q"), str(tmp_path / "adapter"))), expected)
    assert main([*words, "--format", "gguf-lora", "--output_dir", str(tmp_path / "gguf")]) == 2


def test_damaged_and_foreign_tensors_are_refused(place, tmp_path):
    shutil.copytree(place / "S", tmp_path / "S")
    path = tmp_path / "S" / checkpoint.BASE_TENSORS
    held = load_file(path)
    key = next(iter(held))
    save_file(held | {key: held[key] * 2}, path)
    with pytest.raises(ValueError, match="was altered"):
        load.model(str(place / "Q"), str(tmp_path / "S"))
    path.unlink()
    with pytest.raises(ValueError, match="is not a peft adapter"):
        load.model(str(place / "Q"), str(tmp_path / "S"))
    shutil.copytree(place / "A", tmp_path / "A")
    (tmp_path / "A" / checkpoint.BASE_TENSORS).unlink()
    with pytest.raises(ValueError, match=r"lacks base_tensors\.safetensors, which its stamp names"):
        load.model(str(place / "Q"), str(tmp_path / "A"))
    model = load.model(str(place / "Q"), str(place / "S"))
    with pytest.raises(ValueError, match="other scales and zeros than those that the model has loaded"):
        load.with_adapter(model, str(place / "A"))
    base = load.model(str(place / "Q"))
    name = key.rpartition(".")[0]
    with pytest.raises(ValueError, match=rf"{name}: trained scale \[3, 3\] does not fit"):
        trained.updated(name, base.get_submodule(name).packed, {"scale": torch.ones(3, 3)})


def test_packed_embeddings_and_head_stay_frozen_and_the_rest_is_known_to_ddp(place):
    words = ["--bits", "2", "--group_size", "32", "--dataset", str(place / "text.txt"), "--quantize_embeddings", "8"]
    assert main(["quantize", "--model", str(place / "M"), *words, *SHORT, "--output_dir", str(place / "E")]) == 0
    model = lrec.prepare_model_for_training(load.model(str(place / "E")))
    trained.start(model, trained.ALL)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 14 and all(name.startswith("model.layers.") for name in learning)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert not ignored & learning and {"lm_head.scale", "model.layers.0.mlp.up_proj.qweight"} <= ignored


def test_streamed_weights_and_unknown_parts_are_refused(place, capsys):
    assert train(place, "X", "scales", "--stream_weights", "true") == 2
    assert "--stream_weights reads packed weights anew" in capsys.readouterr().err
    assert train(place, "X", "scale") == 2
    assert "scales" in capsys.readouterr().err and not (place / "X").exists()
