"""Training the floats of packed weights: their gradients are those of a dense twin in float64, and no byte is kept that
need not be."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lrec import formats, lora, trained
from lrec.bench.samples import SAMPLES, sample
from lrec.eight_bits import exponents, round_scales, round_zeros
from lrec.formats.indexed import Indexed
from lrec.formats.uniform import Uniform
from lrec.nn import PackedLinear
from tests.checks import TOLERANCE, assert_close

N, K, GROUP = 41, 100, 32  # a short last group, and rows that are no multiple of 32


def uniform(zero="float", scale_bits=16, bits=2):
    codes, scale = torch.randint(0, 2**bits, (N, K)), (torch.rand(N, 4) / 9 + 0.01).half()
    zeros = {"float": (torch.randn(N, 4) + 1.5).half(), "int": torch.randint(0, 2**bits, (N, 4)), "none": None}[zero]
    if scale_bits == 8:
        scale = round_scales(scale.float(), exponents(scale.float()))
        zeros = round_zeros(zeros.float(), bits) if zero == "float" else zeros
    return Uniform.pack(codes, scale, zeros, bits, GROUP, scale_bits)


def indexed():
    held = uniform("int")
    group = torch.randint(0, 4, (K,)).int()
    return Indexed(shape=held.shape, bits=2, qweight=held.qweight, scale=held.scale, group=group, zero=held.zero)


MAKES = {
    **{name: lambda name=name: sample(name, (N, K), GROUP) for name in SAMPLES},
    "float zeros": uniform,
    "int zeros": lambda: uniform("int"),
    "8-bit": lambda: uniform(scale_bits=8),
    "symmetric": lambda: uniform("none"),
    "indexed": indexed,
}


def twin(packed, fields, x, upstream):
    """Gradients of sum(upstream * x W^T) in float64, through a finite difference of nothing: W is linear or bilinear in
    its floats, so its exact slope in each entry is the change that a unit step makes."""
    dw = upstream.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
    found = []
    for name in fields:
        value = getattr(packed, name)
        grad = torch.zeros(value.shape, dtype=torch.float64).flatten()
        for i in range(value.numel()):
            ends = []
            for step in (-0.5, 0.5):
                moved = value.clone()
                moved.view(-1)[i] += step
                ends.append(dataclasses.replace(packed, **{name: moved}).unpack().double())
            grad[i] = (dw * (ends[1] - ends[0])).sum()
        found.append(grad.view(value.shape))
    return found


@pytest.mark.parametrize("name", MAKES)
def test_gradients_of_every_format_are_those_of_a_dense_twin(name, monkeypatch):
    monkeypatch.setattr(formats, "GRADIENT_WEIGHTS", 13 * K)  # four slices, the last one short
    packed = MAKES[name]()
    fields = packed.trainable(("scales", "zeros"))
    layer = PackedLinear(packed)
    before = layer.weight
    layer.train_fields(fields)
    assert fields and torch.equal(layer.weight, before) and not layer.weight.requires_grad
    x, upstream = torch.randn(3, 5, 2 * K)[..., ::2].requires_grad_(), torch.randn(3, 1, N).expand(3, 5, N)
    y = layer(x)
    y.backward(upstream)
    assert_close(y.detach(), x.detach().double() @ before.double().t(), 1e-5)
    assert_close(x.grad, upstream.double() @ before.double(), 1e-5)
    for field, expected in zip(fields, twin(layer.packed, fields, x.detach(), upstream), strict=True):
        assert_close(getattr(layer, field).grad, expected, 2e-5, field)
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == set(fields)


@pytest.mark.parametrize("fields", [("scale",), ("zero",), ("scale", "zero")])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_ops_gradients_are_autograds_in_float64(fields, transpose, x_dtype):
    from lrec import kernels

    layer = PackedLinear(uniform("int"))
    layer.train_fields(fields)
    held = {name: tensor.detach().double().requires_grad_() for name, tensor in layer.packed.tensors().items()
            if name in ("scale", "zero") and tensor.is_floating_point()}  # fmt: skip
    group = torch.arange(K) // GROUP
    zeros = held.get("zero", layer.packed.zeros().double())
    w_NK = held["scale"][:, group] * (layer.packed.codes().double() - zeros[:, group])
    x = torch.randn(7, N if transpose else K).to(torch.bfloat16).to(x_dtype)
    upstream = torch.randn(7, K if transpose else N).to(torch.bfloat16)
    kernels.apply(x, layer.op_tensors(), layer.key, transpose).backward(upstream.to(x_dtype))
    (x.double() @ (w_NK if transpose else w_NK.t())).backward(upstream.double())
    for name in fields:
        assert_close(getattr(layer, name).grad, held[name].grad, 4 * max(TOLERANCE[x_dtype], 1e-6), name)


@pytest.mark.parametrize("zero", ["float", "int", "none"])
def test_latents_get_the_gradient_of_codes_that_were_not_rounded(zero, monkeypatch):
    monkeypatch.setattr(formats, "GRADIENT_WEIGHTS", 13 * K)
    layer = PackedLinear(uniform(zero))
    fields, before = layer.packed.trainable(("scales", "zeros", "codes")), layer.weight
    layer.train_fields(fields)
    assert torch.equal(layer.weight, before) and layer.qweight.dtype == torch.float32
    with torch.no_grad():
        layer.qweight += 1.6 * torch.rand(N, K) - 0.8
    q, group = (layer.qweight.detach() + 0.5).floor().clamp(0, 3).double(), torch.arange(K) // GROUP
    # The twin: all are leaves, and the weight is linear in the rounded codes.
    leaves = {name: getattr(layer, name).detach().double().requires_grad_() for name in fields} | {
        "qweight": q.requires_grad_()
    }
    zeros = leaves["zero"] if zero != "none" else torch.full((N, 4), 2.0, dtype=torch.float64)
    w_NK = leaves["scale"][:, group] * (leaves["qweight"] - zeros[:, group])
    x, upstream = torch.randn(5, K), torch.randn(5, N)
    layer(x).backward(upstream)
    (x.double() @ w_NK.t()).backward(upstream.double())
    expected, u = leaves["qweight"].grad, layer.qweight.detach()
    stopped = ((u < -0.5) & (expected > 0)) | ((u > 3.5) & (expected < 0))
    assert 0 < stopped.float().mean() < 0.2 and ((u < -0.5) & ~stopped).any()
    leaves["qweight"].grad = expected.masked_fill(stopped, 0)
    for name in fields:
        assert_close(getattr(layer, name).grad, leaves[name].grad, 2e-5, name)


@pytest.mark.parametrize("zero", ["float", "int", "none"])
@pytest.mark.parametrize("kinds", [("codes",), ("scales", "codes"), ("adapters", "scales", "zeros", "codes")])
def test_codes_settle_into_the_base_s_own_format(zero, kinds):
    model = torch.nn.Module()
    model.layer = PackedLinear(uniform(zero))
    before = model.layer.packed
    trained.start(model, kinds)
    with torch.no_grad():
        model.layer.qweight += 2 * torch.rand(N, K) - 1
    exact = model.layer.weight
    trained.settle(model, 16)
    after = model.layer.packed
    assert isinstance(after, Uniform) and not list(model.layer.parameters())
    assert_close(after.unpack(), exact, 2**-10)
    assert 0.2 < (after.codes() != before.codes()).float().mean() < 0.8
    assert "layer.qweight" in trained.tensors(model) and after.qweight.dtype == torch.int32
    stored = {name.removeprefix("layer."): tensor for name, tensor in trained.tensors(model).items()}
    assert torch.equal(trained.updated("layer", before, stored).unpack(), after.unpack())
    with pytest.raises(ValueError, match=r"layer: trained qweight \[41, 3\] does not fit"):
        trained.updated("layer", before, {"qweight": torch.zeros(N, 3, dtype=torch.int32)})


def kept_bytes(run):
    """Bytes of distinct storages that autograd keeps during run()."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    return sum(kept.values()), out


