"""LoRA on packed layers through peft: equal to LoRA on dense layers of the decoded weights, keeping nothing of N*K."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import validate_quantization_for_training

import lrec
from lrec.formats.uniform import Uniform
from lrec.integrations.peft import INITS, LoraPackedLinear
from lrec.nn import PackedLinear
from tests.checks import TOLERANCE, assert_close, tiny_llama

IDS = torch.arange(24).view(2, 12) * 7 % 256
UPSTREAM = torch.linspace(-1, 2, 2 * 12 * 256).view(2, 12, 256).sin()


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    """A 2-bit model with biases that are not zero."""
    model, directory = tiny_llama(attention_bias=True), tmp_path_factory.mktemp("model")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(directory / "dense")
    config = lrec.LrecQuantConfig(method="rtn", bits=2, group_size=32)
    AutoModelForCausalLM.from_pretrained(directory / "dense", quantization_config=config).save_pretrained(directory)
    return directory


def base(packed_dir, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(packed_dir, dtype=dtype)


def attach(model, seed=1, adapter_name="default", **settings):
    """The model with LoRA on all linears, A and B random."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    fill(model, adapter_name, seed)
    return model


def fill(model, adapter_name, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if f".{adapter_name}." in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraPackedLinear)}


def step(layer, x, upstream, seed=3):
    """Output, and gradients of x and of every trainable parameter, of a training step of one layer."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = layer.train()(x)
    y.backward(upstream.to(y.dtype))
    trained = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
    return {"y": y.detach(), "x": x.grad} | trained


def test_all_linear_takes_every_packed_layer_and_decodes_none(packed_dir, monkeypatch):
    model = base(packed_dir)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]

    def decode(self, rows=None):
        raise AssertionError("decoded a weight to attach an adapter")

    monkeypatch.setattr(Uniform, "unpack", decode)
    model = attach(model)
    assert len(lora_layers(model)) == len(packed) == 14
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base(packed_dir))
    validate_quantization_for_training(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.3},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1}},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_lora_on_the_decoded_weight(packed_dir, settings, dtype):
    packed = attach(base(packed_dir, dtype), **settings)
    dense = attach(base(packed_dir, dtype).dequantize(), **settings)
    assert len(lora_layers(packed)) >= 2 and not lora_layers(dense)
    for name in list(lora_layers(packed))[::3]:
        x = torch.randn(3, 5, packed.get_submodule(name).in_features).to(dtype)
        upstream = torch.randn(3, 5, packed.get_submodule(name).out_features)
        actual = step(packed.get_submodule(name), x, upstream)
        expected = step(dense.get_submodule(name), x, upstream)
        assert actual.keys() == expected.keys() and len(actual) >= 4 and actual["y"].dtype == dtype
        for part, value in actual.items():
            assert_close(value, expected[part], TOLERANCE[dtype] * 4, f"{name} {part}")


def test_a_model_is_lora_on_the_decoded_weights(packed_dir):
    found = []
    # In float64: attention amplifies a rounding of float32 some thousand times in the gradients of q and k.
    for model in (attach(base(packed_dir)).double(), attach(base(packed_dir).dequantize()).double()):
        found.append({"logits": logits(model)})
        (model.train()(IDS).logits * UPSTREAM).sum().backward()
        found[-1] |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found[0].keys() == found[1].keys() and len(found[0]) == 1 + 2 * 14
    for name, value in found[0].items():
        assert_close(value, found[1][name], TOLERANCE[torch.float64] * 20, name)


@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 64), (0, 64)])
def test_the_frozen_path_keeps_neither_input_nor_weight_for_backward(packed_dir, shape):
    model = attach(base(packed_dir))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    resident = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    x = torch.randn(shape, requires_grad=True)

    def kept(run):
        """Storages that autograd keeps alive besides the layer's own tensors, with their number of elements."""
        held = {}

        def pack(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = run()
        y.backward(torch.randn_like(y))
        return {pointer: size for pointer, size in held.items() if pointer not in resident and size}

    with model.disable_adapter():
        assert kept(lambda: layer(x)) == {}
    T = x[..., 0].numel()
    with_adapter = kept(lambda: layer(x))
    assert sum(with_adapter.values()) == T * 64 + T * 4, "the adapter keeps x and A x, the base nothing"
    assert T == 0 or x.untyped_storage().data_ptr() in with_adapter, "x itself, not a copy"


def test_several_adapters_switch_mix_and_turn_off(packed_dir):
    model, plain = base(packed_dir), logits(base(packed_dir))
    model = attach(model, seed=1, adapter_name="first")
    model = attach(model, seed=2, adapter_name="second", r=2, target_modules=["q_proj", "down_proj"]).eval()
    alone = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = logits(model)
    assert not torch.allclose(alone["first"], alone["second"]) and not torch.allclose(alone["first"], plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.set_adapter(["first", "second"])
    both = attach(base(packed_dir).dequantize(), seed=1, adapter_name="first")
    both = attach(both, seed=2, adapter_name="second", r=2, target_modules=["q_proj", "down_proj"])
    both.base_model.set_adapter(["first", "second"])
    assert_close(logits(model), logits(both), TOLERANCE[torch.float32] * 4, "both adapters")
    mixed = logits(model, adapter_names=["second", "__base__"])
    assert_close(mixed[0], alone["second"][0], TOLERANCE[torch.float32] * 4, "row with the second")
    assert_close(mixed[1], plain[1], TOLERANCE[torch.float32] * 4, "row with the base")
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model), alone["first"])


