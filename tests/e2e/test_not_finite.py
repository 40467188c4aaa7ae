"""NaN and infinity, wherever they come from: one line that names the layer or the model, and what to do."""

import shutil

import pytest
import torch
from checks import tiny_model
from safetensors.torch import load_file, save_file

from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
LINEAR, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("finite")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 60)
    assert main(["quantize", "--model", str(place / "M"), "--method", "nf4", "--output_dir", str(place / "Q")]) == 0
    return place


def with_value(place, tmp_path, key, value):
    """`M` with one odd number in a tensor."""
    shutil.copytree(place / "M", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors[key].view(-1)[7] = value
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "bad")


def refusal(capsys, verb, *words):
    capsys.readouterr()
    assert main([verb, *map(str, words)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("key", "named"),
    [
        (LINEAR, "model.layers.1.mlp.up_proj: the weight holds NaN or infinity"),
        (NORM, "model.layers.1"),
        (EMBEDDINGS, "model.embed_tokens.weight holds NaN or infinity"),
        (HEAD, "lm_head.weight holds NaN or infinity"),
    ],
)
def test_quantize_names_what_is_not_finite(place, tmp_path, capsys, key, named, value):
    bad = with_value(place, tmp_path, key, value)
    words = ["--bits", "2", "--dataset", place / "text.txt", "--num_samples", "2", "--max_length", "16"]
    assert named in refusal(capsys, "quantize", "--model", bad, *words, "--output_dir", tmp_path / "O")
    if key != NORM:  # without text a norm is not looked at: it is kept as it is
        without = refusal(capsys, "quantize", "--model", bad, "--method", "nf4", "--output_dir", tmp_path / "P")
        assert named in without


@pytest.mark.parametrize("key", [LINEAR, HEAD])
def test_cache_names_what_is_not_finite(place, tmp_path, capsys, key):
    bad = with_value(place, tmp_path, key, float("nan"))
    words = [
        "--dataset",
        place / "text.txt",
        "--num_samples",
        "2",
        "--max_length",
        "16",
        "--output_dir",
        tmp_path / "T",
    ]
    told = refusal(capsys, "cache", "--model", bad, *words)
    assert ("model.layers.1" if key == LINEAR else "lm_head.weight") in told and "check" in told


def test_evaluate_says_whose_output_is_not_finite(place, tmp_path, capsys):
    bad = with_value(place, tmp_path, LINEAR, float("nan"))
    words = ["--dataset", place / "text.txt", "--num_samples", "2", "--max_length", "16"]
    assert "the model's output is not finite" in refusal(capsys, "evaluate", "--model", bad, *words)
    told = refusal(capsys, "evaluate", "--model", place / "M", "--teacher", bad, *words)
    assert "the teacher's output is not finite" in told


def test_train_names_the_layer_of_the_teacher(place, tmp_path, capsys):
    bad = with_value(place, tmp_path, LINEAR, float("nan"))
    words = ["--dataset", place / "text.txt", "--max_steps", "1", "--max_length", "16", "--lora_init", "zero"]
    told = refusal(capsys, "train", "--model", place / "Q", "--teacher", bad, *words, "--output_dir", tmp_path / "A")
    assert "not finite" in told
    assert not (tmp_path / "A" / "adapter_model.safetensors").exists()


def test_an_adapter_that_is_not_finite_shows_in_evaluation(place, tmp_path, capsys):
    words = ["--dataset", place / "text.txt", "--max_steps", "1", "--max_length", "16", "--lora_init", "zero"]
    train = ["--model", place / "Q", "--teacher", place / "M", *words, "--output_dir", tmp_path / "A"]
    assert main(["train", *map(str, train)]) == 0
    tensors = load_file(tmp_path / "A" / "adapter_model.safetensors")
    tensors[next(iter(tensors))].fill_(torch.inf)
    save_file(tensors, tmp_path / "A" / "adapter_model.safetensors", metadata={"format": "pt"})
    words = ["--dataset", place / "text.txt", "--num_samples", "2", "--max_length", "16"]
    told = refusal(capsys, "evaluate", "--model", place / "Q", "--adapter", tmp_path / "A", *words)
    assert "the model's output is not finite" in told
