"""What goes wrong with packed models through transformers is one clear error that names the place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lrec
from lrec import checkpoint, registry
from tests.checks import tiny_llama

INT3 = {"method": "rtn", "bits": 3, "group_size": 32}
CALIBRATED = [name for name, member in registry.members("quantizers").items() if member.needs]


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    tiny_llama(attention_bias=True).save_pretrained(directory := tmp_path_factory.mktemp("dense"))
    return directory


@pytest.fixture(scope="module")
def on_the_fly(dense_dir):
    return AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=lrec.LrecQuantConfig(**INT3))


@pytest.fixture
def packed_dir(on_the_fly, tmp_path):
    on_the_fly.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def edit_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bit": 3}, "setting of quantizer rtn 'bit'.*Did you mean 'bits'"),
        ({"method": "rnt"}, "unknown quantizer 'rnt'.*Did you mean 'rtn'"),
        ({"bits": 5}, "bits = 5"),
        ({"format_version": 2}, "format 2.*upgrade lrec"),
    ],
)
def test_a_wrong_config_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lrec.LrecQuantConfig(**settings)


@pytest.mark.parametrize("method", CALIBRATED)
def test_methods_that_need_calibration_point_to_lrec_quantize(method):
    with pytest.raises(ValueError, match=f"{method}.*needs calibration.*lrec quantize --method {method}"):
        lrec.LrecQuantConfig(method=method)


def test_a_group_that_does_not_fit_names_the_layers(dense_dir):
    with pytest.raises(ValueError, match=r"q_proj \(and 11 more with 64 columns\).*128"):
        config = lrec.LrecQuantConfig(method="rtn", bits=3, group_size=128)
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.fill_(torch.nan), "layers.1.mlp.up_proj: .*NaN"),
        (lambda w: w[:, :32].clone(), r"layers.1.mlp.up_proj: the checkpoint has \(160, 32\), the model \(160, 64\)"),
        (lambda w: None, "layers.1.mlp.up_proj.weight: the checkpoint has no such tensor"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_named(dense_dir, tmp_path, spoil, message):
    tensors = load_file(dense_dir / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    tensors = {name: spoil(w) if name == key else w for name, w in tensors.items()}
    save_file(
        {name: w for name, w in tensors.items() if w is not None}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_bytes((dense_dir / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=lrec.LrecQuantConfig(**INT3))


def rename(config):
    config["layers"][0]["modules"][1] = "model.layers.0.self_attn.qq_proj"


def swap(config):
    config["layers"][0]["spec"], config["layers"][1]["spec"] = config["layers"][1]["spec"], config["layers"][0]["spec"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "qq_proj: LlamaForCausalLM has no such module"),
        (swap, r"8 places.*\n.*q_proj: packed as \[32, 64\], but the model's is \[64, 64\]"),
        (lambda config: config.update(format_version=2), "format 2.*upgrade lrec"),
        (lambda config: config.pop("layers"), "no packed `layers`"),
        (lambda config: config["layers"][0]["spec"].update(format="unifrom"), "Did you mean 'uniform'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(packed_dir, change, message):
    edit_config(packed_dir, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(packed_dir)


def test_a_missing_packed_tensor_is_named(packed_dir):
    tensors = load_file(packed_dir / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.scale"], tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, packed_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 tensors.*(?s:.*)k_proj\.scale"):
        AutoModelForCausalLM.from_pretrained(packed_dir)


def test_a_packed_config_for_a_dense_checkpoint_is_refused(on_the_fly, dense_dir):
    with pytest.raises(ValueError, match="this one is in full precision"):
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=on_the_fly.config.quantization_config)


def test_a_file_that_differs_from_the_manifest_is_refused(packed_dir):
    checkpoint.write_manifest(packed_dir, {})
    AutoModelForCausalLM.from_pretrained(packed_dir)
    data = bytearray((packed_dir / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (packed_dir / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="altered"):
        AutoModelForCausalLM.from_pretrained(packed_dir)