def test_saved_adapters_load_by_peft_and_by_transformers(packed_dir, tmp_path):
    model = attach(base(packed_dir)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(packed_dir), tmp_path)), expected)
    lazily = PeftModel.from_pretrained(base(packed_dir), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lazily), expected)
    native, plain = base(packed_dir), logits(base(packed_dir))
    native.load_adapter(tmp_path)
    assert len(lora_layers(native)) == 14 and torch.equal(logits(native), expected)
    native.disable_adapters()
    assert torch.equal(logits(native), plain)
    native.enable_adapters()
    native.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(base(packed_dir), tmp_path / "again")), expected)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload_is_base_plus_ba_rounded_once(packed_dir, tmp_path, dtype, safe_merge):
    model = attach(base(packed_dir, dtype)).eval()
    expected, weights, biases = logits(model), {}, {}
    for name, layer in lora_layers(model).items():
        b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
        base_NK = layer.base_layer.packed.unpack().double()
        # In float32 the sum may err by some of its own roundings, each relative to the largest term.
        weights[name] = base_NK + 8 / 4 * b @ a, 1e-6 * (base_NK.abs() + 8 / 4 * b.abs() @ a.abs())
        biases[name] = layer.base_layer.bias
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, PackedLinear | LoraPackedLinear) for module in merged.modules())
    for name, (exact_NK, slack_NK) in weights.items():
        dense = merged.get_submodule(name.removeprefix("base_model.model."))
        assert type(dense) is nn.Linear and dense.weight.dtype == dtype
        once = exact_NK.abs() * torch.finfo(dtype).eps / 2 + slack_NK
        assert ((dense.weight - exact_NK).abs() <= once).all(), name
        assert (dense.bias is None) if biases[name] is None else torch.equal(dense.bias, biases[name])
    assert_close(logits(merged), expected, TOLERANCE[dtype] * 8, "logits")
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_merging_several_dora_adapters_equals_merging_them_on_dense_layers(packed_dir):
    merged = []
    for model in (base(packed_dir), base(packed_dir).dequantize()):
        model = attach(model, seed=1, adapter_name="first", use_dora=True)
        model = attach(model, seed=2, adapter_name="second", use_dora=True)
        merged.append(logits(model.eval().merge_and_unload(adapter_names=["first", "second"])))
    assert_close(merged[0], merged[1], TOLERANCE[torch.float32] * 4, "logits")


def test_a_partly_merged_model_is_saved_as_what_it_is(packed_dir, tmp_path):
    merged = attach(base(packed_dir), target_modules=["q_proj"]).eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(again), logits(merged))
    kinds = [type(again.model.layers[0].self_attn.get_submodule(name)) for name in ("q_proj", "k_proj")]
    assert kinds == [nn.Linear, PackedLinear]


def test_unload_gives_the_packed_layers_back(packed_dir):
    model = base(packed_dir)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    plain = logits(model)
    restored = attach(model).eval().unload()
    assert all(restored.get_submodule(name) is layer for name, layer in layers.items())
    assert torch.equal(logits(restored), plain)


def test_merging_in_place_is_refused_and_changes_nothing(packed_dir):
    model = attach(base(packed_dir)).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=r"uniform\(bits=2.*merge_and_unload\(\).*export --format adapter"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


def test_merging_what_is_not_lora_is_refused(packed_dir):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = get_peft_model(base(packed_dir), config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"q_proj \(Linear\)"):
            merge()
    get_peft_model(base(packed_dir).dequantize(), config).merge_and_unload()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_inits_that_rewrite_the_base_are_refused(packed_dir, init):
    assert init not in INITS
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}'.*allowed: True"):
        attach(base(packed_dir), init_lora_weights=init)


@pytest.mark.parametrize("init", [init for init in INITS if init != "eva"])
def test_allowed_inits_leave_the_base_alone(packed_dir, init):
    model = base(packed_dir)
    before = copy.deepcopy({name: buffer for name, buffer in model.named_buffers()})
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(model, config).unload()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_modules"),
    ],
)
def test_settings_for_other_layers_are_refused(packed_dir, settings, message):
    with pytest.raises(ValueError, match=message):
        attach(base(packed_dir), **settings)


def test_saving_the_wrapped_base_is_refused(packed_dir, tmp_path):
    model = attach(base(packed_dir))
    with pytest.raises(ValueError, match="carries peft adapters"):
        model.get_base_model().save_pretrained(tmp_path)
