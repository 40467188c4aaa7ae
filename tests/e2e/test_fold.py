"""`export --format packed`: base plus adapter rounded again, the twin of GPTQ on the sum, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exports import export, packed_model

from lrec import load
from lrec.formats.uniform import Uniform
from lrec.lora_files import LoraFiles
from lrec.nn import packed_modules
from tests.checks import assert_close

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
    """Without touch-up unless the words ask for it."""
    words = ["--adapter", str(place / "A"), "--dataset", str(place / "text.txt"), "--max_length", "32", *words]
    words += [] if "--touch_up_steps" in words else ["--touch_up_steps", "0"]
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
    (tmp_path / "A").mkdir()
    tensors = load_file(place / "A" / "adapter_model.safetensors")
    save_file({k: t * ("lora_A" in k) for k, t in tensors.items()}, tmp_path / "A" / "adapter_model.safetensors")
    (tmp_path / "A" / "adapter_config.json").write_bytes((place / "A" / "adapter_config.json").read_bytes())
    words = ["--adapter", str(tmp_path / "A"), "--dataset", str(place / "text.txt"), "--max_length", "32"]
    words += ["--force", "--touch_up_steps", "4"]
    assert export(place / "Q", tmp_path / "O", "packed", "--num_samples", "2", "--eval_samples", "2", *words) == 0
    base, folded = (packed_modules(load.model(str(path))) for path in (place / "Q", tmp_path / "O"))
    for name, layer in folded.items():
        assert isinstance(layer.packed, Uniform)
        assert all(torch.equal(t, base[name].packed.tensors()[k]) for k, t in layer.packed.tensors().items())


def test_what_cannot_be_folded_is_refused(dense, place, tmp_path, capsys):
    assert export(place / "Q", tmp_path / "O", "packed") == 2
    assert "it needs --adapter" in capsys.readouterr().err
    assert export(place / "Q", tmp_path / "O", "packed", "--adapter", str(place / "A")) == 2
    assert "layers.0.self_attn.q_proj, cannot hold the adapter exactly" in capsys.readouterr().err


@pytest.fixture(scope="module")
def floats(dense, tmp_path_factory):
    """A packed model `Q` with float zero points and groups of 48, the last one short, and an adapter `A` of it whose A
    is constant over each group of two kinds of layers."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("floats")
    (place / "text.txt").write_text(TEXT * 100)
    base = packed_model(dense, "--bits", "2", "--group_size", "48", "--zero_point", "float")
    shutil.copytree(base, place / "Q")
    targets = ["q_proj", "down_proj"]
    adapted = get_peft_model(load.model(str(place / "Q")), LoraConfig(r=4, lora_alpha=2, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "lora_A" in name:
            columns = torch.arange(parameter.shape[1]) // 48 * 48
            parameter.data = parameter.data[:, columns].clone()
    adapted.save_pretrained(place / "A")
    return place


@torch.no_grad()
def test_a_pooled_adapter_goes_into_zero_points_exactly(floats, tmp_path, capsys):
    words = ["--adapter", str(floats / "A"), "--json"]
    assert export(floats / "Q", tmp_path / "O", "packed", *words) == 0
    assert json.loads(capsys.readouterr().out)["rounded_layers"] == 0
    base, folded = (packed_modules(load.model(str(path))) for path in (floats / "Q", tmp_path / "O"))
    adapter = LoraFiles(floats / "A", None)
    for name, layer in folded.items():
        old, new = base[name].packed, layer.packed
        assert torch.equal(new.qweight, old.qweight) and torch.equal(new.scale, old.scale)
        if adapter.pair(name) is None:
            assert torch.equal(new.zero, old.zero)
            continue
        a_RK, b_NR = (half.double() for half in adapter.pair(name))
        target = old.unpack().double() + 0.5 * b_NR @ a_RK
        assert ((new.unpack().double() - target).abs() <= 1e-6 * target.abs().max()).all()
        assert (target - old.unpack()).norm() > 0.1 * old.unpack().norm()
    x = torch.arange(3, 40)[None]
    expected = load.model(str(floats / "Q"), str(floats / "A"))(x).logits
    assert_close(load.model(str(tmp_path / "O"))(x).logits, expected, 1e-5)


def test_one_column_off_its_group_is_rounded(floats, tmp_path, capsys):
    shutil.copytree(floats / "A", tmp_path / "A")
    tensors = load_file(tmp_path / "A/adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1.mlp.down_proj.lora_A" in key)
    tensors[key][2, -1] += 1e-3
    save_file(tensors, tmp_path / "A/adapter_model.safetensors")
    words = ["--adapter", str(tmp_path / "A"), "--json"]
    assert export(floats / "Q", tmp_path / "O", "packed", *words) == 2
    assert (
        "1 layers, the first model.layers.1.mlp.down_proj, cannot hold the adapter exactly" in capsys.readouterr().err
    )
    words += ["--dataset", str(floats / "text.txt"), "--max_length", "32", "--num_samples", "4", "--eval_samples", "2"]
    words += ["--touch_up_steps", "0", "--force"]
    assert export(floats / "Q", tmp_path / "O", "packed", *words) == 0
    assert json.loads(capsys.readouterr().out)["rounded_layers"] == 1


def test_the_touch_up_trains_scales_alone_and_is_kept_where_it_helps(floats, tmp_path, capsys):
    stir = load_file(floats / "A/adapter_model.safetensors")
    shutil.copytree(floats / "A", tmp_path / "A")
    for key, tensor in stir.items():
        stir[key] = tensor + 0.02 * torch.randn_like(tensor) if "lora_A" in key else 4 * tensor
    save_file(stir, tmp_path / "A/adapter_model.safetensors")
    for name in ("Q", "text.txt"):
        (tmp_path / name).symlink_to(floats / name)
    assert fold(tmp_path, tmp_path / "R", "--json", "--force") == 0
    rounded = json.loads(capsys.readouterr().out)
    assert fold(tmp_path, tmp_path / "O", "--json", "--force", "--touch_up_steps", "16") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kl_rounded"] == pytest.approx(rounded["kl_packed"], rel=1e-6)
    assert told["kl_packed"] < told["kl_rounded"] and told["lost"] < rounded["lost"]
    assert not list(tmp_path.glob(".*")) and "kl_rounded" not in rounded
    before, after = (packed_modules(load.model(str(tmp_path / name))) for name in "RO")
    moved = 0
    for name, layer in after.items():
        old, new = before[name].packed, layer.packed
        assert layer.spec == before[name].spec
        assert torch.equal(new.qweight, old.qweight) and torch.equal(new.zero, old.zero)
        moved += not torch.equal(new.scale, old.scale)
    assert moved == len(after)


@pytest.fixture(scope="module")
def grids(place, tmp_path_factory):
    """A directory `S` of trained scales and zeros of `Q`, and one, `B`, of these beside the adapter `A`."""
    from lrec import trained

    directory = tmp_path_factory.mktemp("grids")
    model = load.model(str(place / "Q"))
    trained.start(model, ("scales", "zeros"))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1 + 0.05 * torch.randn_like(parameter)
    trained.settle(model)
    (directory / "S").mkdir()
    trained.save(model, directory / "S")
    shutil.copytree(place / "A", directory / "B")
    shutil.copy(directory / "S/base_tensors.safetensors", directory / "B")
    return directory


@torch.no_grad()
def test_trained_scales_and_zeros_are_exact(place, grids, tmp_path, capsys):
    x = torch.arange(3, 40)[None]
    expected = load.model(str(place / "Q"), str(grids / "S"))(x).logits
    assert export(place / "Q", tmp_path / "O", "packed", "--adapter", str(grids / "S"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rounded_layers"] == 0
    assert torch.equal(load.model(str(tmp_path / "O"))(x).logits, expected)
    bare = load.model(str(place / "Q"))(x).logits
    assert (bare - expected).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def test_an_adapter_beside_trained_scales_is_added_to_those(place, grids, tmp_path):
    words = ["--adapter", str(grids / "B"), "--dataset", str(place / "text.txt"), "--max_length", "32"]
    words += ["--num_samples", "16", "--eval_samples", "2", "--touch_up_steps", "0", "--max_lost", "1.5"]
    assert export(place / "Q", tmp_path / "O", "packed", *words) == 0
    changed = packed_modules(load.model(str(place / "Q"), str(grids / "S")))
    adapter = LoraFiles(place / "A", None)
    for name, layer in packed_modules(load.model(str(tmp_path / "O"))).items():
        delta = adapter.delta(name)
        if delta is None:
            assert torch.equal(layer.weight, changed[name].weight)
        else:
            target = changed[name].weight + delta
            assert (layer.weight - target).norm() < 0.5 * delta.norm()
