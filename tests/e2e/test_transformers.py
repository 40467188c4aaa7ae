"""Packed models through transformers: packing on the fly, loading, saving, dequantizing, and what is refused."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lrec
from lrec import registry
from lrec.nn import PackedLinear
from tests.checks import TOLERANCE, assert_close, tiny_llama

IDS = torch.arange(24).view(2, 12) * 7 % 256
INT3 = {"method": "rtn", "bits": 3, "group_size": 32}
DATA_FREE = [name for name, member in registry.members("quantizers").items() if not member.needs]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def packed(model) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    """A dense model with biases that are not zero."""
    model = tiny_llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(directory := tmp_path_factory.mktemp("dense"))
    return directory


@pytest.fixture(scope="module")
def on_the_fly(dense_dir):
    return AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=lrec.LrecQuantConfig(**INT3))


@pytest.fixture
def packed_dir(on_the_fly, tmp_path):
    on_the_fly.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("method", DATA_FREE)
def test_on_the_fly_packs_as_by_hand(dense_dir, method):
    found = registry.find("quantizers", method)
    settings = {"group_size": 32} if "group_size" in found.__dataclass_fields__ else {}
    config = lrec.LrecQuantConfig(method=method, **settings)
    model, info = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config, output_loading_info=True)
    assert not any(info.values()), info
    assert config.layers is None, "the user's own config object was changed"
    stored = load_file(dense_dir / "model.safetensors")
    linears = {name for name, module in tiny_llama().named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert packed(model).keys() == linears
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    for name, layer in packed(model).items():
        expected = found(**settings)(stored[f"{name}.weight"])
        assert layer.spec == expected.spec()
        assert all(torch.equal(layer.get_buffer(key), tensor) for key, tensor in expected.tensors().items()), name
        if layer.bias is not None:
            assert torch.equal(layer.bias, stored[f"{name}.bias"])


def test_on_the_fly_computes_with_the_decoded_weights(on_the_fly):
    twin = tiny_llama(attention_bias=True)
    state = on_the_fly.state_dict()
    state = {key: value for key, value in state.items() if key in twin.state_dict()}
    twin.load_state_dict(
        state | {f"{name}.weight": layer.packed.unpack() for name, layer in packed(on_the_fly).items()}
    )
    assert_close(logits(on_the_fly), logits(twin.double()), TOLERANCE[torch.float32] * 4, "logits")


def test_reload_is_bit_identical_and_so_is_saving_again(on_the_fly, packed_dir, tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(packed_dir, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(model), logits(on_the_fly))
    assert not any(
        name.endswith("weight") for name, _ in packed(model)["model.layers.0.mlp.up_proj"].named_parameters()
    )
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(packed_dir)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), logits(on_the_fly))


def test_the_config_says_each_spec_once_and_what_the_model_weighs(on_the_fly, packed_dir):
    config = json.loads((packed_dir / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"], config["method"]) == ("lrec", 1, "rtn")
    assert config["settings"]["bits"] == 3 and config["settings"]["group_size"] == 32
    specs = [json.dumps(group["spec"], sort_keys=True) for group in config["layers"]]
    assert len(specs) == len(set(specs)) == 4  # q and o; k and v; gate and up; down
    assert {name for group in config["layers"] for name in group["modules"]} == packed(on_the_fly).keys()
    buffers = [buffer for layer in packed(on_the_fly).values() for buffer in layer.buffers()]
    weights = sum(layer.in_features * layer.out_features for layer in packed(on_the_fly).values())
    assert config["meta"]["bits_per_weight"] == sum(8 * b.numel() * b.element_size() for b in buffers) / weights


def test_nothing_but_import_lrec_is_needed(on_the_fly, packed_dir):
    code = f"""
