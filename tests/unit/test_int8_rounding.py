"""Factors of an adapter in int8: the law of rounding, its gradient, and files of codes."""

import pytest
import torch
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lrec import lora_bits


def factor(R, K, seed=0):
    """Rows of very different sizes, one of them zero, as components of a closed form are."""
    w_RK = torch.randn(R, K, generator=torch.Generator().manual_seed(seed)) * 10.0 ** -torch.arange(R)[:, None]
    w_RK[-1] = 0
    return w_RK


@given(seed=st.integers(0, 10**6), R=st.integers(2, 9), K=st.integers(1, 41))
@settings(max_examples=40, deadline=None)
def test_each_entry_goes_to_the_nearest_level_of_its_component(seed, R, K):
    w_RK = factor(R, K, seed)
    for w, dim in ((w_RK, 1), (w_RK.t(), 0)):
        step = w.abs().amax(dim, keepdim=True).double() / 127
        off = (lora_bits.rounded(w, dim).double() - w.double()).abs()
        assert (off <= step * (0.5 + 1e-4)).all()
        largest = w.abs() == w.abs().amax(dim, keepdim=True)
        assert_close(lora_bits.rounded(w, dim)[largest], w[largest], 1e-6, "the largest entry, which is a level itself")


def test_files_give_back_what_products_see_bit_for_bit(tmp_path):
    a_RK, b_NR, other = factor(4, 41), factor(4, 23).t().contiguous(), torch.randn(5)
    path = tmp_path / "adapter_model.safetensors"
    save_file({"x.lora_A.weight": a_RK, "x.lora_B.weight": b_NR, "x.other": other}, path)
    lora_bits.store(path, 8)
    held = load_file(path)
    assert {key: tensor.dtype for key, tensor in held.items()} == {
        "x.lora_A.qweight": torch.int8,
        "x.lora_A.scale": torch.float32,
        "x.lora_B.qweight": torch.int8,
        "x.lora_B.scale": torch.float32,
        "x.other": torch.bfloat16,
    }
    assert held["x.lora_A.scale"].shape == held["x.lora_B.scale"].shape == (4,)
    assert held["x.lora_A.qweight"].abs().amax(1).tolist() == [127, 127, 127, 0]
    found = lora_bits.read(path)
    assert torch.equal(found["x.lora_A.weight"], lora_bits.rounded(a_RK, 1))
    assert torch.equal(found["x.lora_B.weight"], lora_bits.rounded(b_NR, 0))
    before = path.read_bytes()
    lora_bits.store(path, 8)
    again = lora_bits.read(path)
    assert_close(again["x.lora_B.weight"], found["x.lora_B.weight"], 1e-7, "what is on the grid stays there")
    assert len(before) == path.stat().st_size
    lora_bits.store(path, 16)
    assert not lora_bits.holds_codes(path)
    assert torch.equal(load_file(path)["x.lora_A.weight"], found["x.lora_A.weight"].bfloat16())


def test_the_gradient_is_that_of_codes_that_were_not_rounded():
    """d(code * scale): straight through for each entry, and by the scale to the largest one."""
    w = factor(3, 7).double().requires_grad_()
    upstream = torch.randn(3, 7, dtype=torch.float64)
    lora_bits.rounded(w, 1).backward(upstream)
    top, where = w.detach().abs().max(1)
    code = w.detach() / (top.clamp_min(1e-30)[:, None] / 127)
    of_scale = ((code.round() - code) * upstream).sum(1)
    expected = upstream.clone()
    expected[range(2), where[:2]] += (of_scale * w.detach().gather(1, where[:, None])[:, 0].sign() / 127)[:2]
    assert_close(w.grad[:2], expected[:2], 1e-5)
    assert_close(w.grad[2], upstream[2], 1e-6, "a component that is still zero")


def test_only_trained_halves_are_rounded_and_the_optimizer_steps_floats(monkeypatch):
    from checks import tiny_llama
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("frozen", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = dict(model.named_parameters())
    lora_bits.start(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in names.items()}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a = layer.lora_A["default"]
    assert torch.equal(a.weight, lora_bits.rounded(a._parameters["weight"], 1))
    assert not torch.equal(a.weight, a._parameters["weight"])
    assert type(layer.lora_A["frozen"]) is torch.nn.Linear
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="lora_bits = 8 is not for FSDP"):
        lora_bits.start(model)


@pytest.mark.parametrize("wrong", ["no scale", "scale of another rank", "floats"])
def test_codes_that_do_not_fit_are_refused(tmp_path, wrong):
    found = lora_bits.encode({"x.lora_A.weight": factor(4, 41)})
    if wrong == "no scale":
        del found["x.lora_A.scale"]
    elif wrong == "scale of another rank":
        found["x.lora_A.scale"] = found["x.lora_A.scale"][:3]
    else:
        found["x.lora_A.qweight"] = found["x.lora_A.qweight"].float()
    with pytest.raises(ValueError, match=r"x\.lora_A\.qweight is no int8 half"):
        lora_bits.decode(found)
