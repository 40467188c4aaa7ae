"""Bits and ranks of each layer under one budget of bytes, from the sweep to an adapter of several ranks."""

import itertools
import json
from collections import Counter

import pytest
import torch
from checks import assert_close, tiny_model
from safetensors.torch import load_file

from lrec import allocation, assembly, checkpoint, load, lowrank
from lrec.cli import main
from lrec.lora_files import LoraFiles

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
SHORT = ["--num_samples", "8", "--max_length", "32"]
ONE_WIDTH = ["--bits_map", "*=2", "--target_bpw", "5"]  # so that ranks alone differ
WEIGHTS = 73728


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model `M`, a packed one `Q` of 2 bits whose ranks were allocated, and an adapter `A` of those ranks."""
    place = tmp_path_factory.mktemp("ranks")
    tiny_model(place / "M", intermediate_size=128)
    (place / "text.txt").write_text(TEXT * 200)
    assert quantize(place, "Q", *ONE_WIDTH) == 0
    assert train(place, "A") == 0
    return place


def quantize(place, name, *words, rank="16"):
    where = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), *SHORT, "--method", "rtn"]
    ranks = ["--group_size", "32", "--allocate_ranks", "true", "--init_rank", rank]
    return main(["quantize", *where, *ranks, *words, "--output_dir", str(place / name)])


def train(place, name, *words):
    where = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    settings = ["--max_length", "32", "--max_steps", "2", "--save_strategy", "no"]
    return main(["train", *where, *settings, *words, "--output_dir", str(place / name)])


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 49).reshape(2, 24)).logits


def test_factors_have_the_ranks_that_cost_least_error_and_all_bytes_count(place):
    report = checkpoint.read_json(place / "Q" / assembly.REPORT)
    table = list(itertools.chain.from_iterable(report["sweep"]))
    chosen = allocation.to_target(table, 5)
    ranks = {row["name"]: row["rank"] for row in report["layers"]}
    assert ranks == {name: choice["rank"] for name, choice in chosen.items()}
    assert {0, 16} < set(ranks.values()), "some layers without an adapter, and others of several ranks"
    assert report["ranks"] == {str(rank): count for rank, count in sorted(Counter(ranks.values()).items())}
    factors = lowrank.load(place / "Q" / assembly.LOWRANK)
    assert {name: len(a) for name, (a, _) in factors.items()} == {name: rank for name, rank in ranks.items() if rank}
    stored = sum(row["bytes"] for row in report["layers"]) + sum(
        2 * t.numel() for pair in factors.values() for t in pair
    )
    assert report["bits_per_weight_with_adapters"] == 8 * stored / WEIGHTS <= 5
    assert stored == sum(choice["bytes"] for choice in chosen.values())


def test_the_table_holds_what_the_spectrum_says(place):
    """For each rank: bytes of codes and factors, and an error that falls as what factors of that rank leave does."""
    report = checkpoint.read_json(place / "Q" / assembly.REPORT)
    corrected = {row["name"]: row for row in report["layers"] if row["rank"]}
    for row in itertools.chain.from_iterable(report["sweep"]):
        assert [choice["rank"] for choice in row["choices"]] == [0, 4, 8, 16]
        alone, *others = row["choices"]
        shape = next(found["shape"] for found in report["layers"] if found["name"] == row["name"])
        for choice in others:
            assert choice["bytes"] == alone["bytes"] + 2 * choice["rank"] * sum(shape)
        if found := corrected.get(row["name"]):
            # Of the pass, on inputs that packed blocks produce; in the first block these are the same.
            share = next(c["error"] for c in others if c["rank"] == found["rank"]) / alone["error"]
            if ".layers.0." in row["name"] and "self_attn.o" not in row["name"]:
                assert found["corrected_error"] / found["error"] == pytest.approx(share, rel=0.15)


def test_an_adapter_starts_from_them_with_their_ranks_and_no_scaling(place):
    config = checkpoint.read_json(place / "A" / "adapter_config.json")
    held = load_file(place / "A" / checkpoint.ADAPTER_WEIGHTS)
    factors = lowrank.load(place / "Q" / assembly.LOWRANK)
    found = {
        k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(t) for k, t in held.items() if "_A" in k
    }
    assert found == {name: len(a) for name, (a, _) in factors.items()}
    assert config["r"] == config["lora_alpha"] == 16 and config["rank_pattern"] == config["alpha_pattern"] != {}
    model = load.model(str(place / "Q"), str(place / "A"))
    for name, (a, b) in factors.items():
        layer = model.get_base_model().get_submodule(name)
        assert layer.scaling["default"] == 1
        assert_close(layer.get_delta_weight("default").detach(), b.float() @ a.float(), 0.3, name)
    assert checkpoint.read_stamp(place / "A")["lora_r"] == 16


def test_exports_and_a_task_on_top_keep_every_rank(place, tmp_path, capsys):
    model = load.model(str(place / "Q"), str(place / "A"))
    files = LoraFiles(place / "A", checkpoint.packed_sha256(model.get_base_model()))
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            assert_close(files.delta(name), layer.get_delta_weight("default").detach(), 1e-6, name)
    words = ["export", "--model", str(place / "Q"), "--adapter"]
    for format in ("adapter", "merged", "gguf-lora"):
        assert main([*words, str(place / "A"), "--format", format, "--output_dir", str(tmp_path / format)]) == 0
    assert torch.equal(logits(load.model(str(place / "Q"), str(tmp_path / "adapter"))), logits(model))
    assert_close(logits(load.model(str(tmp_path / "merged"))), logits(model), 2e-2)
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} and {2 * i}"}) + "\n" for i in range(12)))
    task = ["--objective", "sft", "--dataset", str(place / "rows.jsonl"), "--lora_r", "4", "--lora_bits", "8"]
    task += ["--lora_target_modules", "q_proj,down_proj", "--model", str(place / "Q"), "--adapter", str(place / "A")]
    assert main(["train", *task, "--max_steps", "2", "--output_dir", str(tmp_path / "T")]) == 0
    assert main([*words, str(tmp_path / "T"), "--format", "adapter", "--output_dir", str(tmp_path / "one")]) == 0
    both, one = (load.model(str(place / "Q"), str(tmp_path / name)) for name in ("T", "one"))
    assert_close(logits(one), logits(both), 1e-5)


def test_gguf_scales_each_layer_by_its_own_rank(place, tmp_path):
    """llama.cpp: w + alpha / rank of the layer * B A."""
    from gguf import GGUFReader

    where = ["--model", str(place / "Q"), "--adapter", str(place / "A"), "--output_dir", str(tmp_path / "G")]
    assert main(["export", *where, "--format", "gguf-lora"]) == 0
    reader = GGUFReader(tmp_path / "G" / "adapter.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    base = load.model(str(place / "Q"))
    files, ranks = LoraFiles(place / "A", checkpoint.packed_sha256(base)), set()
    for i, name in ((i, f"model.layers.{i}.mlp.{part}_proj") for i in range(2) for part in ("gate", "up", "down")):
        if (delta := files.delta(name)) is not None:
            part = name.rpartition(".")[2].removesuffix("_proj")
            a_RK, b_NR = (tensors[f"blk.{i}.ffn_{part}.weight.lora_{half}"] for half in "ab")
            assert_close(alpha / len(a_RK) * b_NR @ a_RK, delta, 1e-6, name)
            ranks.add(len(a_RK))
    assert ranks - {files.rank}


def test_int8_factors_are_counted_as_such_and_buy_more(place):
    assert quantize(place, "Q8", *ONE_WIDTH, "--lora_bits", "8") == 0
    wide, narrow = (checkpoint.read_json(place / name / assembly.REPORT) for name in ("Q", "Q8"))
    assert narrow["bits_per_weight_with_adapters"] <= 5
    assert sum(row["rank"] for row in narrow["layers"]) > sum(row["rank"] for row in wide["layers"])
    row = next(row for row in narrow["layers"] if row["rank"])
    assert row["adapter_bytes"] == row["rank"] * (sum(row["shape"]) + 8)


def test_what_does_not_fit_is_refused(place, capsys):
    assert quantize(place, "X", *ONE_WIDTH, rank="64") == 2
    told = "init_rank = 64 is larger than model.layers.0.self_attn.k_proj, which is (32, 64); allowed: up to 32"
    assert told in capsys.readouterr().err
    assert quantize(place, "X") == 2
    assert "give --target_bpw" in capsys.readouterr().err and not (place / "X").exists()
    assert train(place, "X", "--lora_r", "4") == 2
    assert "no factors" in capsys.readouterr().err
    assert train(place, "X", "--lora_r", "48", "--lora_init", "zero") == 2
    told = "lora_r = 48 is larger than 4 layers, the first of them model.layers.0.self_attn.k_proj (32 x 64)"
    assert told in capsys.readouterr().err


def test_a_budget_of_codes_alone_leaves_no_adapter_to_train(place, capsys):
    assert quantize(place, "N", "--bits_map", "*=2", "--target_bpw", "2.5625") == 0
    report = checkpoint.read_json(place / "N" / assembly.REPORT)
    assert report["ranks"] == {"0": 14} and not (place / "N" / assembly.LOWRANK).exists()
    words = ["--model", str(place / "N"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    assert main(["train", *words, "--max_steps", "1", "--output_dir", str(place / "X")]) == 2
    assert "holds no lowrank_init.safetensors to start from" in capsys.readouterr().err
    assert main(["train", *words, "--train", "scales", "--max_steps", "1", "--output_dir", str(place / "S")]) == 0
