"""The pass that fits layers and factors to the full-precision model's outputs on the quantized model's inputs."""

import pytest
import torch
from checks import assert_close, tiny_model

from lrec import assembly, load, lowrank
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec.quantizers.gptq import GPTQ
from lrec.quantizers.rtn import RTN
from lrec.statistics import NEEDS, Collector, matched
from lrec.stream import StreamedModel

IDS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))
METHOD = GPTQ(bits=2, group_size=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M` and `Q`, packed from it in one go."""
    place = tmp_path_factory.mktemp("match")
    tiny_model(place / "M")
    quantize(place, "Q")
    return place


def quantize(place, output):
    settings = PassSettings(init_rank=4, batch_size=2, match_upstream=1.0)
    streamed = StreamedModel(place / "M", torch.float32)
    return Pass(streamed, METHOD, Calibration(IDS), place / output, settings).run()


def entering(model, name):
    """What enters a module while the whole model runs over all windows, in float64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return seen[0].flatten(0, -2).double()


def test_layers_and_factors_fit_what_full_inputs_give(place):
    full, packed = load.model(str(place / "M")), load.model(str(place / "Q"))
    factors = lowrank.load(place / "Q" / assembly.LOWRANK)
    for index in (0, 1):
        name = f"model.layers.{index}.self_attn.q_proj"
        w = full.get_submodule(name).weight.detach()
        x, y = entering(packed, name), entering(full, name)
        collector = Collector(64, NEEDS, torch.float64)
        collector.add(x, y)
        seen = collector.result()
        target = matched(w.double(), seen)
        # Nothing has drifted before the first block; the second is fitted to another weight than its own.
        moved = float((target - w).norm() / w.norm())
        assert moved < 1e-5 if index == 0 else moved > 0.05
        found, expected = packed.get_submodule(name).weight, METHOD(target.float(), seen).unpack()
        assert (found != expected).float().mean() < 0.01, "codes beside a tie may turn, no others"
        a, b = lowrank.factor(target - found, 4, seen.hessian_KK)
        got_a, got_b = (factor.double() for factor in factors[name])
        assert_close(got_b @ got_a, b.double() @ a.double(), 5e-3, "closed-form correction")


def test_a_resumed_run_equals_a_straight_one(place, monkeypatch):
    real = assembly.Assembly.save

    def stop(self, *given):
        real(self, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(assembly.Assembly, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(place, "again")
    monkeypatch.undo()
    quantize(place, "again")
    for path in (place / "Q").glob("*.safetensors"):
        assert path.read_bytes() == (place / "again" / path.name).read_bytes(), path.name


def test_without_text_there_is_nothing_to_match(place):
    streamed, settings = StreamedModel(place / "M", torch.float32), PassSettings(match_upstream=1.0)
    with pytest.raises(ValueError, match="outputs for match_upstream"):
        Pass(streamed, RTN(), None, place / "no", settings)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="allowed: 0"):
        PassSettings(match_upstream=strength)
