"""Two processes against one: the same statistics, packed weights, caches, gradients, evaluations and adapters."""

import json
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checks import assert_close, run_together, tiny_model
from datasets import Dataset
from safetensors.torch import load_file

from lrec import assembly, blocks, checkpoint, formats, inputs, processes, trained
from lrec.cli import main
from tests.e2e import test_trainer

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
# Seven windows in batches of two: neither windows nor batches are as many for each of two processes.
DATA = ["--num_samples", "7", "--max_length", "32", "--batch_size", "2"]
# What a pass can be asked for: each has its own way through several processes.
QUANTIZE = {
    "end_loss": ["--method", "rtn", "--bits", "4", "--end_loss_hessian", "true", *DATA],
    "match": ["--method", "rtn", "--bits", "4", "--match_upstream", "0.5", *DATA],
    "gptq": ["--bits", "3", "--correct_stream", "true", *DATA],
    "target": ["--target_bpw", "3.2", *DATA],
    "no_data": ["--method", "rtn", "--bits", "4"],
}
CACHE = {"hidden": [], "topk": ["--what", "topk", "--top_k", "16", "--sampling", "true"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, a text, and what one process and then two make of them."""
    place = tmp_path_factory.mktemp("several")
    tiny_model(place / "M")
    (place / "text.txt").write_text("".join(f"{i} {TEXT}" for i in range(200)))
    for kind in ("one", "two"):
        (place / kind).mkdir()
    make_all(place, "one")
    leave_unfinished(place)
    run_together(partial(make_all, place, "two"))
    return place


def make_all(place, kind):
    for name, words in QUANTIZE.items():
        quantize(place, kind, name, words)
    for name, words in CACHE.items():
        cache(place, kind, name, words)
    gradients(place, kind)
    train(place, kind, "adapter")
    if kind == "two":
        go_on(place)


def leave_unfinished(place):
    """What one process leaves of a pass that is interrupted, and of a capture, for two to go on with."""
    real = blocks.layer_row

    def stop_in_the_second_block(layer, *rest):
        if layer.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return real(layer, *rest)

    blocks.layer_row = stop_in_the_second_block
    try:
        quantize(place, "two", "resumed", QUANTIZE["gptq"], code=130)
    finally:
        blocks.layer_row = real
    half = place / "two" / "cache-resumed"
    shutil.copytree(place / "one" / "cache-hidden", half)
    manifest = checkpoint.read_json(half / checkpoint.MANIFEST)
    for name in sorted(manifest["files"])[-3:]:
        (half / name).unlink()
        del manifest["files"][name]
    checkpoint.write_json(half / checkpoint.MANIFEST, manifest)


def go_on(place):
    """Two processes finish what one has begun, and a training of their own without its last checkpoint."""
    quantize(place, "two", "resumed", QUANTIZE["gptq"])
    cache(place, "two", "resumed", CACHE["hidden"])
    if processes.is_main():
        again = shutil.copytree(place / "two" / "adapter", place / "two" / "adapter-resumed")
        shutil.rmtree(again / "checkpoint-4")
        for path in again.glob("*.*"):
            path.unlink()
    processes.wait()
    train(place, "two", "adapter-resumed", "--resume_from_checkpoint", "true")


def quantize(place, kind, name, words, code=0):
    """Packs the model, and keeps the statistics that the quantizer was given."""
    words = ["--model", str(place / "M"), "--output_dir", str(place / kind / name), "--group_size", "32", *words]
    words += ["--dataset", str(place / "text.txt")] if "--num_samples" in words else []
    seen, collect = [], inputs.collect

    def note(*args, **kwargs):
        seen.append(collect(*args, **kwargs))
        return [*seen[-1]]

    inputs.collect = note
    try:
        assert main(["quantize", *words]) == code
    finally:
        inputs.collect = collect
    if processes.is_main():
        torch.save([[vars(found) for found in block] for block in seen], place / kind / f"{name}.pt")


def cache(place, kind, name, words):
    # Eleven windows in shards of two: six shards, the last one short.
    words = ["--num_samples", "11", "--max_length", "32", "--sweep_tokens", "64", *words]
    words += ["--model", str(place / "M"), "--dataset", str(place / "text.txt")]
    assert main(["cache", *words, "--output_dir", str(place / kind / f"cache-{name}")]) == 0


def gradients(place, kind):
    """The gradients of a step of two windows twice, accumulated, whatever processes share them; of rows of unequal
    length, and of adapters, scales and zeros."""
    rows, own = 2 // processes.count(), {}
    run = test_trainer.trainer(
        place / kind, test_trainer.ragged(), max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trained.start(run.model, trained.ALL)
    found = test_trainer.stirred_gradients(run)
    if processes.count() > 1:
        # Were packed weights broadcast at a forward, the other process's codes would be lost.
        ids = torch.arange(8)[None]
        for layer in trained.layers_of(run.model).values():
            layer.qweight.fill_(processes.index())
        run.model_wrapped(input_ids=ids)
        own = {f"codes.{name}": layer.qweight for name, layer in trained.layers_of(run.model).items()}
    # Seven windows in batches of two: of two processes one evaluates a window twice.
    held_out = Dataset.from_dict(
        {"input_ids": torch.randint(0, 200, (7, 24), generator=torch.Generator().manual_seed(5)).tolist()}
    )
    found["eval"] = test_trainer.trainer(place / kind, per_device_eval_batch_size=2).evaluate(held_out)
    torch.save(found | own, place / kind / f"gradients-{processes.index()}.pt")


def train(place, kind, name, *more):
    """Trains everything that can be on the packed model, from a cache that is made first, with evaluations."""
    words = ["--model", str(place / "one" / "gptq"), "--teacher", str(place / "M"), "--teacher_targets", "hidden"]
    words += ["--dataset", str(place / "text.txt"), "--num_samples", "27", "--max_length", "32", "--train", "all"]
    words += ["--max_steps", "4", "--eval_steps", "2", "--eval_samples", "3", "--lora_r", "4", "--use_cpu", "true"]
    words += ["--per_device_train_batch_size", str(4 // processes.count()), "--per_device_eval_batch_size", "2"]
    words += ["--learning_rate", "1e-4", "--scales_learning_rate", "1e-4"]
    words += ["--save_total_limit", "3", *more]
    assert main(["train", *words, "--output_dir", str(place / kind / name)]) == 0


def packed(directory):
    tensors = {}
    for path in directory.glob("model-*.safetensors"):
        tensors |= load_file(path)
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["layers"]
    return {
        name: formats.build({key: tensors[f"{name}.{key}"] for key in group["spec"]["tensors"]}, group["spec"])
        for group in groups
        for name in group["modules"]
    }


def test_a_launch_prints_one_report(place, tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lrec", "quantize", "--json"]
    command += ["--model", place / "M", "--output_dir", tmp_path / "Q", "--group_size", "32", *QUANTIZE["no_data"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["num_layers"] == 14
    expected, actual = packed(place / "one" / "no_data"), packed(tmp_path / "Q")
    assert all(torch.equal(actual[name].unpack(), weight.unpack()) for name, weight in expected.items())


def test_what_several_processes_cannot_share_is_refused(place, tmp_path, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "state", lambda: SimpleNamespace(device=torch.device("cpu")))
    words = ["--model", str(place / "M"), "--output_dir", str(tmp_path / "Q"), "--dataset", str(place / "text.txt")]
    words += ["--num_samples", "4", "--max_length", "32"]
    for asked, told in (
        (["evaluate", "--model", "M"], "3 processes were started, but this is one process's work"),
        (["quantize", *words, "--method", "ptq161"], "refine_epochs above 0 train a block on one window"),
        (["quantize", *words, "--preprocess", "kl"], "start `lrec quantize` without `accelerate launch`"),
        (["quantize", *words, "--batch_size", "2"], "2 batches of 2 calibration windows"),
    ):
        assert main(asked) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "Q").exists()


@pytest.mark.parametrize("name", [name for name in QUANTIZE if name != "no_data"])
def test_statistics_are_those_of_one_process(place, name):
    one, two = (torch.load(place / kind / f"{name}.pt", weights_only=True) for kind in ("one", "two"))
    assert len(one) == len(two) == 2 + 2 * (name == "target")
    # Where weights do not depend on the data all blocks see the same; else one tie that is rounded the other way would
    # be told apart here.
    blocks_seen = [*zip(one, two, strict=True)][: None if name == "end_loss" else 1]
    for i, (expected, actual) in enumerate(blocks_seen):
        for group, (wanted, found) in enumerate(zip(expected, actual, strict=True)):
            for key, value in wanted.items():
                if isinstance(value, torch.Tensor):
                    assert_close(found[key], value, 1e-6, f"{key} of block {i}, group {group}")
                else:
                    assert found[key] == value


@pytest.mark.parametrize("name", QUANTIZE)
def test_packed_weights_are_those_of_one_process(place, name):
    expected, actual = (packed(place / kind / name) for kind in ("one", "two"))
    reports = [checkpoint.read_json(place / kind / name / assembly.REPORT) for kind in ("one", "two")]
    assert expected.keys() == actual.keys() and len(expected) == 14
    for layer, weight in expected.items():
        assert actual[layer].spec() == weight.spec(), layer
        w, found = weight.unpack(), actual[layer].unpack()
        # A tie rounded the other way is fed back to the rest of its row.
        close = ((w - found).abs() <= 1e-3 * w.abs().mean()).float().mean()
        assert close == 1 if name in ("end_loss", "no_data") else close > 0.95, f"{layer}: {close}"
    for one, two in zip(*(report["layers"] for report in reports), strict=True):
        key = "weight_error" if name == "no_data" else "error"
        assert one["name"] == two["name"] and abs(one[key] - two[key]) <= 0.05 * one[key], one["name"]
    factors = [load_file(place / kind / name / assembly.LOWRANK) for kind in ("one", "two")]
    assert factors[0].keys() == factors[1].keys() and len(factors[0]) == 28


@pytest.mark.parametrize("name", CACHE)
def test_a_shared_capture_writes_the_bytes_of_one(place, name):
    one, two = (place / kind / f"cache-{name}" for kind in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 6 + 2 and names == sorted(path.name for path in two.iterdir())
    for file in names:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_gradients_are_those_of_one_process_with_the_same_batch(place):
    expected = torch.load(place / "one" / "gradients-0.pt", weights_only=True)
    assert len(expected) == 14 * 4 + 1
    for rank in range(2):
        actual = torch.load(place / "two" / f"gradients-{rank}.pt", weights_only=True)
        codes = {name: actual.pop(name) for name in [*actual] if name.startswith("codes.")}
        assert len(codes) == 14 and all((held == rank).all() for held in codes.values())
        assert actual.keys() == expected.keys()
        for key in ("eval_loss", "eval_kl"):
            assert abs(actual["eval"][key] - expected["eval"][key]) <= 1e-5 * expected["eval"][key], key
        for name in expected.keys() - {"eval"}:
            assert_close(actual[name], expected[name], 1e-5, f"{name} on rank {rank}")


def test_two_processes_go_on_where_one_or_two_have_stopped(place):
    expected, actual = (packed(place / kind) for kind in ("one/gptq", "two/resumed"))
    for layer, weight in expected.items():
        same = torch.equal(actual[layer].unpack(), weight.unpack())
        assert same or not layer.startswith("model.layers.0."), layer
    assert checkpoint.read_json(place / "two/resumed" / checkpoint.MANIFEST)["method"] == "gptq"
    for path in (place / "one" / "cache-hidden").iterdir():
        assert (place / "two" / "cache-resumed" / path.name).read_bytes() == path.read_bytes(), path.name
    for file in (checkpoint.ADAPTER_WEIGHTS, checkpoint.BASE_TENSORS):
        straight, resumed = (load_file(place / "two" / name / file) for name in ("adapter", "adapter-resumed"))
        assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items()), file


def test_training_is_that_of_one_process(place):
    one, two = (place / kind / "adapter" for kind in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for file in (checkpoint.ADAPTER_WEIGHTS, checkpoint.BASE_TENSORS):
        expected, actual = (load_file(directory / file) for directory in (one, two))
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            # Adam makes a whole step of a gradient that is all rounding; and what is saved is rounded itself.
            assert_close(actual[name].float(), tensor.float(), 1e-2, name)
    stamps = [checkpoint.read_stamp(directory) for directory in (one, two)]
    assert [row["step"] for row in stamps[1]["evaluations"]] == [2, 4]
    for a, b in zip(*(stamp["evaluations"] for stamp in stamps), strict=True):
        assert abs(a["eval_kl"] - b["eval_kl"]) <= 1e-4 * a["eval_kl"]