import hashlib, sys, torch, lrec
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(packed_dir)!r})
ids = torch.arange(24).view(2, 12) * 7 % 256
with torch.no_grad():
    print(hashlib.sha256(model(ids).logits.numpy().tobytes()).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=lrec.__path__[0] + "/.."
    )
    assert done.stdout.strip() == hashlib.sha256(logits(on_the_fly).numpy().tobytes()).hexdigest(), done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype_is_the_models_and_never_the_packed_tensors(on_the_fly, packed_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(packed_dir, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    for name, layer in packed(model).items():
        assert layer.dtype == layer.weight.dtype == expected
        theirs = packed(on_the_fly)[name].packed.tensors()
        assert all(torch.equal(layer.get_buffer(key), tensor) for key, tensor in theirs.items())
        assert all(layer.get_buffer(key).dtype == tensor.dtype for key, tensor in theirs.items())
    assert logits(model).dtype == expected


def test_modules_kept_in_float32_do_not_widen_scales(packed_dir, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(packed_dir, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.scale.dtype == torch.float16 and layer.packed.spec() == layer.spec


def test_mixed_precision_and_replaced_layers_are_saved_as_they_are(dense_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=lrec.LrecQuantConfig(**INT3))
    model.hf_quantizer.quantization_config.meta["packed_sha256"] = "of the model before"
    weights = load_file(dense_dir / "model.safetensors")
    for name, bits in (("model.layers.0.self_attn.q_proj", 8), ("model.layers.1.mlp.down_proj", 2)):
        quantizer = registry.find("quantizers", "rtn")(bits=bits, group_size=16, symmetric=True)
        model.set_submodule(name, PackedLinear(quantizer(weights[f"{name}.weight"]), model.get_submodule(name).bias))
    model.set_submodule("model.layers.1.mlp.up_proj", model.model.layers[1].mlp.up_proj.to_dense())
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].self_attn.q_proj.spec["bits"] == 8
    assert type(again.model.layers[1].mlp.up_proj) is nn.Linear
    assert "packed_sha256" not in again.config.quantization_config.meta


def test_weights_that_cannot_be_packed_are_reported(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    attention, experts, other = 2 * 64 * 64 + 2 * 32 * 64, 4 * 3 * 96 * 64, 2 * 128 * 64 + 4 * 64
    with pytest.warns(UserWarning, match="only 12% of the weights are packed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=lrec.LrecQuantConfig(**INT3))
    share = model.config.quantization_config.meta["quantized_share"]
    assert share == attention / (attention + experts + other)


def test_tied_embeddings_stay_tied(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=lrec.LrecQuantConfig(**INT3))
    model.save_pretrained(tmp_path / "packed")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_loads_without_the_head(on_the_fly, packed_dir, tmp_path):
    body = AutoModel.from_pretrained(packed_dir)
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, on_the_fly.model(IDS).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(whole.model(IDS).last_hidden_state, body(IDS).last_hidden_state)


@pytest.mark.parametrize("source", ["dense", "packed"])
def test_planned_bytes_are_the_bytes_of_the_loaded_model(dense_dir, packed_dir, on_the_fly, source):
    from transformers.integrations.accelerate import compute_module_sizes
    from transformers.quantizers.auto import AutoHfQuantizer

    directory = {"dense": dense_dir, "packed": packed_dir}[source]
    config = AutoConfig.from_pretrained(directory)
    quantization = getattr(config, "quantization_config", None) or lrec.LrecQuantConfig(**INT3)
    hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=source == "packed")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        hf_quantizer.preprocess_model(model)
    held = sum(t.numel() * t.element_size() for t in (*on_the_fly.parameters(), *on_the_fly.buffers()))
    assert compute_module_sizes(model, hf_quantizer)[0][""] == held


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(on_the_fly, packed_dir, device_map):
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(packed_dir, device_map=device_map)), logits(on_the_fly)
    )


def test_dequantize_gives_the_dense_model(on_the_fly, packed_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    expected = {name: layer.packed.unpack() for name, layer in packed(model).items()}
    model.save_pretrained(tmp_path / "first")  # leaves config.dtype a string
    dense = model.dequantize()
    assert not packed(dense) and not hasattr(dense.config, "quantization_config")
    assert all(torch.equal(dense.get_submodule(name).weight, w_NK) for name, w_NK in expected.items())
    assert_close(logits(dense), logits(on_the_fly), TOLERANCE[torch.float32], "logits")
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    half = AutoModelForCausalLM.from_pretrained(packed_dir).dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32 and logits(half).isfinite().all()


def test_casting_and_autocast_follow_nn_linear(packed_dir):
    model = AutoModelForCausalLM.from_pretrained(packed_dir).to(torch.float16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.dtype == layer.weight.dtype == layer.bias.dtype == torch.float16 and layer.qweight.dtype == torch.int32
    layer, x = layer.to(torch.float32), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), layer.to_dense()(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_close(y.detach(), expected.detach(), TOLERANCE[torch.bfloat16])


def test_compiles_into_one_graph(on_the_fly):
    compiled = torch.compile(on_the_fly, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IDS).logits, logits(on_the_fly), TOLERANCE[torch.float32] * 4, "logits")


def test_keys_of_a_later_lrec_are_kept_and_ignored(on_the_fly, packed_dir, tmp_path):
    config = json.loads((packed_dir / "config.json").read_text())
    config["quantization_config"]["rotation"] = {"kind": "hadamard"}
    (packed_dir / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    assert torch.equal(logits(model), logits(on_the_fly))
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["rotation"] == {"kind": "hadamard"}
