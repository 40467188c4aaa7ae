"""Embeddings in CPU memory: the same rows, on the device of the rest, under the same name, never trained."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lrec import embeddings
from lrec.cpu_embeddings import OnCPU, keep_on_cpu
from lrec.head import Head, verify_head
from tests.checks import tiny_llama

IDS = torch.arange(24).view(2, 12) * 7 % 256


def frozen(**changes):
    return tiny_llama(**changes).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_dtype_and_names_stay(dtype, tmp_path):
    model, plain = frozen().to(dtype), frozen().to(dtype)
    keep_on_cpu(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert model.get_input_embeddings()(IDS).dtype == dtype
    expected = plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    verify_head(model, Head.of(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())
    model.load_state_dict(plain.state_dict())


def test_the_table_stays_and_rows_go_where_the_model_went():
    model = frozen()
    keep_on_cpu(model)
    keep_on_cpu(model)
    table = model.get_input_embeddings().weight
    model.to("meta")
    embedding = model.get_input_embeddings()
    assert embedding.weight.device.type == "cpu" and torch.equal(embedding.weight, table)
    assert embedding.weight.data_ptr() == table.data_ptr(), "not even copied"
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.device.type == "meta"
    rows = embedding(IDS)
    assert rows.device.type == "meta" and rows.shape == (2, 12, 64)
    model.model.embed_tokens.to(torch.float64)
    assert embedding.weight.dtype == torch.float64 and embedding(IDS).dtype == torch.float64


def test_an_embedding_with_arithmetic_of_its_own_keeps_it():
    settings = {"vocab_size": 256, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        "gemma3_text", **settings, num_hidden_layers=1, intermediate_size=48, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    expected = model.get_input_embeddings()(IDS)
    assert not torch.equal(expected, model.get_input_embeddings().weight[IDS]), "Gemma scales"
    keep_on_cpu(model)
    assert torch.equal(model.get_input_embeddings()(IDS), expected)
    model.to("meta")
    assert model.get_input_embeddings()(IDS).device.type == "meta"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_adapters_through_checkpoints(reentrant):
    def gradients(on_cpu):
        torch.manual_seed(0)
        model = frozen()
        if on_cpu:
            keep_on_cpu(model)
        lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
        model = get_peft_model(model, lora).train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys() and len(found) == 28
    assert all(torch.equal(g, expected[n]) for n, g in found.items())


def test_a_tied_head_keeps_the_one_table_and_says_so():
    model = frozen(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="the head is tied to the embeddings"):
        keep_on_cpu(model)
    assert not isinstance(model.get_input_embeddings(), OnCPU)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_packed_table_is_refused():
    model = frozen()
    embeddings.pack(model, 8)
    with pytest.raises(ValueError, match="this model's is packed"):
        keep_on_cpu(model)


def test_a_trained_table_is_refused():
    with pytest.raises(ValueError, match="that is trained; use embeddings=device"):
        keep_on_cpu(tiny_llama())
