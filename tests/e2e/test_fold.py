"""`export --format packed`: base plus adapter rounded again, the twin of GPTQ on the sum, and what is refused."""

import json
import shutil

import pytest
import torch
from test_exports import export, packed_model

from lrec import load
from lrec.formats.uniform import Uniform
from lrec.lora_files import LoraFiles
from lrec.nn import packed_modules

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "


@pytest.fixture(scope="module")
def place(dense, tmp_path_factory):
    """A packed model `Q` of 4 bits, an adapter `A` of it that changes two kinds of layers much, and a text."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("fold")
    (place / "text.txt").write_text(TEXT * 100)
    shutil.copytree(packed_model(dense, "--bits", "4", "--group_size", "32"), place / "Q")
    adapted = get_peft_model(
        load.model(str(place / "Q")), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(place / "A")
    return place


def fold(place, directory, *words):
    words = ["--adapter", str(place / "A"), "--dataset", str(place / "text.txt"), "--max_length", "32", *words]
    return export(place / "Q", directory, "packed", "--num_samples", "16", "--eval_samples", "8", *words)


def test_adapted_layers_move_to_base_plus_adapter_and_others_stay(place, tmp_path, capsys):
    assert fold(place, tmp_path / "O", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kl_corrected"] == pytest.approx(0, abs=1e-6) and 0 < told["kl_packed"] < 0.2 * told["kl_base"]
    assert told["lost"] == pytest.approx(told["kl_packed"] / told["kl_base"], rel=1e-3)
    base, folded = (packed_modules(load.model(str(path))) for path in (place / "Q", tmp_path / "O"))
    adapter = LoraFiles(place / "A", None)
    assert base.keys() == folded.keys()
    for name, layer in folded.items():
        assert layer.spec == base[name].spec
        delta = adapter.delta(name)
        if delta is None:
            assert all(torch.equal(t, base[name].packed.tensors()[k]) for k, t in layer.packed.tensors().items())
        else:
            target = base[name].packed.unpack() + delta
            step = layer.packed.scale.float().repeat_interleave(32, 1)
            assert (layer.packed.unpack() - target).norm() < 0.6 * step.norm()
            assert (layer.packed.unpack() - target).norm() < 0.5 * delta.norm()


def test_the_result_is_a_base_like_any_other(place, tmp_path):
    assert fold(place, tmp_path / "O") == 0
    assert export(tmp_path / "O", tmp_path / "G", "gptq") == 0
    config = json.loads((tmp_path / "O" / "config.json").read_text())["quantization_config"]
    original = json.loads((place / "Q" / "config.json").read_text())["quantization_config"]
    assert config["meta"]["packed_sha256"] != original["meta"]["packed_sha256"]
    assert config["meta"]["base_model"] == original["meta"]["base_model"]


def test_too_much_lost_is_refused_but_by_force(place, tmp_path, capsys):
    assert fold(place, tmp_path / "O", "--max_lost", "0.0001") == 2
    assert "of what the adapter gains" in capsys.readouterr().err and not (tmp_path / "O").exists()
    assert fold(place, tmp_path / "O", "--max_lost", "0.0001", "--force") == 0


def test_an_adapter_of_zeros_changes_no_bit(place, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "A").mkdir()
    tensors = load_file(place / "A" / "adapter_model.safetensors")
    save_file({k: t * ("lora_A" in k) for k, t in tensors.items()}, tmp_path / "A" / "adapter_model.safetensors")
    (tmp_path / "A" / "adapter_config.json").write_bytes((place / "A" / "adapter_config.json").read_bytes())
    words = ["--adapter", str(tmp_path / "A"), "--dataset", str(place / "text.txt"), "--max_length", "32", "--force"]
    assert export(place / "Q", tmp_path / "O", "packed", "--num_samples", "2", "--eval_samples", "2", *words) == 0
    base, folded = (packed_modules(load.model(str(path))) for path in (place / "Q", tmp_path / "O"))
    for name, layer in folded.items():
        assert isinstance(layer.packed, Uniform)
        assert all(torch.equal(t, base[name].packed.tensors()[k]) for k, t in layer.packed.tensors().items())


def test_what_cannot_be_folded_is_refused(dense, place, tmp_path, capsys):
    assert export(place / "Q", tmp_path / "O", "packed") == 2
    assert "needs --adapter and, to round with, --dataset" in capsys.readouterr().err
