"""What else spreads a packed model: FSDP2, ZeRO, and accelerate's device maps."""

from functools import partial

import pytest
import torch
from checks import assert_close, run_together
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lrec
from lrec import processes, trained
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
    if processes.is_main():
        torch.save(grads, place / f"{processes.count()}.pt")


def test_fsdp2_shards_adapters_and_leaves_packed_weights_whole(tmp_path):
    gradients(tmp_path)
    run_together(partial(gradients, tmp_path))
    expected, actual = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert expected.keys() == actual.keys() and len(expected) == 28
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-5, name)


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
