"""The pass with a second stage that sees whole blocks, and preprocessing: on a tiny model, resumed and straight."""

import json
import shutil

import pytest
import torch
from checks import assert_close, tiny_model
from safetensors.torch import load_file

from lrec import assembly, blockwise, checkpoint, load, logbook, lowrank, restore
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec.cli import main
from lrec.quantizers.ptq161 import Ptq161
from lrec.statistics import Collector
from lrec.stream import StreamedModel

RATES = {"refine_epochs": 2, "scale_lr": 1e-3, "factor_lr": 5e-3}
IDS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))
SETTINGS = PassSettings(init_rank=4, batch_size=2)
SETTING_WORDS = ["--method", "ptq161", "--refine_epochs", "1", "--init_rank", "4", "--num_samples", "6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a full-precision model `M`, what quantizing it saw of each block, and the packed model `Q`."""
    place = tmp_path_factory.mktemp("blockwise")
    tiny_model(place / "M")
    (place / "text.txt").write_text("pack my box with five dozen liquor jugs, then sphinx of black quartz. " * 100)
    return place


@pytest.fixture(scope="module")
def seen(place):
    """The views that the quantizer was given in a straight run into `Q`, each with its block's outputs."""
    Watched.seen = []
    quantize(place / "M", place / "Q", Watched(**RATES))
    return Watched.seen


class Watched(Ptq161):
    """Ptq161 that notes, for each block, its targets and what the full block puts out on the quantized stream."""

    def refine(self, packed, view):
        self.seen.append((view.targets, [view.run(view.weights, i) for i in range(len(view.targets))]))
        return super().refine(packed, view)


def quantize(model, output_dir, method=None):
    method = method or Ptq161(**RATES)
    return Pass(StreamedModel(model, torch.float32), method, Calibration(IDS), output_dir, SETTINGS).run()


def inputs_and_outputs(model, ids):
    """What enters and leaves each decoder block of a whole model in memory."""
    found = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, out: found.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_targets_are_the_full_model_s_states_and_run_sees_the_quantized_model_s(place, seen):
    full, packed = load.model(str(place / "M")), load.model(str(place / "Q"))
    assert len(seen) == 2 and len(seen[0][0]) == len(IDS)
    for i in range(len(IDS)):
        ids = IDS[i : i + 1]
        for index, (_, target) in enumerate(inputs_and_outputs(full, ids)):
            assert_close(seen[index][0][i], target, 1e-5, f"target of window {i} behind block {index}")
        # The first block is fed embeddings; the second, what the packed first one makes of them.
        for index, (state, _) in enumerate(inputs_and_outputs(packed, ids)):
            kept = []
            layer = full.model.layers[index]
            before = layer.register_forward_pre_hook(lambda _, args, state=state: (state, *args[1:]))
            after = layer.register_forward_hook(
                lambda _, args, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            with torch.no_grad():
                full(ids)
            before.remove()
            after.remove()
            assert_close(seen[index][1][i], kept[0], 1e-5, f"the full block {index} on the quantized stream, {i}")
        assert (seen[1][1][i] - seen[1][0][i]).norm() > 0.01 * seen[1][0][i].norm()


def test_rows_and_factors_are_those_of_the_refined_weights(place, seen):
    full, packed = load.model(str(place / "M")), load.model(str(place / "Q"))
    rows = {row["name"]: row for row in checkpoint.read_json(place / "Q" / assembly.REPORT)["layers"]}
    factors = lowrank.load(place / "Q" / assembly.LOWRANK)
    name = "model.layers.0.self_attn.q_proj"
    collector = Collector(64, {"hessian"})
    hook = full.get_submodule(name).register_forward_pre_hook(lambda _, args: collector.add(args[0]))
    with torch.no_grad():
        full(IDS)
    hook.remove()
    h, w = collector.result().hessian_KK, full.get_submodule(name).weight.detach()
    residual = w - packed.get_submodule(name).weight
    assert rows[name]["error"] == pytest.approx(float((residual @ h * residual).sum() / (w @ h * w).sum()), rel=1e-3)
    for got, expected in zip(factors[name], lowrank.factor(residual, 4, h), strict=True):
        assert_close(got.float().abs(), expected.abs(), 5e-3, "closed-form factor")
    for row in rows.values():
        assert len(row["refine_loss"]) == 2 and row["refine_loss"][1] < row["refine_loss"][0]


def test_a_resumed_run_equals_a_straight_one(place, seen, tmp_path, monkeypatch):
    quantize(place / "M", tmp_path / "straight")
    real = blockwise.refine

    def stop(name, *rest):
        if name.endswith(".1"):
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(blockwise, "refine", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(place / "M", tmp_path / "broken")
    monkeypatch.undo()
    quantize(place / "M", tmp_path / "broken")
    same_files(tmp_path / "straight", tmp_path / "broken")


def test_no_epochs_leave_the_layers_as_they_are_and_the_pass_without_a_second_stream(place, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "view", None)
    quantize(place / "M", tmp_path / "Q", Ptq161(refine_epochs=0))
    name = "model.layers.1.mlp.down_proj"
    layer = load.model(str(tmp_path / "Q")).get_submodule(name)
    assert torch.equal(layer.column, torch.ones_like(layer.column))
    rows = checkpoint.read_json(tmp_path / "Q" / assembly.REPORT)["layers"]
    assert all("refine_loss" not in row for row in rows)


def test_a_nan_in_a_weight_names_the_layer(place, tmp_path):
    shutil.copytree(place / "M", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    checkpoint.write_tensors(tmp_path / "nan" / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: the weight holds NaN"):
        quantize(tmp_path / "nan", tmp_path / "Q")


def test_a_loss_that_is_not_finite_names_the_block(place, tmp_path):
    with pytest.raises(ValueError, match=r"model.layers.0: the loss of epoch 1 is nan; .* lower scale_lr"):
        quantize(place / "M", tmp_path / "Q", Ptq161(refine_epochs=1, scale_lr=1e30, factor_lr=1e30))


def same_files(one, other):
    """Demands equal names and bytes, but for times in the report."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {assembly.REPORT, logbook.FILE}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    reports = [checkpoint.read_json(path / assembly.REPORT) | {"seconds": 0} for path in (one, other)]
    assert reports[0] == reports[1]


def preprocess(place, output_dir, *words):
    """`lrec quantize --preprocess` with few steps; the exit code."""
    steps = ["--preprocess", "kl", "--preprocess_steps", "3", "--preprocess_r", "4", "--max_length", "24"]
    given = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--output_dir", str(output_dir)]
    return main(["quantize", *given, *SETTING_WORDS, *steps, *words])


@pytest.fixture(scope="module")
def preprocessed(place):
    """The directory of a model quantized with preprocessing in one go; its stages are kept in `stages`."""
    real = shutil.rmtree

    def keep(path, **named):
        if path == place / ".P.preprocess":
            shutil.copytree(path, place / "stages")
        real(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore.shutil, "rmtree", keep)
        assert preprocess(place, place / "P") == 0
    return place / "P"


def test_preprocessing_names_the_original_and_leaves_no_stages(place, preprocessed):
    manifest = checkpoint.read_json(preprocessed / checkpoint.MANIFEST)
    assert manifest["base_model"] == str(place / "M")
    assert manifest["base_sha256"] == checkpoint.fingerprint(place / "M")
    assert manifest["settings"]["preprocess"] == "kl" and manifest["settings"]["refine_epochs"] == 1
    assert manifest["preprocessed"]["sha256"] != manifest["base_sha256"]
    assert not (place / ".P.preprocess").exists()


def test_the_last_pass_is_on_what_the_stages_made(place, preprocessed, tmp_path):
    words = ["--model", str(place / "stages" / "merged"), "--dataset", str(place / "text.txt"), "--max_length", "24"]
    assert main(["quantize", *words, *SETTING_WORDS, "--output_dir", str(tmp_path / "again")]) == 0
    for shard in (tmp_path / "again").glob("*.safetensors"):
        assert shard.read_bytes() == (preprocessed / shard.name).read_bytes()


def test_preprocessing_goes_on_after_kills_in_every_stage(place, preprocessed, tmp_path, monkeypatch):
    kills = [
        (assembly.Assembly, "finish"),
        (restore.Train, "run"),
        (restore.Export, "run"),
        (restore.checkpoint, "fingerprint"),
        (restore.shutil, "rmtree"),
    ]
    done = []
    for kill in kills:
        real = getattr(*kill)

        def stop(*given, real=real, kill=kill, **named):
            if kill[1] != "fingerprint" or given[0].name == "merged":
                raise KeyboardInterrupt
            return real(*given, **named)

        monkeypatch.setattr(*kill, stop)
        assert preprocess(place, tmp_path / "P") == 130
        monkeypatch.undo()
        done.append(sorted(path.name for path in (tmp_path / ".P.preprocess").iterdir() if path.is_dir()))
        if kill[1] == "run":
            assert preprocess(place, tmp_path / "P", "--preprocess_r", "2") == 2
    stages = ["adapter", "merged", "packed"]
    assert done == [["packed"], ["packed"], ["adapter", "packed"], stages, stages]
    assert preprocess(place, tmp_path / "P") == 0
    same_files(preprocessed, tmp_path / "P")
    assert not (tmp_path / ".P.preprocess").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preprocess", "kll"], "Did you mean 'kl'"),
        (["--preprocess_steps", "0"], "preprocess_steps = 0; allowed: 1 or more"),
        (["--output_dir", "M"], "is not empty"),
    ],
)
def test_wrong_settings_of_preprocessing(place, tmp_path, capsys, words, message):
    given = {"--preprocess": "kl", "--output_dir": str(tmp_path / "x")} | dict([words])
    given["--output_dir"] = str(place / "M") if given["--output_dir"] == "M" else given["--output_dir"]
    flags = [part for pair in given.items() for part in pair]
    words = ["--model", str(place / "M"), "--dataset", str(place / "text.txt"), "--max_length", "24", *SETTING_WORDS]
    assert main(["quantize", *words, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((place / "M" / "config.json").read_text())
