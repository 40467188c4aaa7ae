"""The whole job by the command line on a tiny model: quantize, train, evaluate, export, and what goes wrong."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checks import assert_close, tiny_model
from safetensors.torch import load_file

from lrec import assembly, blocks, checkpoint, load, logbook, lowrank
from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
CALIBRATION = ["--num_samples", "8", "--max_length", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M`, a text file, a packed model `Q` and an adapter `A` for it."""
    place = tmp_path_factory.mktemp("cli")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 200)
    assert (
        run(place, "quantize", "--model", "M", "--bits", "2", "--group_size", "32", *CALIBRATION, "--output_dir", "Q")
        == 0
    )
    training = ["--max_steps", "12", "--learning-rate", "5e-3", "--lora_r", "8", "--max_length", "32"]
    assert run(place, "train", "--model", "Q", "--teacher", "M", *training, "--output_dir", "A") == 0
    return place


def run(place, verb, *words):
    paths = {name: str(place / name) for name in ("M", "Q", "A", "O", "text.txt")}
    words = [paths.get(word, word) for word in words]
    if verb in ("quantize", "train", "evaluate") and "--dataset" not in words:
        words += ["--dataset", paths["text.txt"]]
    return main([verb, *words])


def report(place, capsys, verb, *words):
    capsys.readouterr()
    assert run(place, verb, *words, "--json") == 0
    out = capsys.readouterr().out
    return json.loads(out)


def test_correction_brings_the_model_nearer_to_the_teacher(place, capsys):
    common = ("--teacher", "M", *CALIBRATION)
    teacher = report(place, capsys, "evaluate", "--model", "M", *common)
    packed = report(place, capsys, "evaluate", "--model", "Q", *common)
    corrected = report(place, capsys, "evaluate", "--model", "Q", "--adapter", "A", *common)
    assert teacher["kl"] < 1e-6 and teacher["top1_agreement"] == 1.0
    assert corrected["kl"] < packed["kl"]
    assert packed["num_tokens"] == 8 * 31
    files = [*(place / "Q").glob("model-*.safetensors"), place / "A" / "adapter_model.safetensors"]
    assert corrected["total_bytes"] == sum(path.stat().st_size for path in files)


def test_states_leave_gradients_on(place):
    from lrec import evaluate

    ids = torch.arange(64).reshape(2, 32)
    states = evaluate.states(load.model(str(place / "Q")), ids, batch_size=1)
    first = next(iter(states.hidden))
    assert torch.is_grad_enabled() and not first.requires_grad


def test_inspect_tells_what_the_files_hold(place, capsys):
    told = report(place, capsys, "inspect", "--model", "Q")
    assert told["num_layers"] == len(told["layers"]) == 14
    assert told["quantized_share"] == 1.0
    stored = {}
    for path in (place / "Q").glob("model-*.safetensors"):
        stored |= load_file(path)
    for row in told["layers"]:
        held = [t for name, t in stored.items() if name.startswith(row["name"] + ".")]
        assert row["bytes"] == sum(t.numel() * t.element_size() for t in held)


def test_explain_names_a_kernel_for_every_layer(place, capsys):
    told = report(place, capsys, "explain", "--model", "Q")
    assert sum(row["layers"] for row in told["layers"] if row["rows"] == 1) == 14
    assert all(row["kernel"] for row in told["layers"])


def test_rounded_activations_are_asked_for_by_a_flag(place, capsys, monkeypatch):
    monkeypatch.setenv("LREC_ACTIVATION_BITS", "")
    told = report(place, capsys, "explain", "--model", "Q", "--activation_bits", "8")
    forward = {row["kernel"] for row in told["layers"] if row["direction"] == "forward"}
    assert forward in ({"uniform_cpu_int8"}, {"reference"})
    assert run(place, "explain", "--model", "Q", "--activation_bits", "4") == 2
    assert "allowed: 8" in capsys.readouterr().err


def test_generate_is_measured_on_both_sides(place, capsys):
    short = ("--max_new_tokens", "3", "--repeats", "1", "--prompt_length", "4")
    told = report(place, capsys, "bench", "generate", "--model", "Q", "--teacher", "M", *short)
    assert told["packed_tokens_per_s"] > 0 and told["dense_tokens_per_s"] > 0


def test_merged_loads_without_lrec_and_equals_base_plus_adapter(place, capsys):
    shutil.rmtree(place / "O", ignore_errors=True)
    assert run(place, "export", "--model", "Q", "--adapter", "A", "--format", "merged", "--output_dir", "O") == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"m = AutoModelForCausalLM.from_pretrained({str(place / 'O')!r}, dtype=torch.float32); "
        "assert not any(n == 'lrec' or n.startswith('lrec.') for n in sys.modules); "
        f"torch.save(m(torch.arange(32)[None]).logits, {str(place / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    model = load.model(str(place / "Q"), str(place / "A"))
    with torch.no_grad():
        expected = model(torch.arange(32)[None]).logits
    assert_close(torch.load(place / "logits.pt"), expected, 1e-2, "bfloat16 merged logits")


