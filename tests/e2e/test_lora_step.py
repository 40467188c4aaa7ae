"""The fused LoRA step on packed layers: the values and gradients of peft in float64, and no byte kept in vain."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from lrec import anatomy, kernels
from lrec.formats.uniform import Uniform
from lrec.integrations.peft import LoraPackedLinear
from lrec.nn import PackedLinear
from tests.checks import TOLERANCE, assert_close, tiny_llama

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
R = 3


def packed(N, K, bias=True, group_size=32):
    g = torch.Generator().manual_seed(N + K)
    groups = -(-K // group_size)
    codes = torch.randint(0, 4, (N, K), generator=g, dtype=torch.int32)
    scale, zero = torch.rand(N, groups, generator=g) / 9 + 0.01, torch.randn(N, groups, generator=g) + 1.5
    return PackedLinear(Uniform.pack(codes, scale, zero, 2, group_size), torch.randn(N, generator=g) if bias else None)


class One(nn.Module):
    """A model of one linear, for peft."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def lora_layer(layer, dtype, **settings):
    """The layer under a random adapter of rank 3 and scaling 2/3, trained in `dtype`."""
    config = LoraConfig(**{"r": R, "lora_alpha": 2, "target_modules": ["layer"]} | settings)
    wrapped = get_peft_model(One(layer), config).base_model.model.layer.train()
    for name, parameter in wrapped.named_parameters():
        if "lora" in name:
            g = torch.Generator().manual_seed(len(name))
            parameter.data = (torch.randn(parameter.shape, generator=g) * 0.3).to(BF16).to(dtype)
    return wrapped


def gradients(layer, x, upstream):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream.to(y.dtype).expand_as(y))
    weights = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | weights


@pytest.mark.parametrize("slices", [1, 5])
@pytest.mark.parametrize("shape", [(7, 3, 41), (1, 41), (0, 41), (1, 33, 41)], ids=str)
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "autocast"),
    [(FP64, FP64, None), (FP32, FP32, None), (BF16, BF16, None), (BF16, FP32, None), (FP32, BF16, None),
     (BF16, FP32, BF16), (FP32, FP32, BF16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_values_and_gradients_are_pefts_in_float64(x_dtype, dtype, autocast, shape, slices, dropout, monkeypatch):
    monkeypatch.setattr(kernels, "CAST_ELEMENTS", max(1, torch.Size(shape).numel() // slices))
    base = packed(29, 41)
    fused = lora_layer(base, dtype, lora_dropout=dropout)
    assert type(fused) is LoraPackedLinear and fused._plain_adapters() == ["default"]
    exact = lora_layer(base.to_dense(FP64), FP64, lora_dropout=dropout)
    assert type(exact) is PeftLinear
    x = torch.randn(*shape[:-1], 2 * 41).to(BF16).to(x_dtype)[..., ::2]
    upstream = torch.randn(*shape[:-1], 29).to(BF16)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        found = gradients(fused, x, upstream)
    expected = gradients(exact, x.double(), upstream.double())
    assert found["y"].dtype == (autocast or x_dtype) and found["x"].dtype == x_dtype
    tolerance = 4 * max(TOLERANCE[t] for t in (x_dtype, dtype, autocast or dtype))
    assert found.keys() == expected.keys() and len(found) == 4
    for part, value in found.items():
        assert_close(value, expected[part], tolerance, part)


def test_a_row_of_upstream_that_is_expanded_and_frozen_parts():
    base = packed(29, 41)
    fused, exact = lora_layer(base, FP64), lora_layer(base.to_dense(FP64), FP64)
    x, upstream = torch.randn(4, 41, dtype=FP64), torch.randn(1, 29, dtype=FP64)
    for layer in (fused, exact):
        layer.lora_A["default"].weight.requires_grad_(False)
    found, expected = gradients(fused, x, upstream), gradients(exact, x, upstream)
    assert found.keys() == expected.keys() == {"y", "x", "lora_B.default.weight"}
    for part, value in found.items():
        assert_close(value, expected[part], 1e-12, part)
    with pytest.raises(ValueError, match="x has 40 columns"):
        fused(x[:, 1:])


def block_of(model):
    return model.base_model.model.model.layers[0]


def lora_llama(dtype):
    """A tiny Llama in `dtype` with packed linears under fp32 adapters."""
    model = tiny_llama().to(dtype)
    for name, linear in list(anatomy.linears(model.model.layers).items()):
        layer = packed(linear.out_features, linear.in_features, bias=False)
        layer.dtype = dtype
        model.model.layers.set_submodule(name, layer)
    config = LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    return get_peft_model(model, config).train()


def kept_bytes(model, x, autocast):
    """Bytes of all distinct storages that one block keeps for backward, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    rotary = model.base_model.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    context = torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext()
    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block_of(model)(x.requires_grad_(), position_embeddings=rotary)
    y.sum().backward()
    return sum(held.values())


@pytest.mark.parametrize(("dtype", "autocast"), [(FP32, False), (BF16, False), (BF16, True), (FP32, True)])
def test_a_block_keeps_each_shared_input_once_and_nothing_else_for_lora(dtype, autocast, monkeypatch):
    model, T, H, M = lora_llama(dtype), 24, 64, 160
    x = torch.randn(1, T, H).to(dtype)
    with model.disable_adapter():
        without = kept_bytes(model, x, autocast)
    fused = kept_bytes(model, x, autocast) - without
    monkeypatch.setattr(LoraPackedLinear, "forward", PeftLinear.forward)
    by_peft = kept_bytes(model, x, autocast) - without
    low = 2 if autocast else dtype.itemsize
    # Inputs of (q, k, v), (gate, up) and down; the one of o is kept by attention already.
    inputs = T * (H + H) * dtype.itemsize + T * M * low
    a_x = 7 * T * R * (2 if autocast else 4)
    assert fused == inputs + a_x
    if dtype is FP32 and not autocast:
        assert by_peft == fused
    else:
        wide = 2 if autocast else 4
        assert by_peft >= T * (3 * H + 2 * H + M) * wide + a_x > fused


def test_a_hook_on_a_part_of_the_adapter_is_called():
    layer, seen = lora_layer(packed(29, 41), FP32), []
    x = torch.randn(2, 41)
    expected = layer(x).detach()
    handle = layer.lora_A["default"].register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close(layer(x).detach(), expected, 1e-6)
    assert len(seen) == 1
    handle.remove()
    layer(x)
    assert len(seen) == 1


def test_compiles_into_one_graph():
    layer, x, upstream = lora_layer(packed(29, 41), FP32), torch.randn(3, 41), torch.randn(29)
    expected = gradients(layer, x, upstream)
    layer.zero_grad()
    found = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True), x, upstream)
    for (name, value), reference in zip(found.items(), expected.values(), strict=True):
        assert_close(value, reference, 1e-6, name)
