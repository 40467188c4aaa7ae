"""One dial: what an effort sets, what it leaves, and what does not fit; a recipe through it; sampled text."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checks import tiny_model

from lrec import blocks, checkpoint, effort, load, machine, runs, text
from lrec.cli import main
from lrec.quantizers.gptq import GPTQ
from lrec.quantizers.nf4 import Nf4
from lrec.quantizers.rtn import RTN
from lrec.recipe import Recipe

ROOT = Path(__file__).parents[2]
TEXT = "In the beginning there was a quick brown fox, and it jumped over seven lazy dogs and a jovial yak.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("effort")
    tiny_model(place / "M", intermediate_size=128, initializer_range=0.2)
    (place / "text.txt").write_text(TEXT * 90)
    (place / "other.txt").write_text(TEXT[::-1] * 30)
    return place


def quantize(place, name, *words):
    where = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--output_dir", str(place / name)]
    return main(["quantize", *where, "--max_length", "16", "--group_size", "32", "--init_rank", "0", *words])


def calibration(place, name):
    return json.loads((place / name / "lrec_manifest.json").read_text())["calibration"]["num_samples"]


def test_an_effort_sets_what_was_not_set(place):
    assert quantize(place, "quick", "--effort", "quick") == 0
    assert quantize(place, "own", "--effort", "quick", "--num_samples", "5") == 0
    assert quantize(place, "max", "--effort", "max") == 0
    assert [calibration(place, name) for name in ("quick", "own", "max")] == [32, 5, 256]
    packed = load.model(str(place / "quick")).model.layers[0].mlp.up_proj.packed
    assert packed.scale.dtype == packed.zero.dtype == torch.uint8
    given = {"num_samples": "7"}
    assert effort.spend(given, runs.Quantize, GPTQ) is given, "without an effort nothing changes"


@pytest.mark.parametrize("level", effort.QUANTIZE)
def test_an_effort_knows_what_a_method_stores(level):
    grid = {"zero_point": "float", "scale_bits": 8}
    target = {} if level == "quick" else {"target_bpw": 3.5}
    quantize, recipe = (runs.Quantize, RTN, blocks.PassSettings), Recipe(model="M", output_dir="R", train="scales")
    given = {"effort": level, "num_samples": "7", "bits": "3"}
    assert effort.spend(given, *quantize) == grid | {"init_rank": 0} | target | given, "nothing of a training"
    assert effort.spend(given | {"group_size": "32"}, *quantize).get("target_bpw") is None
    assert "zero_point" not in effort.spend(given | {"symmetric": "true"}, *quantize)
    for quantizer, learns in ((GPTQ(group_size=16), "scales,zeros"), (Nf4(), "all")):
        values = effort.spend({"effort": level}, recipe, quantizer, blocks.PassSettings())
        assert values["train"] == learns and "target_bpw" not in values


def test_steps_spend_the_tokens_of_a_level():
    assert effort.steps("quick", 512) == {"max_steps": 56}
    assert effort.steps("standard", 512) == {"max_steps": 256, "eval_steps": 25}
    assert effort.steps("max", 10**9)["max_steps"] == 1


def test_what_does_not_fit_exits_3_and_says_what_would(place, capsys, monkeypatch):
    assert quantize(place, "X", "--effort", "fast") == 2
    assert "quick" in capsys.readouterr().err
    needs = {}
    from lrec import load, memory, pass_memory, shapes

    setup = memory.Setup(bits=2, dtype=load.dtype_of("float32", load.device_of("cpu")), device="cpu")
    for level, chosen in effort.QUANTIZE.items():
        config = shapes.config_of(str(place / "M"))
        needs[level] = pass_memory.quantizing(config, setup, chosen["num_samples"] * 16 * 64).peak_bytes
    assert needs["quick"] < needs["standard"] < needs["max"]
    monkeypatch.setattr(machine, "free_bytes", lambda device: needs["standard"])
    big = ("--max_length", "1024")
    where = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--output_dir", str(place / "X")]
    assert main(["quantize", *where, *big, "--effort", "max"]) == 3
    assert "it fits with --effort standard" in capsys.readouterr().err and not (place / "X").exists()
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    assert main(["quantize", *where, *big, "--effort", "quick"]) == 3
    assert "no effort fits" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(effort, "packed_bytes", lambda config, setup: 10**18)
    assert main(["quantize", *where, "--max_length", "16", "--effort", "quick"]) == 3
    assert "does not fit on the disk" in capsys.readouterr().err and not (place / "X").exists()


def test_predicted_bytes_on_disk_are_near_those_written(place):
    from lrec import memory, shapes

    words = ["--num_samples", "4", "--max_length", "16", "--group_size", "64", "--init_rank", "32"]
    where = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--output_dir", str(place / "disk")]
    assert main(["quantize", *where, *words]) == 0
    written = sum(path.stat().st_size for path in (place / "disk").glob("*.safetensors"))
    setup = memory.Setup(bits=2, stored_dtype=torch.float32)
    assert 0.7 * written < effort.packed_bytes(shapes.config_of(str(place / "M")), setup) < 1.3 * written


def test_the_published_baseline_and_our_recipe_run_by_one_dial(place, monkeypatch, capsys):
    from lrec import recipe as recipes

    monkeypatch.chdir(place)
    monkeypatch.setattr(effort, "TRAINING_TOKENS", {"quick": 128, "standard": 384, "max": 768})
    monkeypatch.setattr(effort, "EVALUATIONS", {"quick": 0, "standard": 3, "max": 3})
    small = {"num_samples": 4, "max_length": 64, "train_length": 32, "test_samples": 2, "lora_r": 4, "init_rank": 4,
             "group_size": 32}  # fmt: skip
    texts = {"model": "M", "train_dataset": "text.txt", "test_dataset": "other.txt", "prompts": "A fox"}
    recipes_of = {
        "int21_smollm2_135m": {"max_steps": 2},
        "lrec_smollm2_135m": {"effort": "standard"},
        "equal_bytes_smollm2_135m": {"max_steps": 2},
    }
    for name, extra in recipes_of.items():
        monkeypatch.syspath_prepend(str(ROOT / "recipes"))
        script = __import__(name)
        values = small | texts | extra | {"output_dir": f"runs/{name}"}
        argv = [f"--{key}={value}" for key, value in values.items()]
        rows = recipes.main(argv, script.recipe, script.quantizer, script.training, script.passing)
        assert [row["model"] for row in rows] == ["full precision", "quantized", "corrected"]
        stamp = json.loads(Path(f"runs/{name}/adapter/lrec_adapter.json").read_text())
        if name.startswith("int21"):
            assert stamp["train"] == "adapters" and stamp["lora_init"] == "zero" and stamp["num_steps"] == 2
            told = checkpoint.read_json(Path(f"runs/{name}/adapter/adapter_config.json"))
            assert (told["lora_alpha"], told["lora_dropout"]) == (128, 0.05)
            assert sorted(told["target_modules"]) == sorted(script.recipe.lora_target_modules.split(","))
        elif name.startswith("lrec"):
            assert stamp["train"] == "scales,zeros" and stamp["num_steps"] == 384 // 64
            assert [row["step"] for row in stamp["evaluations"]] == [2, 4, 6]
        else:
            assert stamp["train"] == "scales,zeros"
            # Trained scales of 8-bit codes take 16 bits.
            assert (
                rows[1]["bits_per_weight"] <= 3.25
                and 0 <= rows[2]["bits_per_weight"] - rows[1]["bits_per_weight"] < 0.2
            )
            folded = Path(f"runs/{name}/export")
            assert not (folded / "adapter_model.safetensors").exists()
            assert rows[2]["bytes"] == checkpoint.weights_bytes(folded), "what was trained is stored once"
            trained_logits, folded_logits = (
                load.model(*where)(input_ids=torch.arange(24)[None]).logits
                for where in ((f"runs/{name}/packed", f"runs/{name}/adapter"), (str(folded), None))
            )
            assert torch.equal(trained_logits, folded_logits)
        sys.modules.pop(name)


def test_text_is_sampled_from_the_model_and_read_as_a_dataset(place, capsys):
    words = ["sample", "--model", str(place / "M"), "--num_samples", "5", "--max_length", "20", "--batch_size", "2"]
    for name in ("a", "b"):
        assert main([*words, "--output", str(place / f"{name}.jsonl")]) == 0
    first, second = (text.documents(str(place / f"{name}.jsonl")) for name in ("a", "b"))
    assert first == second and len(first) == 5 and len(set(first)) > 1, "one seed, one text"
    assert main([*words, "--seed", "1", "--output", str(place / "c.jsonl")]) == 0
    assert text.documents(str(place / "c.jsonl")) != first
    capsys.readouterr()
    assert main([*words, "--output", str(place / "a.jsonl")]) == 2 and "exists" in capsys.readouterr().err
    assert main([*words, "--output", str(place / "a.txt")]) == 2 and "is not a .jsonl" in capsys.readouterr().err
    assert main([*words, "--chat", "--output", str(place / "d.jsonl")]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_an_instruct_model_speaks_in_its_chat_template(place):
    from lrec import load

    tiny_model(place / "chat", initializer_range=0.2)
    tokenizer = load.tokenizer(str(place / "chat"))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(place / "chat")
    words = ["--num_samples", "3", "--max_length", "12", "--batch_size", "2", "--output", str(place / "chat.jsonl")]
    assert main(["sample", "--model", str(place / "chat"), *words]) == 0
    rows = text.documents(str(place / "chat.jsonl"))
    assert len(rows) == 3
    for row in rows:
        question, found, answer = row.removeprefix("<user>").partition("</><assistant>")
        assert row.startswith("<user>") and found and question and answer.endswith("</>")