def test_exported_adapter_is_a_plain_peft_repository(place):
    shutil.rmtree(place / "O", ignore_errors=True)
    assert run(place, "export", "--model", "Q", "--adapter", "A", "--format", "adapter", "--output_dir", "O") == 0
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = load.model(str(place / "Q"), str(place / "A"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "Q"), place / "O")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert checkpoint.read_json(place / "O" / "adapter_config.json")["base_model_name_or_path"] == str(place / "Q")


def test_peft_alone_refuses_an_adapter_of_another_base(place, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = ["--bits", "3", "--group_size", "32", "--method", "rtn", *CALIBRATION, "--output_dir", str(tmp_path / "Q3")]
    assert run(place, "quantize", "--model", "M", *words) == 0
    words = ["--model", "Q", "--adapter", "A", "--format", "adapter", "--base", "me/tiny", "--revision", "abc"]
    assert run(place, "export", *words, "--output_dir", str(tmp_path / "O")) == 0
    config = checkpoint.read_json(tmp_path / "O" / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", "abc")
    right, wrong = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "Q", tmp_path / "Q3"))
    for _ in ("stamp and header", "header alone"):
        with pytest.raises(ValueError, match="was made for a base with packed weights"):
            PeftModel.from_pretrained(wrong, tmp_path / "O")
        with pytest.raises(ValueError, match="was made for a base with packed weights"):
            wrong.load_adapter(str(tmp_path / "O"))
        (tmp_path / "O" / checkpoint.ADAPTER_STAMP).unlink(missing_ok=True)
    assert PeftModel.from_pretrained(right, tmp_path / "O").peft_config["default"].r == 8


def test_the_base_of_an_adapter_is_what_the_hub_calls_it(tmp_path):
    from lrec.text import origin

    revision = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--owner--some--name" / "snapshots" / revision
    assert origin(snapshot) == ("owner/some--name", revision)
    assert origin(tmp_path / "Q") == (str(tmp_path / "Q"), None)


def test_an_interrupted_pass_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    words = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--group_size", "32", *CALIBRATION]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(["quantize", *words, "--output_dir", str(straight)]) == 0
    real = blocks.layer_row

    def stop_in_the_second_block(layer, *rest):
        if layer.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return real(layer, *rest)

    monkeypatch.setattr(blocks, "layer_row", stop_in_the_second_block)
    assert main(["quantize", *words, "--output_dir", str(broken)]) == 130
    assert (broken / assembly.PROGRESS).exists() and not (broken / "config.json").exists()
    monkeypatch.undo()
    assert main(["quantize", *words, "--bits", "3", "--output_dir", str(broken)]) == 2
    assert main(["quantize", *words, "--output_dir", str(broken)]) == 0
    names = {path.name for path in straight.iterdir()}
    assert names == {path.name for path in broken.iterdir()}
    for name in names - {assembly.REPORT, logbook.FILE}:
        assert (straight / name).read_bytes() == (broken / name).read_bytes(), name


def test_without_text_a_method_sees_the_weights_alone(place, tmp_path):
    words = ["quantize", "--model", str(place / "M"), "--method", "rtn", "--group_size", "32"]
    assert main([*words, "--output_dir", str(tmp_path / "without")]) == 0
    text = ["--dataset", str(place / "text.txt"), *CALIBRATION]
    assert main([*words, *text, "--output_dir", str(tmp_path / "with")]) == 0
    without, seen = (checkpoint.read_json(tmp_path / name / assembly.REPORT) for name in ("without", "with"))
    # Without the calibration there is no order in which linears run, so that layers are told in that of the model.
    assert {row["name"]: row["sha256"] for row in without["layers"]} == {
        row["name"]: row["sha256"] for row in seen["layers"]
    }
    row = without["layers"][0]
    with torch.no_grad():
        name, full = row["name"], load_file(place / "M" / "model.safetensors")
        packed = load.model(str(tmp_path / "without")).get_submodule(name).weight
        weight = full[f"{name}.weight"]
        assert row["weight_error"] == pytest.approx(float((weight - packed).square().sum() / weight.square().sum()))
    (a, b), residual = lowrank.load(tmp_path / "without" / assembly.LOWRANK)[name], weight - packed
    best = torch.linalg.svdvals(residual)[a.shape[0] :].square().sum().sqrt()
    assert float((residual - b.float() @ a.float()).norm()) == pytest.approx(float(best), rel=1e-3)


