"""Layers of different widths, by rules and to a target size, through the whole pass on a tiny model."""

import itertools

import pytest
import torch
from checks import tiny_model
from test_cli import CALIBRATION, TEXT

from lrec import allocation, assembly, blocks, checkpoint, load, sweep, text
from lrec.cli import main
from lrec.quantizers.rtn import RTN

PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PARTS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in PARTS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixed")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 200)
    return place


def quantize(place, out, *words, method="rtn"):
    common = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--init_rank", "0", *CALIBRATION]
    return main(["quantize", *common, "--method", method, "--group_size", "32", *words, "--output_dir", str(out)])


def stored_bits(directory):
    """The width of every packed layer, from the config that transformers loads."""
    layers = checkpoint.read_json(directory / "config.json")["quantization_config"]["layers"]
    return {name: kind["spec"]["bits"] for kind in layers for name in kind["modules"]}


def shards(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rules_hold_layer_by_layer(place, tmp_path, method):
    assert (
        quantize(place, tmp_path / "Q", "--bits_map", "down_proj=3,re:.*layers\\.1\\.self_attn.*=8", method=method) == 0
    )
    expected = {name: 3 if "down" in name else 8 if "1.self_attn" in name else 2 for name in NAMES}
    assert stored_bits(tmp_path / "Q") == expected
    report = checkpoint.read_json(tmp_path / "Q" / assembly.REPORT)
    assert {row["name"]: row["bits"] for row in report["layers"]} == expected
    assert report["bits"] == {"2": 8, "3": 2, "8": 4}
    assert 8 * sum(row["bytes"] for row in report["layers"]) / 86016 == pytest.approx(report["bits_per_weight"])
    dense = load.model(str(place / "M"))
    with torch.no_grad():
        for name in NAMES if method == "rtn" else []:
            w_NK = dense.get_submodule(name).weight
            packed = RTN(bits=expected[name], group_size=32)(w_NK)
            assert torch.equal(load.model(str(tmp_path / "Q")).get_submodule(name).weight, packed.unpack()), name


def test_a_target_is_the_best_step_by_step_and_the_pass_is_that_of_its_rules(place, tmp_path):
    assert quantize(place, tmp_path / "T", "--target_bpw", "3.1", method="gptq") == 0
    report = checkpoint.read_json(tmp_path / "T" / assembly.REPORT)
    table = list(itertools.chain.from_iterable(report["sweep"]))
    assert [row["name"] for row in table if "layers.1" in row["name"]] != []
    bits = stored_bits(tmp_path / "T")
    assert bits == {name: choice["bits"] for name, choice in allocation.to_target(table, 3.1).items()}
    size = {(row["name"], c["bits"]): c["bytes"] for row in table for c in row["choices"]}
    assert {row["name"]: row["bytes"] for row in report["layers"]} == {name: size[name, b] for name, b in bits.items()}
    # What is left is less than any single step would take, or such a step would have been made.
    left = 3.1 * 86016 / 8 - sum(row["bytes"] for row in report["layers"])
    steps = [size[name, 3] - size[name, 2] for name, b in bits.items() if b == 2]
    assert 0 <= left < min(steps)
    rules = ",".join(f"{name}={b}" for name, b in bits.items())
    assert quantize(place, tmp_path / "R", "--bits_map", rules, method="gptq") == 0
    assert shards(tmp_path / "T") == shards(tmp_path / "R")


def test_the_sweep_measures_the_full_precision_model(place, tmp_path):
    assert quantize(place, tmp_path / "T", "--target_bpw", "4", "--bits_map", "o_proj=8") == 0
    report = checkpoint.read_json(tmp_path / "T" / assembly.REPORT)
    model, seen = load.model(str(place / "M")).double(), {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _, args, out, i=i: seen.update({i: out}))
    ids = text.windows([TEXT * 200], load.tokenizer(str(place / "M")), 32, 8, seed=0)[: sweep.WINDOWS]
    with torch.no_grad():
        model(ids)
        exact = dict(seen)
        for row in itertools.chain.from_iterable(report["sweep"]):
            linear, index = model.get_submodule(row["name"]), int(row["name"].split(".")[2])
            w_NK = linear.weight.data
            assert row["weights"] == w_NK.numel()
            assert [c["bits"] for c in row["choices"]] == ([8] if "o_proj" in row["name"] else [2, 3, 4, 8])
            for choice in row["choices"]:
                packed = RTN(bits=choice["bits"], group_size=32)(w_NK.float())
                assert choice["bytes"] == packed.nbytes
                linear.weight.data = packed.unpack().double()
                model(ids)
                error = ((seen[index] - exact[index]).norm(dim=-1) / exact[index].norm(dim=-1)).square().mean()
                assert choice["error"] == pytest.approx(float(error), rel=1e-3), (row["name"], choice)
            linear.weight.data = w_NK


def test_an_interrupted_sweep_goes_on_and_is_not_repeated(place, tmp_path, monkeypatch):
    words = ("--target_bpw", "3")
    assert quantize(place, tmp_path / "straight", *words) == 0
    calls, measure, layer_row = [], sweep.quantize_layer, blocks.layer_row

    def stop(where, real):
        def run(layer, *rest):
            calls.append(layer)
            if len(calls) == where:
                raise KeyboardInterrupt
            return real(layer, *rest)

        return run

    monkeypatch.setattr(sweep, "quantize_layer", stop(37, measure))
    assert quantize(place, tmp_path / "broken", *words) == 130
    calls.clear()
    monkeypatch.setattr(sweep, "quantize_layer", stop(None, measure))
    monkeypatch.setattr(blocks, "layer_row", stop(38, layer_row))
    assert quantize(place, tmp_path / "broken", *words) == 130
    # The second block was measured, then ten layers were packed: the first block, and three that are lost.
    assert [name.split(".")[2] for name in calls] == ["1"] * 28 + ["0"] * 7 + ["1"] * 3
    calls.clear()
    assert quantize(place, tmp_path / "broken", "--target_bpw", "5") == 2
    monkeypatch.setattr(blocks, "layer_row", stop(None, layer_row))
    assert quantize(place, tmp_path / "broken", *words) == 0
    assert [name.split(".")[2] for name in calls] == ["1"] * 7
    assert shards(tmp_path / "straight") == shards(tmp_path / "broken")


def test_another_target_uses_the_sweep_of_one_out_of_reach(place, tmp_path, monkeypatch, capsys):
    assert quantize(place, tmp_path / "Q", "--target_bpw", "2") == 2
    assert "the nearest is 2.5625" in capsys.readouterr().err
    monkeypatch.setattr(sweep, "quantize_layer", None)
    assert quantize(place, tmp_path / "Q", "--target_bpw", "2.5625") == 0
    assert set(stored_bits(tmp_path / "Q").values()) == {2}


def test_a_rule_without_a_layer_is_refused_before_anything_is_written(place, tmp_path, capsys):
    assert quantize(place, tmp_path / "Q", "--bits_map", "dwon_proj=3") == 2
    assert "'dwon_proj' matches no layer; there are model.layers.*.self_attn.q_proj" in capsys.readouterr().err
    assert not (tmp_path / "Q").exists()


def test_a_target_without_a_text_is_refused(place, tmp_path, capsys):
    words = ["--model", str(place / "M"), "--method", "rtn", "--target_bpw", "3", "--output_dir", str(tmp_path / "Q")]
    assert main(["quantize", *words]) == 2
    assert "rtn needs calibration (outputs for target_bpw); name a text with --dataset" in capsys.readouterr().err
