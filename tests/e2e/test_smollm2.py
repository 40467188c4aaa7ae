"""The main job on a real model, as a user runs it: SmolLM2-135M to 2 bits, corrected, evaluated, exported."""

import json

import pytest
import torch

from lrec import load
from lrec.cli import main

pytestmark = pytest.mark.slow

CALIBRATION = ["--dataset", "wikipedia:train", "--num_samples", "8", "--max_length", "256"]
HELD_OUT = ["--dataset", "wikipedia:test", "--num_samples", "6", "--max_length", "256"]
TRAINING = ["--dataset", "wikipedia:train", "--max_length", "128", "--per_device_train_batch_size", "2"]
TRAINING += ["--max_steps", "12"]


def test_main_job(smollm2_dir, wikipedia_jsonl, tmp_path, capsys):
    def lrec(*words):
        assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err[-2000:]
        return json.loads(capsys.readouterr().out)

    model, packed, adapter, merged = smollm2_dir, tmp_path / "Q", tmp_path / "A", tmp_path / "O"
    quantized = lrec("quantize", "--model", model, "--bits", 2, *CALIBRATION, "--output_dir", packed)
    assert quantized["num_layers"] == 210 and quantized["quantized_share"] == 1.0
    assert quantized["bits_per_weight"] == 2.28125  # 2 + 16 / 64 for scales + 2 / 64 for zeros
    lrec("train", "--model", packed, "--teacher", model, *TRAINING, "--output_dir", adapter)
    lrec("export", "--model", packed, "--adapter", adapter, "--format", "merged", "--output_dir", merged)

    told = [
        lrec("evaluate", "--model", base, "--teacher", model, *HELD_OUT, *more)
        for base, more in ((model, []), (packed, []), (packed, ["--adapter", adapter]), (merged, []))
    ]
    full, base, corrected, dense = told
    assert full["kl"] < 1e-6
    assert 15 < full["perplexity"] < 40
    assert base["perplexity"] < 12 * full["perplexity"]
    assert corrected["kl"] < 0.8 * base["kl"]
    assert corrected["top1_agreement"] > base["top1_agreement"]
    assert abs(dense["kl"] - corrected["kl"]) < 0.01
    assert base["total_bytes"] < 0.35 * full["total_bytes"]


def test_generation_is_text(smollm2_dir):
    from lrec.evaluate import continuations

    model = load.model(str(smollm2_dir))
    assert next(model.parameters()).dtype == torch.float32
    (text,) = continuations(model, load.tokenizer(str(smollm2_dir)), ["The capital of France is"], max_new_tokens=8)
    assert "Paris" in text
