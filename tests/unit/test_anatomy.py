"""Blocks, linears and shared inputs are found in every architecture, and streaming them equals running the model."""

import pytest
import torch
from checks import tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lrec import anatomy
from lrec.stream import StreamedModel

COMMON = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256, "pad_token_id": 0}
LLAMA_LIKE = {**COMMON, "intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 2}
SLIDING = {**LLAMA_LIKE, "sliding_window": 16}
CONFIGS = [
    LlamaConfig(**LLAMA_LIKE),
    MistralConfig(**SLIDING),
    Qwen2Config(**LLAMA_LIKE),
    Qwen3Config(**LLAMA_LIKE),
    Gemma2Config(**SLIDING),
    Gemma3TextConfig(**SLIDING),
    Phi3Config(**LLAMA_LIKE),
    GPTNeoXConfig(**COMMON, intermediate_size=160),
    OPTConfig(**COMMON, ffn_dim=160, word_embed_proj_dim=64),
]
SHARED = {
    "phi3": [1, 1, 1, 1],
    "gpt_neox": [1, 1, 1, 1],
    "opt": [3, 1, 1, 1],
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_streamed_blocks_equal_the_model(config, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    input_ids = torch.randint(3, 256, (3, 40))
    outputs = []
    blocks = anatomy.find_blocks(model)
    for block in blocks.modules:
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids)

    streamed = StreamedModel(tmp_path, torch.float32)
    assert (streamed.anatomy.path, len(streamed)) == (blocks.path, 3)
    hidden, calls = streamed.embed(input_ids), streamed.block_calls(input_ids)
    for index, expected in enumerate(outputs):
        block = streamed.load(index)
        groups = anatomy.shared_inputs(block, lambda: calls[index](block, hidden))  # noqa: B023
        assert [len(group) for group in groups] == SHARED.get(config.model_type, [3, 1, 2, 1])
        with torch.no_grad():
            hidden = calls[index](block, hidden)
        assert torch.equal(hidden, expected)
        streamed.free(index)
        assert all(p.is_meta for p in block.parameters())


def test_equal_values_in_another_tensor_are_not_a_shared_input():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x) + self.b(x.clone())
            x.add_(1)
            return y + self.c(x)

    block = Block()
    with torch.no_grad():
        groups = anatomy.shared_inputs(block, lambda: block(torch.zeros(2, 4)))
    assert groups == [["a"], ["b"], ["c"]]


def test_a_model_without_blocks_is_refused_with_what_was_found():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.ModuleList([nn.Conv1d(2, 2, 1)])

    with pytest.raises(ValueError, match=r"needs a ModuleList .* found convolutions \(1 x Conv1d\)"):
        anatomy.find_blocks(Flat())
    with pytest.raises(ValueError, match="no ModuleList at all"):
        anatomy.find_blocks(nn.Linear(2, 2))


def test_a_missing_shard_is_named(tmp_path):
    tiny_model(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks {shards[1].name}"):
        StreamedModel(tmp_path, torch.float32)


def test_a_truncated_shard_is_named(tmp_path):
    tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        StreamedModel(tmp_path, torch.float32)
