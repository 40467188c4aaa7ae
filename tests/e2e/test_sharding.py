"""What else spreads a packed model: FSDP2, ZeRO, and accelerate's device maps."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import assert_close, run_together, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lrec
from lrec import checkpoint, processes, trained
from lrec.cli import main
from lrec.head import Head
from lrec.losses import Objective, divergence, shift_labels
from lrec.teacher import LiveTeacher, final_hidden
from lrec.trainer import LrecConfig
from tests.checks import tiny_llama
from tests.e2e import test_trainer

IDS = torch.arange(24).view(2, 12) * 7 % 256


def gradients(place):
    """The mean KL's gradients over four windows, of which each of two processes has two under FSDP2."""
    processes.state() if processes.count() > 1 else None
    full = test_trainer.teacher_model()
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model, teacher = get_peft_model(test_trainer.packed_model(full), lora), LiveTeacher(full)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    if processes.count() > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (processes.count(),))
        for part in (*model.get_base_model().model.layers, model):
            fully_shard(part, mesh=mesh)
    ids = torch.tensor(test_trainer.windows(4)["input_ids"])[processes.own(4)]
    hidden = final_hidden(model, input_ids=ids).flatten(0, 1)
    targets = teacher.targets({"input_ids": ids})
    found = divergence(hidden, Head.of(model), targets, shift_labels(ids), Objective())
    (found.loss / found.num_tokens).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if processes.count() > 1:
        assert all(isinstance(grad, DTensor) for grad in grads.values())
        assert not any(isinstance(layer.qweight, DTensor) for layer in trained.layers_of(model).values())
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` says it
        with pytest.raises(ValueError, match=r"FSDP was asked for.*\(2 x cpu\): give each process a GPU, or leave"):
            test_trainer.trainer(place)
    if processes.is_main():
        torch.save(grads, place / f"{processes.count()}.pt")


def test_fsdp2_shards_adapters_and_leaves_packed_weights_whole(tmp_path):
    gradients(tmp_path)
    run_together(partial(gradients, tmp_path))
    expected, actual = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert expected.keys() == actual.keys() and len(expected) == 28
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-5, name)


def train(place, kind, *words):
    """One step of gradient descent on two batches of two windows, accumulated, whatever processes share them."""
    words = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--teacher_targets", "live", *words]
    words += ["--dataset", str(place / "text.txt"), "--num_samples", "4", "--max_length", "32", "--lora_r", "4"]
    words += ["--max_steps", "1", "--save_steps", "1", "--optim", "sgd", "--lr_scheduler_type", "constant"]
    words += ["--warmup_steps", "0", "--learning_rate", "1", "--max_grad_norm", "0"]
    words += ["--per_device_train_batch_size", str(2 // processes.count()), "--gradient_accumulation_steps", "2"]
    assert main(["train", *words, "--output_dir", str(place / kind)]) == 0


def train_by_zero(place):
    """ZeRO-1 as a flag asks for it, then ZeRO-2 as `accelerate launch` does."""
    import deepspeed
    from accelerate import Accelerator

    deepspeed.ops.__compatible_ops__ = {}  # gloo alone: its own shared memory takes a minute to be compiled
    prepared, prepare = [], Accelerator.prepare

    def note(*args, **kwargs):
        prepared.append(prepare(*args, **kwargs))
        return prepared[-1]

    Accelerator.prepare = note
    train(place, "zero-1", "--deepspeed", str(place / "zero-1.json"))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    train(place, "zero-2")
    engines = [part for parts in prepared for part in parts if isinstance(part, deepspeed.DeepSpeedEngine)]
    assert [engine.zero_optimization_stage() for engine in engines] == [1, 2]


def test_a_step_by_zero_1_and_2_is_that_of_one_process(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    tiny_model(tmp_path / "M")
    (tmp_path / "text.txt").write_text("".join(f"{i} {chr(97 + i % 26) * (i % 7)} " for i in range(400)))
    rtn = ["--method", "rtn", "--bits", "3", "--group_size", "32", "--output_dir", str(tmp_path / "Q")]
    assert main(["quantize", "--model", str(tmp_path / "M"), *rtn]) == 0
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    (tmp_path / "zero-1.json").write_text(json.dumps(auto | {"zero_optimization": {"stage": 1}}))
    train(tmp_path, "one")
    run_together(partial(train_by_zero, tmp_path))
    file = Path("checkpoint-1", checkpoint.ADAPTER_WEIGHTS)
    expected = load_file(tmp_path / "one" / file)
    moved = [name for name, tensor in expected.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(expected) == 28 and len(moved) == 14
    for kind in ("zero-1", "zero-2"):
        actual = load_file(tmp_path / kind / file)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(actual[name], tensor, 1e-5, f"{name} by {kind}")


def test_zero_3_is_refused(tmp_path, monkeypatch):
    told = r"ZeRO-3 shards parameters.*use ZeRO-2"
    with pytest.raises(ValueError, match=told):
        LrecConfig(str(tmp_path), use_cpu=True, deepspeed={"zero_optimization": {"stage": 3}})
    # As `accelerate launch --use_deepspeed --zero_stage 3` says it.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match=told):
        LrecConfig(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_model_split_between_memory_and_disk(tmp_path, offload_buffers):
    tiny_llama().save_pretrained(tmp_path / "M")
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path / "M", quantization_config=lrec.LrecQuantConfig(method="rtn", bits=3, group_size=32)
    )
    whole.save_pretrained(tmp_path / "Q")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "Q", device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "away",
        offload_buffers=offload_buffers,
    )  # fmt: skip
    with torch.no_grad():
        expected = whole(IDS).logits
        for _ in range(2):  # the weights come back each time
            assert torch.equal(split(IDS).logits, expected)
    assert split.model.layers[1].mlp.up_proj.qweight.is_meta == offload_buffers
    if offload_buffers:
        with pytest.raises(ValueError, match=r"7 packed layers, such as model\.layers\.1.*--stream_weights"):
            lrec.prepare_model_for_training(split)
        return
    model = get_peft_model(lrec.prepare_model_for_training(split), LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)
