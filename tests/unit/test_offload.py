"""Packed weights that visit block by block: the same bits in loss and gradients, and never more than two blocks."""

import weakref

import pytest
import torch
from checks import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lrec import LrecQuantConfig, checkpoint, load, offload, prepare_model_for_training


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("offload")
    tiny_model(place / "M", num_hidden_layers=5)
    config = LrecQuantConfig(method="rtn", bits=2, group_size=32)
    AutoModelForCausalLM.from_pretrained(place / "M", quantization_config=config).save_pretrained(place / "Q")
    return place / "Q"


def step(model):
    """Loss and gradients of a training step, evaluation before and after it."""
    torch.manual_seed(0)
    model = prepare_model_for_training(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(48).reshape(2, 24)
    losses = []
    for train in (False, True, True, False):
        model.train(train)
        with torch.set_grad_enabled(train):
            losses.append(model(input_ids=ids, labels=ids).loss)
        if train:
            losses[-1].backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_a_step_with_streamed_weights_is_the_same_step_with_two_blocks_at_most(packed_dir, monkeypatch):
    expected_losses, expected = step(load.model(str(packed_dir)))
    order, alive, most = [], [], []
    fetch = offload.Offload.fetch

    def watched(self, index):
        order.append(index)
        found = fetch(self, index)
        tensors = [tensor for layer in found.values() for tensor in layer.values()]
        alive.append([weakref.ref(t.untyped_storage()) for t in tensors])
        most.append(sum(any(ref() is not None for ref in block) for block in alive))
        return found

    monkeypatch.setattr(offload.Offload, "fetch", watched)
    losses, gradients = step(offload.load(packed_dir, torch.device("cpu"), torch.float32))
    assert torch.equal(losses, expected_losses)
    assert gradients.keys() == expected.keys() and all(g is not None and g.any() for g in expected.values())
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    assert max(most) == 2
    # A forward and a backward through 5 blocks turn at the last one, which is fetched once.
    assert "4, 3, 2, 1, 0" in str(order)[1:-1] and "0, 1, 2, 3, 4" in str(order)[1:-1]


def test_a_missing_or_foreign_tensor_is_named(packed_dir):
    model = offload.load(packed_dir, torch.device("cpu"), torch.float32)
    key = "model.layers.1.mlp.up_proj.scale"
    path = model.lrec_offload.files.pop(key)
    with pytest.raises(ValueError, match=key):
        model.lrec_offload.fetch(1)
    model.lrec_offload.files[key] = path.with_name("other.safetensors")
    checkpoint.write_tensors(path.with_name("other.safetensors"), {key: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"{key} is torch.float32 \[3\].*another model"):
        model.lrec_offload.fetch(1)


def test_a_dense_model_has_nothing_to_stream(tmp_path):
    tiny_model(tmp_path)
    with pytest.raises(ValueError, match="lrec quantize"):
        offload.load(tmp_path, torch.device("cpu"), torch.float32)
