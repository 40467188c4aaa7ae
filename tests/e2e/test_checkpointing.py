"""Checkpoints in one part or two: the gradients of no checkpointing, what is kept, and how often each part runs."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

from lrec import anatomy
from lrec.integrations.checkpointing import PARTS, enable_checkpointing, in_two_parts, split_blocks
from tests.checks import assert_close, tiny_llama

CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)
IDS = torch.arange(24).view(2, 12) * 7 % 256
SMALL = {"vocab_size": 256, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},  # attention and MLP side by side
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},  # fc1 and fc2 without a module
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}
LINEARS = {"qwen3_moe": ["q_proj", "o_proj"]}  # peft has no dropout for experts


def model_of(kind, dropout=0.0):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
    targets = LINEARS.get(kind, "all-linear")
    lora = {"target_modules": targets, "lora_dropout": dropout, "init_lora_weights": "gaussian"}
    model = get_peft_model(model, LoraConfig(r=3, task_type="CAUSAL_LM", **lora)).double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model):
    torch.manual_seed(7)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | grads


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_no_checkpointing(kind, dropout):
    model = model_of(kind, dropout)
    expected = step(model)
    for parts in ("block", "split"):
        enable_checkpointing(model, parts)
        found = step(model)
        assert found.keys() == expected.keys() and len(found) > 8
        for name, value in found.items():
            assert_close(value, expected[name], 1e-12, f"{parts} {name}")
    enable_checkpointing(model, "none")
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize(("parts", "times"), [("none", 1), ("block", 2), ("split", 2)])
def test_no_linear_runs_more_than_twice(parts, times):
    model, runs = model_of("llama"), dict.fromkeys(("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"), 0)
    enable_checkpointing(model, parts)
    for name in runs:

        def count(module, args, name=name):
            runs[name] += 1

        model.base_model.model.model.layers[1].get_submodule(name).register_forward_pre_hook(count)
    step(model)
    assert set(runs.values()) == {times}


class Kept:
    """Hooks that note the bytes of every distinct storage saved for backward, the model's own tensors left out."""

    def __init__(self, model):
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.held = {}

    def __call__(self):
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.held[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def nbytes(self):
        return sum(self.held.values())


def test_a_checkpointed_block_keeps_its_input_and_a_split_one_the_attention_output_too():
    model, kept = model_of("llama"), {}
    T, H, layers = IDS.numel(), 32, 2
    for parts in PARTS:
        enable_checkpointing(model, parts)
        hooks = Kept(model)
        with hooks():
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        kept[parts] = hooks.nbytes
        loss.backward()
    assert kept["split"] - kept["block"] == layers * T * H * 8
    assert kept["none"] > kept["split"] + layers * T * (2 * H + 48) * 8


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt"])
def test_a_part_keeps_less_than_the_block_when_it_runs_again(kind):
    model = model_of(kind)
    layer, runs = anatomy.find_blocks(model).modules[1], []

    def counting(function, *args):
        hooks = Kept(model)
        with hooks():
            out = function(*args)
        runs.append(hooks.nbytes)
        return out

    enable_checkpointing(model, "split")
    split = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = functools.partial(in_two_parts, counting, *split.args[1:])
    step(model)
    layer._gradient_checkpointing_func = counting
    step(model)
    first, second, whole = runs
    assert max(first, second) < 0.75 * whole


@pytest.mark.parametrize("parts", ["block", "split"])
def test_offloading_moves_what_checkpoints_keep_and_nothing_else(parts, monkeypatch):
    model = model_of("llama")
    expected, moved, save_on_cpu = step(model), [], modeling_utils.save_on_cpu

    def watched(**settings):
        hooks = save_on_cpu(**settings | {"pin_memory": False})  # which torch has only where there is a GPU
        pack = hooks.pack_hook

        def note(tensor):
            moved.append(tuple(tensor.shape))
            return pack(tensor)

        hooks.pack_hook = note
        return hooks

    monkeypatch.setattr(modeling_utils, "save_on_cpu", watched)
    enable_checkpointing(model, parts, offload=True)
    found = step(model)
    for name, value in found.items():
        assert_close(value, expected[name], 1e-12, name)
    # Two blocks: the input of each; split, the input of both of its parts and the attention's output.
    assert [shape for shape in moved if shape != (0,)] == [(2, 12, 32)] * (2 if parts == "block" else 6)


def test_a_child_that_runs_twice_in_a_block_is_answered_once():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.mlp = (torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh()) for _ in range(2))

        def forward(self, x):
            return self.mix(2 * self.mix(x)) + self.mlp(x)

    block, x = Block().double(), torch.randn(3, 5, dtype=torch.float64)
    found = []
    for run in (block, functools.partial(in_two_parts, CHECKPOINT, [block.mix, block.mlp], block.forward)):
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
        block.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_without_two_parts_is_refused():
    model = tiny_llama()
    for block in model.model.layers:
        block.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"split needs blocks with two parts.*LlamaDecoderLayer"):
        enable_checkpointing(model, "split")
    plain = torch.nn.Sequential()
    plain.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2))
    with pytest.raises(ValueError, match="which Sequential is not"):
        split_blocks(plain)