def test_nothing_of_the_size_of_a_weight_is_kept_and_zeros_need_the_sums_of_groups():
    x, T, G = torch.randn(64, K).requires_grad_(), 64, 4
    kept = {}
    for fields in ((), ("zero",), ("scale", "zero")):
        layer = PackedLinear(uniform())
        if fields:
            layer.train_fields(fields)
        kept[fields], _ = kept_bytes(lambda layer=layer: layer(x))
        kept[fields] -= layer.packed.nbytes
    assert kept == {(): 0, ("zero",): T * G * 4, ("scale", "zero"): T * K * 4}


def test_beside_an_adapter_x_is_kept_once():
    x = torch.randn(64, K).requires_grad_()
    a, b, upstream = torch.randn(3, K).requires_grad_(), torch.randn(N, 3).requires_grad_(), torch.randn(64, N)
    frozen, learning = PackedLinear(uniform()), PackedLinear(uniform())
    learning.become(frozen.packed)
    learning.train_fields(("scale", "zero"))
    before, _ = kept_bytes(lambda: lora.lora_linear(x, frozen, a, b, 0.5))
    after, y = kept_bytes(lambda: lora.lora_linear(x, learning, a, b, 0.5))
    assert before - frozen.packed.nbytes == after - learning.packed.nbytes
    y.backward(upstream)
    found = [x.grad, a.grad, b.grad]
    x.grad = a.grad = b.grad = None
    lora.lora_linear(x, frozen, a, b, 0.5).backward(upstream)
    assert all(torch.equal(g, t.grad) for g, t in zip(found, (x, a, b), strict=True))
    fields = ("scale", "zero")
    for field, expected in zip(fields, twin(learning.packed, fields, x.detach(), upstream), strict=True):
        assert_close(getattr(learning, field).grad, expected, 2e-5, field)


