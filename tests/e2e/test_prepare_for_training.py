"""`prepare_model_for_training`: frozen, not cast, checkpointed, and not broadcast by DDP."""

import multiprocessing

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import lrec
from tests.checks import TOLERANCE, assert_close, tiny_llama

IDS = torch.arange(24).view(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    tiny_llama().save_pretrained(directory := tmp_path_factory.mktemp("dense"))
    return directory


def base(dense_dir, dtype=torch.float32):
    config = lrec.LrecQuantConfig(method="rtn", bits=2, group_size=32)
    return AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config, dtype=dtype)


def attach(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model):
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freezes_and_casts_nothing(dense_dir):
    model = base(dense_dir, torch.bfloat16)
    before = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert lrec.prepare_model_for_training(model) is model
    assert {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())} == before
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
@pytest.mark.parametrize("before_adapters", [True, False])
def test_checkpointing_changes_no_gradient(dense_dir, kwargs, before_adapters):
    expected = gradients(attach(base(dense_dir)))
    model = base(dense_dir)
    if before_adapters:
        model = attach(lrec.prepare_model_for_training(model, gradient_checkpointing_kwargs=kwargs))
    else:
        model = lrec.prepare_model_for_training(attach(model), gradient_checkpointing_kwargs=kwargs)
    blocks, calls = model.base_model.model.model.layers, []
    blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(model)
    assert len(calls) == 2, "the block runs again in backward"
    assert actual.keys() == expected.keys() and len(actual) == 28
    for name, grad in actual.items():
        assert_close(grad, expected[name], TOLERANCE[torch.float32] * 4, name)


def broadcast(rank, directory, prepare, before_adapters, rendezvous, results):
    """Puts another value into a packed buffer and into a plain one on each rank, and reports them after one forward."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{rendezvous}")
    model = base(directory)
    model.register_buffer("plain", torch.zeros(1))
    if not before_adapters:
        model = attach(model)
    if prepare:
        model = lrec.prepare_model_for_training(model)
    if before_adapters:
        model = attach(model)
    parallel = DistributedDataParallel(model)
    inner = model.base_model.model
    packed = inner.model.layers[0].self_attn.q_proj.base_layer.qweight
    with torch.no_grad():
        packed.fill_(rank + 1)
        inner.plain.fill_(rank + 1)
    parallel(IDS)
    results.put((rank, packed.unique().tolist(), inner.plain.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(
    ("prepare", "before_adapters", "packed_on_rank_1"), [(False, True, [1]), (True, True, [2]), (True, False, [2])]
)
def test_ddp_does_not_broadcast_packed_weights(dense_dir, tmp_path, prepare, before_adapters, packed_on_rank_1):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (dense_dir, prepare, before_adapters, tmp_path / "rendezvous", results)
    ranks = [context.Process(target=broadcast, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert found == [(0, [1], [1.0]), (1, packed_on_rank_1, [1.0])]