def test_training_resumes_to_the_same_adapter(place, tmp_path):
    words = ["--model", "Q", "--teacher", "M", "--max_steps", "6", "--save_steps", "3", "--max_length", "32"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run(place, "train", *words, "--output_dir", str(straight)) == 0
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    assert run(place, "train", *words, "--output_dir", str(resumed)) == 2
    assert run(place, "train", *words, "--resume_from_checkpoint", "true", "--output_dir", str(resumed)) == 0
    first, second = (load_file(path / "adapter_model.safetensors") for path in (straight, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    halfway = load_file(straight / "checkpoint-3" / "adapter_model.safetensors")
    assert not all(torch.equal(first[key], halfway[key].to(first[key].dtype)) for key in first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["quantize", "--model", "nowhere", "--output_dir", "x"], "nowhere"),
        (["quantize", "--model", "M", "--output_dir", "Q"], "is not empty"),
        (["quantize", "--model", "M", "--output_dir", "x", "--method", "gptw"], "Did you mean 'gptq'"),
        (["quantize", "--model", "M", "--output_dir", "x", "--group_sizes", "64"], "Did you mean 'group_size'"),
        (["quantize", "--model", "M", "--output_dir", "x", "--group_size", "100"], "q_proj.*group_size = 100"),
        (["quantize", "--model", "M", "--output_dir", "x", "--max_length", "100000"], "tokens"),
        (["quantize", "--model", "Q", "--output_dir", "x"], "already"),
        (["evaluate", "--model", "Q", "--adapter", "M"], "is not a peft adapter"),
        (["train", "--model", "Q", "--output_dir", "x"], "missing --teacher, .* or --teacher_cache"),
        (["bench", "kernel"], "Did you mean 'kernels'"),
        (["inspect", "--model", "M"], "is not packed by lrec"),
        (["quantize", "--model", "M", "--output_dir", "x", "--dataset", "none"], "gptq needs calibration"),
        (["export", "--model", "Q", "--format", "adapter", "--output_dir", "x"], "needs --adapter"),
        (["export", "--model", "Q", "--format", "ggml", "--output_dir", "x"], "unknown export 'ggml'"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(place, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    if words[0] in ("quantize", "evaluate"):
        words = [words[0], *CALIBRATION, *words[1:]] if "--max_length" not in words else words
    assert run(place, *words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, told[-1]), told[-1]
    assert told[-1].startswith("lrec")


def test_nan_in_a_weight_names_the_layer(place, capsys, tmp_path):
    shutil.copytree(place / "M", tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    checkpoint.write_tensors(path, tensors)
    assert (
        run(place, "quantize", "--model", str(tmp_path / "nan"), *CALIBRATION, "--output_dir", str(tmp_path / "x")) == 2
    )
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().err


def test_an_altered_shard_is_refused_by_every_reader(place, capsys, tmp_path):
    shutil.copytree(place / "Q", tmp_path / "Q")
    path = next((tmp_path / "Q").glob("model-00001*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    words = ["--model", str(tmp_path / "Q")]
    assert run(place, "evaluate", *words, *CALIBRATION) == 2
    assert run(place, "export", *words, "--format", "merged", "--output_dir", str(tmp_path / "O")) == 2
    assert capsys.readouterr().err.count("was altered") == 2


def test_an_adapter_of_another_base_is_refused(place, capsys, tmp_path):
    words = ["--model", "M", "--bits", "3", "--group_size", "32", *CALIBRATION, "--output_dir", str(tmp_path / "Q3")]
    assert run(place, "quantize", *words) == 0
    words = ["--model", str(tmp_path / "Q3"), "--adapter", "A"]
    assert run(place, "evaluate", *words, *CALIBRATION) == 2
    assert run(place, "export", *words, "--format", "merged", "--output_dir", str(tmp_path / "O")) == 2
    assert capsys.readouterr().err.count("was made for a base with packed weights") == 2


def test_streamed_weights_train_the_same_adapter_and_memory_is_told(place, capsys, tmp_path):
    words = ["--model", "Q", "--teacher", "M", "--max_steps", "3", "--lora_r", "4", "--max_length", "32"]
    words += ["--gradient_checkpointing", "true"]
    for name, more in (("plain", []), ("streamed", ["--stream_weights"])):
        told = report(place, capsys, "train", *words, *more, "--output_dir", str(tmp_path / name))
        assert told["predicted_peak_bytes"] == sum(row["bytes"] for row in told["parts"])
        assert told["measured_peak_bytes"] > 0 and "--lean_malloc" in told["measured_with"]
    plain, streamed = (tmp_path / name / "adapter_model.safetensors" for name in ("plain", "streamed"))
    assert plain.read_bytes() == streamed.read_bytes()
    words[words.index("true")] = "false"
    assert run(place, "train", *words, "--stream_weights", "--output_dir", str(tmp_path / "x")) == 2
    assert "needs --gradient_checkpointing true" in capsys.readouterr().err


def test_help_lists_verbs_and_settings(capsys):
    assert main([]) == 0
    assert "quantize" in capsys.readouterr().out
    assert main(["quantize", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--group_size" in told and "--init_rank" in told