@pytest.mark.parametrize("name", MAKES)
def test_settling_stores_what_the_format_holds_and_rounds_to_it(name):
    model = torch.nn.Module()
    model.layer = PackedLinear(MAKES[name]())
    before = model.layer.packed
    trained.start(model, ("scales", "zeros") if "zeros" in before.TRAINED and before.zero is not None else ("scales",))
    with torch.no_grad():
        for parameter in model.layer.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) / 8)
    exact, changed = model.layer.weight, set(trained.tensors(model))
    assert changed >= {f"layer.{name}" for name in model.layer.trained}
    trained.settle(model)
    after = model.layer.packed
    rounding = 2**-5 if name == "8-bit" else 2**-10
    assert_close(after.unpack(), exact, rounding)
    assert not list(model.layer.parameters()) and torch.equal(after.qweight, before.qweight)
    stored = {field: t for field, t in after.tensors().items() if f"layer.{field}" in trained.tensors(model)}
    assert torch.equal(trained.updated("layer", before, stored).unpack(), after.unpack())
    if name != "int zeros" and not name.startswith("uniform"):
        assert after.nbytes == before.nbytes, "the same bytes, but where integer zeros became floats"


def test_eight_bits_for_integer_zeros_that_were_trained():
    model = torch.nn.Module()
    model.layer = PackedLinear(uniform("int"))
    trained.start(model, ("scales", "zeros"))
    exact = model.layer.weight
    trained.settle(model, scale_bits=8)
    packed = model.layer.packed
    assert packed.scale.dtype == packed.zero.dtype == torch.uint8
    assert_close(packed.unpack(), exact, 2**-5)
    wide = PackedLinear(Uniform.pack(packed.codes(), packed.scales(), packed.zeros(), 2, GROUP)).weight
    assert torch.equal(packed.unpack(), wide)


def test_small_moves_in_one_direction_survive_eight_bits():
    model = torch.nn.Module()
    scale = torch.rand(640, 8) + 0.5
    zero = round_zeros(3 * torch.rand(640, 8), 2)
    scale = round_scales(scale, exponents(scale))
    model.layer = PackedLinear(Uniform.pack(torch.randint(4, (640, 256)), scale, zero, 2, 32, 8))
    trained.start(model, ("scales", "zeros"))
    with torch.no_grad():
        model.layer.scale *= 1.004
        model.layer.zero[:, ::2] += 0.01
    trained.settle(model)
    packed = model.layer.packed
    assert (packed.scales() == scale).float().mean() > 0.6, "most stay, as steps are 1.6 to 3 %"
    assert 1.003 < (packed.scales() / scale).mean() < 1.005
    moved = packed.zeros() - zero
    assert not moved[:, 1::2].any(), "what was not moved stays"
    assert 0.008 < moved[:, ::2].mean() < 0.012 and set(moved.unique().tolist()) == {0.0, 2**-5}


def test_codes_of_eight_bits_keep_scales_of_sixteen():
    model = torch.nn.Module()
    model.layer = PackedLinear(uniform("int", bits=8))
    trained.start(model, ("scales",))
    exact = model.layer.weight
    trained.settle(model, scale_bits=8)
    assert model.layer.packed.scale.dtype == torch.float16 and torch.equal(model.layer.weight, exact)


def test_what_cannot_be_trained_is_refused_by_the_name_of_its_format():
    for kind, name, told in (
        ("zeros", "symmetric", "uniform format with a symmetric grid offers scales"),
        ("zeros", "ternary", "ternary format offers scales"),
    ):
        model = torch.nn.Module()
        model.layer = PackedLinear(MAKES[name]())
        with pytest.raises(ValueError, match=f"no layer has {kind} to train: the {told}"):
            trained.start(model, (kind,))
    model.layer = PackedLinear(MAKES["symmetric"]())
    trained.start(model, trained.ALL)
    assert model.layer.trained == ("scale",), "asked for all, what there is"
    model.layer = PackedLinear(MAKES["ternary"]())
    with pytest.raises(ValueError, match="no layer has codes to train: the ternary format offers scales"):
        trained.start(model, ("adapters", "scales", "zeros", "codes"))
    assert trained.kinds_of("all,codes") == trained.KINDS
    with pytest.raises(ValueError, match="scales"):
        trained.kinds_of("adapters,scale")
    assert trained.kinds_of("all") == trained.ALL and trained.kinds_of("zeros, scales") == ("scales", "zeros")


def test_moving_a_layer_never_rounds_what_is_trained():
    layer = PackedLinear(uniform())
    layer.train_fields(("scale", "zero"))
    before = layer.scale.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16 and layer.scale.dtype == torch.float32 and torch.equal(layer.scale, before)
