"""Held-out text: the best checkpoint is kept, training stops early, and one that diverges ends with the best so far."""

import json
import warnings

import pytest
import torch
from checks import tiny_model
from safetensors.torch import load_file

from lrec import load, text
from lrec.cli import main
from lrec.evaluate import quality, states

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("best")
    tiny_model(place / "M", intermediate_size=128, initializer_range=0.2)
    generator = torch.Generator().manual_seed(0)
    words = TEXT.split()
    for name in ("text", "other"):
        drawn = torch.randint(0, len(words), (4000,), generator=generator).tolist()
        (place / f"{name}.txt").write_text(" ".join(words[i] for i in drawn))
    packing = ["--group_size", "32", "--num_samples", "8", "--max_length", "32"]
    where = ["--model", str(place / "M"), "--dataset", str(place / "text.txt")]
    for bits in ("2", "4"):
        assert main(["quantize", *where, *packing, "--bits", bits, "--output_dir", str(place / f"Q{bits}")]) == 0
    return place


def train(place, name, *words, bits=2):
    where = ["--model", str(place / f"Q{bits}"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    # 16: rounding trained scales to 8 bits would move the KL that is compared here.
    settings = ["--num_samples", "64", "--max_length", "32", "--lora_r", "4", "--logging_steps", "1"]
    settings += ["--scale_bits", "16"]
    settings += [] if "--eval_steps" in words else ["--eval_steps", "2"]
    return main(["train", *where, *settings, *words, "--output_dir", str(place / name)])


def told(place, name):
    stamp = json.loads((place / name / "lrec_adapter.json").read_text())
    return stamp, [row["eval_kl"] for row in stamp.get("evaluations", [])]


def kl(place, name, dataset, seed, count, bits=2):
    """Held-out KL of what was saved, measured as `lrec evaluate` does."""
    tokenizer = load.tokenizer(str(place / "M"))
    ids = text.windows(text.documents(str(place / dataset)), tokenizer, 32, count, seed=seed)
    student = states(load.model(str(place / f"Q{bits}"), str(place / name)), ids[-8:])
    return quality(student, ids[-8:], states(load.model(str(place / "M")), ids[-8:]).kept())["kl"]


@pytest.mark.parametrize("what", ["adapters", "scales,zeros"])
def test_the_best_is_kept_and_training_stops_when_it_does_not_get_better(place, what):
    name = what.replace(",", "-")
    rates = ["--learning_rate", "0.03", "--scales_learning_rate", "0.3", "--lr_scheduler_type", "constant"]
    assert train(place, name, "--train", what, "--max_steps", "40", "--patience", "2", *rates) == 0
    stamp, found = told(place, name)
    best = min(range(len(found)), key=found.__getitem__)
    assert 0 < len(found) < 20 and len(found) == best + 3, "two evaluations after the best one"
    assert stamp["num_steps"] == 2 * len(found)
    measured = kl(place, name, "text.txt", 0, 64)
    assert abs(measured - found[best]) < 0.02 * measured, "held out are the last 8 of the 64 drawn windows"
    assert abs(measured - found[-1]) > 2 * abs(measured - found[best])


def test_a_training_that_runs_away_ends_with_the_best_checkpoint(place, capsys):
    rates = ["--learning_rate", "1e-3", "--scales_learning_rate", "1e-3", "--warmup_steps", "0"]
    other = ["--eval_dataset", str(place / "other.txt"), "--patience", "100", "--max_steps", "8"]
    with pytest.MonkeyPatch.context() as patch:
        # The sixth step throws the scales far away.
        from lrec import watch

        step = watch.Watch.on_pre_optimizer_step

        def throw(self, args, state, control, model=None, **kwargs):
            step(self, args, state, control, model, **kwargs)
            if state.global_step == 4:
                for n, p in model.named_parameters():
                    p.data.mul_(30.0 if n.endswith("scale") else 1.0)

        patch.setattr(watch.Watch, "on_pre_optimizer_step", throw)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert train(place, "away", "--train", "all", *rates, *other, bits=4) == 0
    said = [str(w.message) for w in caught if "run away at step 7" in str(w.message)]
    assert said and "checkpoint-4" in said[0]
    stamp, found = told(place, "away")
    assert "run away at step 7" in stamp["diverged"]
    ids_kl = kl(place, "away", "other.txt", None, 8, bits=4)
    assert abs(ids_kl - min(found[:2])) < 0.02 * ids_kl
    kept = load_file(place / "away" / "checkpoint-4" / "base_tensors.safetensors")
    saved = load_file(place / "away" / "base_tensors.safetensors")
    assert all(torch.equal(kept[key].half(), saved[key]) for key in saved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Watch, "on_pre_optimizer_step", throw)
        assert train(place, "lost", "--train", "all", *rates, "--max_steps", "8", "--eval_steps", "100", bits=4) == 2
    assert "run away at step 7" in capsys.readouterr().err


def test_text_that_was_seen_is_told(place):
    g = torch.Generator().manual_seed(0)
    seen, fresh = (torch.randint(0, 1000, (6, 50), generator=g) for _ in range(2))
    assert text.overlap(seen, fresh) == 0 and text.overlap(seen, seen) == 1
    half = torch.cat([seen.flatten()[7:107].view(2, 50), fresh[:2]])
    # Of the seen half those runs are new that cross the end of a seen window.
    runs = 27
    crossing = sum(1 for row in range(2) for start in range(runs) if (7 + 50 * row + start) % 50 > 50 - 24)
    assert text.overlap(seen, half) == pytest.approx((2 * runs - crossing) / (4 * runs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = ["--eval_dataset", str(place / "text.txt"), "--max_steps", "2"]
        assert train(place, "seen", *words) == 0
    assert any("text.txt (held out) is also in" in str(w.message) for w in caught)


def test_evaluations_that_cannot_be_are_refused(place, capsys):
    assert train(place, "X", "--eval_samples", "64") == 2
    assert "64 windows of" in capsys.readouterr().err
    assert train(place, "X", "--eval_dataset", str(place / "other.txt"), "--eval_steps", "0") == 2
    assert "--eval_dataset is read every --eval_steps" in capsys.readouterr().err


def test_evaluating_on_what_was_trained_on_is_told(place):
    assert train(place, "plain", "--max_steps", "1", "--eval_steps", "0") == 0
    where = ["--model", str(place / "Q2"), "--num_samples", "2", "--max_length", "16"]
    told = {}
    for name, adapter in (("text", ["--adapter", str(place / "plain")]), ("text", []), ("other", [])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(["evaluate", *where, *adapter, "--dataset", str(place / f"{name}.txt")]) == 0
        told[name, bool(adapter)] = [str(w.message) for w in caught if "figures on it" in str(w.message)]
    assert "calibrated with and trained on" in told["text", True][0]
    assert len(told["text", False]) == 1 and "trained on" not in told["text", False][0]
    assert not told["other", False]
