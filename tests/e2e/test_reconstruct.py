"""Blocks reconstructed in the pass that quantizes: on a tiny model, resumed and straight."""

import pytest
import torch
from checks import tiny_model
from safetensors.torch import load_file

from lrec import anatomy, assembly, checkpoint, end_loss, load, reconstruct
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec.nn import PackedLinear
from lrec.quantizers.gptq import GPTQ
from lrec.quantizers.nf2 import Nf2
from lrec.reconstruct import Reconstruct, Stream
from lrec.stream import StreamedModel

IDS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
RATES = {"reconstruct_lr": 5e-3, "reconstruct_reach": 0.9}
FLOATS = GPTQ(bits=2, group_size=32, zero_point="float", scale_bits=8)


def quantize(model_dir, output_dir, quantizer=FLOATS, **settings):
    passing = PassSettings(init_rank=4, **RATES, **settings)
    Pass(StreamedModel(model_dir, torch.float32), quantizer, Calibration(IDS), output_dir, passing).run()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M` as sharp as a trained one, packed without reconstruction in `Q`, and
    with it in `R`, tokens weighed by the end loss."""
    place = tmp_path_factory.mktemp("reconstruct")
    tiny_model(place / "M", initializer_range=0.2)
    quantize(place / "M", place / "Q", end_loss_hessian=True)
    quantize(place / "M", place / "R", end_loss_hessian=True, reconstruct_epochs=10)
    return place


def outputs(model_dir):
    """What each block of a model puts out, (6, 24, H)."""
    model, found = load.model(str(model_dir)), []
    for block in anatomy.find_blocks(model).modules:
        block.register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        model(IDS)
    return found


def packed(model_dir):
    return [m.packed for m in load.model(str(model_dir)).modules() if isinstance(m, PackedLinear)]


def error(place, name, index):
    """The weighted error of a block's output by hand, on the model as it is stored."""
    weights_nL = end_loss.token_weights(StreamedModel(place / "M", torch.float32), IDS)[index][""]
    miss_nL = (outputs(place / name)[index] - outputs(place / "M")[index]).square().mean(-1)
    return float((miss_nL * weights_nL).mean() / weights_nL.mean())


def test_blocks_come_nearer_to_the_full_model_s_at_the_same_bytes(place):
    for index in range(2):
        assert error(place, "R", index) < 0.5 * error(place, "Q", index)
    for old, new in zip(packed(place / "Q"), packed(place / "R"), strict=True):
        assert old.spec() == new.spec()
        assert 0 < (old.codes() != new.codes()).float().mean() < 0.5
        assert not torch.equal(old.scales(), new.scales()) and not torch.equal(old.zeros(), new.zeros())


def test_the_report_tells_the_error_of_each_epoch(place):
    rows = checkpoint.read_json(place / "R" / assembly.REPORT)["layers"]
    for row in rows:
        told = row["reconstruct_loss"]
        assert len(told) == 10 and told[9] < told[0]
    last = rows[-1]["reconstruct_loss"]
    # The last epoch moves little, and storing scales in 8 bits costs little.
    assert error(place, "R", 1) == pytest.approx(last[9], rel=0.15)


def test_a_resumed_run_equals_a_straight_one(place, tmp_path, monkeypatch):
    real = Reconstruct.reconstruct

    def stop(self, block, name, *rest):
        if name.endswith(".1"):
            raise KeyboardInterrupt
        return real(self, block, name, *rest)

    monkeypatch.setattr(reconstruct.Reconstruct, "reconstruct", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(place / "M", tmp_path / "R", end_loss_hessian=True, reconstruct_epochs=10)
    monkeypatch.undo()
    quantize(place / "M", tmp_path / "R", end_loss_hessian=True, reconstruct_epochs=10)
    for file in sorted((place / "R").glob("*.safetensors")):
        first, second = load_file(file), load_file(tmp_path / "R" / file.name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), file


@pytest.mark.parametrize(
    ("quantizer", "same"),
    [
        (GPTQ(bits=2, group_size=32), ("zero",)),
        (Nf2(), ("qweight", "scale")),
        (GPTQ(bits=3, group_size=32, symmetric=True), ()),
    ],
)
def test_formats_keep_what_they_cannot_train_and_their_bytes(place, tmp_path, quantizer, same):
    for name, epochs in (("Q", 0), ("R", 2)):
        quantize(place / "M", tmp_path / name, quantizer, reconstruct_epochs=epochs)
    layers = [packed(tmp_path / name) for name in "QR"]
    assert [old.spec() for old in layers[0]] == [new.spec() for new in layers[1]]
    # The second block was given other inputs, so it was quantized otherwise.
    for old, new in zip(*(held[: len(held) // 2] for held in layers), strict=True):
        for field, tensor in old.tensors().items():
            if field in (*same, "scale"):
                assert torch.equal(tensor, new.tensors()[field]) == (field in same), field


def test_without_weights_an_error_is_relative_to_the_token():
    target = torch.randn(2, 5, 8) * torch.tensor([1.0, 1, 1, 1e3, 1])[:, None]
    miss = torch.randn(2, 5, 8)
    stream = Stream([target + miss], [target], None, lambda block, state: state)
    by_hand = [(miss[b, t].norm() / target[b, t].norm()).square() for b in range(2) for t in range(5)]
    assert float(stream.error(None, 0)) == pytest.approx(float(sum(by_hand)) / 10, rel=1e-5)
    weights = torch.rand(2, 5)
    weighed = sum(weights[b, t] * miss[b, t].square().mean() for b in range(2) for t in range(5)) / 10
    stream = Stream([target + miss], [target], [weights], lambda block, state: state)
    assert float(stream.error(None, 0)) == pytest.approx(float(weighed), rel=1e-5)


def test_an_error_that_is_not_finite_names_the_block(place, tmp_path):
    with pytest.raises(ValueError, match=r"model\.layers\.0: the error of epoch 1 is .*lower reconstruct_lr"):
        settings = PassSettings(init_rank=0, reconstruct_epochs=1, reconstruct_lr=1e30)
        Pass(StreamedModel(place / "M", torch.float32), FLOATS, Calibration(IDS), tmp_path / "X", settings).run()
    with pytest.raises(ValueError, match="reconstruct_epochs = -1; allowed: 0"):
        PassSettings(reconstruct_epochs=-1)
