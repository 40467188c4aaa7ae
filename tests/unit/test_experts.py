"""Fused experts taken apart compute what transformers' own forward does, and go together again unchanged."""

from functools import partial

import pytest
import torch
from checks import assert_close
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lrec import anatomy, experts, inputs

E, H, T = 4, 16, 24
SETTINGS = {"hidden_size": H, "intermediate_size": 24, "num_local_experts": E, "num_attention_heads": 4}


def drawn(module):
    """The module with random parameters, biases included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.requires_grad_(False)


def mixture():
    """A router and its experts, of (out, in) without biases, as a block holds them."""
    config = MixtralConfig(**SETTINGS, experts_implementation="eager")
    block = nn.Module()
    block.mlp = drawn(MixtralSparseMoeBlock(config))
    return block


def transposed():
    """Experts of (in, out) with biases and interleaved gates."""
    return drawn(GptOssExperts(GptOssConfig(**SETTINGS, experts_implementation="eager")))


@pytest.fixture
def routed():
    """Hidden states, two experts for each token (expert 3 for one token alone), and weights."""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    index = torch.stack([torch.arange(T) % 3, (torch.arange(T) + 1) % 3], 1)
    index[5, 1] = 3
    return x, index, torch.linspace(0.1, 0.9, 2 * T).view(T, 2)


@pytest.mark.parametrize("make", [lambda: mixture().mlp.experts, transposed], ids=["mixtral", "gpt_oss"])
def test_experts_apart_are_the_experts_together(make, routed):
    module = nn.ModuleList([make()])
    stored = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    x = routed[0].clone().requires_grad_()
    expected = module[0](x, *routed[1:])
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), x)
    kind = type(module[0])

    experts.unfuse(module)
    assert isinstance(module[0], kind) and len(module[0].down_proj) == E
    assert all(p.ndim < 3 for p in module.parameters())
    actual = module[0](x, *routed[1:])
    assert_close(actual.detach(), expected.detach(), 1e-6, "output")
    assert_close(torch.autograd.grad(actual.sin().sum(), x)[0], expected_grad, 1e-5, "gradient")
    fused = experts.fuse_tensors(module, module.state_dict())
    experts.fuse(module)
    assert type(module[0]) is kind
    for held in (fused, module.state_dict()):
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[key], stored[key]) for key in stored)


def test_routers_are_no_linears_to_pack():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared_gate, self.shared = nn.Linear(H, E), nn.Linear(H, 1), nn.Linear(H, H)
            self.experts = mixture().mlp.experts

    block = nn.Module()
    block.mlp = Router()
    experts.unfuse(block)
    assert experts.routers(block) == {"mlp.gate", "mlp.shared_gate"}
    assert set(anatomy.linears(block)) == {"mlp.shared"} | {
        f"mlp.experts.{part}.{e}" for part in ("gate_up_proj", "down_proj") for e in range(E)
    }


def test_an_expert_sees_the_tokens_routed_to_it_and_one_that_is_starved_sees_all(routed):
    block = nn.Module()
    block.experts = mixture().mlp.experts
    experts.unfuse(block)
    x, index, weight = routed
    runs = [partial(block.experts, x[part], index[part], weight[part]) for part in (slice(0, 8), slice(8, T))]
    expected = runs[0]()
    groups = inputs.groups(block, "block", runs[1])
    assert groups[-2:] == [["experts.gate_up_proj.3"], ["experts.down_proj.3"]]  # none of its tokens is in that run
    with inputs.attending(block, runs, 4) as told:
        seen = dict(zip([group[0] for group in groups], inputs.collect(block, groups, {"hessian"}, runs), strict=True))
        assert_close(runs[0](), expected, 1e-6, "output")
    assert told["experts.down_proj.3"] == {"routed_tokens": 1, "saw_all_tokens": True}
    assert told["experts.gate_up_proj.0"] == {"routed_tokens": 15, "saw_all_tokens": False}
    chosen = x[(index == 0).any(1)]
    assert_close(seen["experts.gate_up_proj.0"].hessian_KK, chosen.t() @ chosen / 15, 1e-6, "routed tokens")
    assert seen["experts.gate_up_proj.0"].num_tokens == 15
    assert_close(seen["experts.gate_up_proj.3"].hessian_KK, x.t() @ x / T, 1e-6, "all tokens")
    assert seen["experts.down_proj.3"].num_tokens == T
    assert not block.experts.attend
