"""Token weights by the end loss: those of a whole model's autograd, and what the pass makes of them."""

from functools import partial

import pytest
import torch
from checks import assert_close, tiny_model
from torch.nn import functional

from lrec import end_loss, load
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec.inputs import collect
from lrec.quantizers.gptq import GPTQ
from lrec.statistics import Collector, Statistics
from lrec.stream import StreamedModel

IDS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M`, whose logits are as sharp as a trained one's."""
    place = tmp_path_factory.mktemp("end_loss")
    tiny_model(place / "M", initializer_range=0.2)
    return place


def note(outputs, name, module, args, out):
    outputs[name] = out


def twin(model, ids_nL, seed=0):
    """(dl/dy)^2, mean over channels, of every linear and block by its full name, by one backward pass of the whole
    model."""
    model, generator = model.double(), torch.Generator().manual_seed(seed)
    found = {}
    for ids_1L in ids_nL.split(1):
        outputs = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(partial(note, outputs, name))
            for name, module in model.model.named_modules(prefix="model")
            if isinstance(module, torch.nn.Linear)
        ]
        hooks += [
            block.register_forward_hook(partial(note, outputs, f"model.layers.{i}."))
            for i, block in enumerate(model.model.layers)
        ]
        embedded = model.get_input_embeddings()(ids_1L).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
        drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
        labels = (logits.softmax(-1).cumsum(-1) < drawn).sum(-1)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        for name, grad in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            found.setdefault(name, []).append(grad[0].square().mean(-1))
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.mark.parametrize("sweep_tokens", [1, 48, 4096])
def test_weights_are_the_squared_gradients_of_the_whole_model(place, monkeypatch, sweep_tokens):
    monkeypatch.setattr(end_loss, "SWEEP_TOKENS", sweep_tokens)
    monkeypatch.setattr(end_loss, "CHUNK_TOKENS", 7)
    found = end_loss.token_weights(StreamedModel(place / "M", torch.float32), IDS)
    expected = twin(load.model(str(place / "M")), IDS)
    named = {f"model.layers.{i}.{name}": w for i, block in enumerate(found) for name, w in block.items()}
    assert named.keys() == expected.keys() and len(named) == 16
    for name, weights in named.items():
        assert weights.shape == IDS.shape
        assert_close(weights, expected[name], 1e-3, name)
    # The last block's projections of a token matter only where its own prediction, or a later one, is made.
    assert not named["model.layers.1.mlp.down_proj"][:, -1].any()


def test_groups_share_weights_by_their_rows_with_mean_one():
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 5), "c": torch.nn.Linear(4, 2)})
    weights = {"a": torch.rand(5, 6), "b": torch.rand(5, 6), "c": torch.zeros(5, 6)}
    both, none, unknown = end_loss.of_groups(weights, block, [["a", "b"], ["c"], ["a", "d"]], 2)
    expected = 3 * weights["a"] + 5 * weights["b"]
    assert [len(part) for part in both] == [12, 12, 6]
    assert_close(torch.cat(both), (expected / expected.mean()).flatten(), 1e-6)
    assert none is None and unknown is None


def test_statistics_count_tokens_by_their_weight():
    block, states = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3)}), torch.randn(3, 6, 4)
    weights = torch.rand(3, 6)
    runs = [lambda state=state: block["a"](state) for state in states]
    beside = [lambda state=state: block["a"](2 * state) for state in states]
    seen = collect(block, [["a"]], {"hessian", "cross"}, runs, beside, [list(weights)])[0]
    expected = torch.einsum("bt,btk,btl->kl", *(t.double() for t in (weights, states, states))) / 18
    assert_close(seen.hessian_KK, expected, 1e-6)
    assert_close(seen.cross_KK, 2 * expected, 1e-6)


def test_the_pass_quantizes_by_the_weighted_hessian(place):
    method, settings = GPTQ(bits=2, group_size=32), PassSettings(init_rank=0, batch_size=2, end_loss_hessian=True)
    Pass(StreamedModel(place / "M", torch.float32), method, Calibration(IDS), place / "Q", settings).run()
    full, name = load.model(str(place / "M")), "model.layers.0.mlp.down_proj"
    entering = []
    hook = full.get_submodule(name).register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.no_grad():
        full(IDS)
    hook.remove()
    w, x, weights = full.get_submodule(name).weight.detach().float(), entering[0], twin(full, IDS)[name]
    collector = Collector(w.shape[1], {"hessian"}, torch.float64)
    collector.add((weights / weights.mean()).sqrt()[..., None] * x)
    h_KK = collector.result().hessian_KK
    found = load.model(str(place / "Q")).get_submodule(name).weight
    assert (found != method(w, Statistics(num_tokens=1, hessian_KK=h_KK)).unpack()).float().mean() < 0.01
    plain = Collector(w.shape[1], {"hessian"})
    plain.add(x)
    assert (found != method(w, plain.result()).unpack()).float().mean() > 0.05
