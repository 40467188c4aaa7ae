"""A task's recipe, from a full-precision model to its table, small; and that its stages are taken over."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lrec.blocks import PassSettings
from lrec.finetune import FinetuneConfig
from lrec.quantizers.gptq import GPTQ
from lrec.recipe import Recipe
from lrec.task_recipe import TaskRecipe
from lrec.trainer import LrecConfig, LrecTrainer
from tests.checks import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("task")
    tiny_model(place / "M").to(torch.bfloat16).save_pretrained(place / "M")
    tokenizer = AutoTokenizer.from_pretrained(place / "M")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "M")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!" * 4}] for i in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return place


def test_a_task_is_taught_on_a_corrected_model(place):
    text, rows = str(place / "text.txt"), str(place / "rows.jsonl")
    small = {"num_samples": 4, "max_length": 64, "train_length": 32, "test_samples": 2, "lora_r": 4, "task_r": 4}
    recipe = TaskRecipe(
        model=str(place / "M"), output_dir=str(place / "R"), train_dataset=text, test_dataset=text,
        task_dataset=rows, task_test_dataset=rows, prompts="1?", **small,
    )  # fmt: skip
    common = {"max_steps": 4, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    correcting = LrecConfig("unused", **common, per_device_train_batch_size=2)
    config = FinetuneConfig("unused", **common, per_device_train_batch_size=8, learning_rate=2e-2)
    parts = GPTQ(bits=2, group_size=32), PassSettings(init_rank=4), correcting, config
    rows = recipe.teach(*parts)
    assert [row["model"] for row in rows] == ["full precision", "quantized", "corrected", "with the task"]
    assert rows[3]["loss"] < rows[2]["loss"] - 0.1 and rows[1]["bytes"] < rows[2]["bytes"] < rows[3]["bytes"]
    stamp = json.loads((place / "R/task/lrec_adapter.json").read_text())
    assert stamp["objective"] == "sft" and (place / "R/task/correction/adapter_config.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (place / "R").rglob("*.safetensors")}
    assert recipe.teach(*parts) == rows
    assert {path: path.stat().st_mtime_ns for path in (place / "R").rglob("*.safetensors")} == before


def test_a_killed_training_goes_on_when_its_recipe_runs_again(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"train_dataset": str(place / "text.txt"), "train_length": 32, "num_samples": 4, "max_length": 64}
    recipe = Recipe(model=str(place / "M"), output_dir="R", lora_r=4, **texts)
    config = LrecConfig("unused", max_steps=4, save_steps=2, use_cpu=True, disable_tqdm=True)
    recipe.quantize(GPTQ(bits=2, group_size=32), PassSettings(init_rank=4))
    recipe.correct(config)
    shutil.copytree("R/packed", "K/packed")
    shutil.copytree("R/adapter/checkpoint-2", "K/adapter/checkpoint-2")
    with patch.object(LrecTrainer, "training_step", autospec=True, side_effect=LrecTrainer.training_step) as step:
        replace(recipe, output_dir="K").correct(config)
    assert step.call_count == 2 and not Path("unused").exists()
    straight, resumed = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in "RK")
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[key], resumed[key]) for key in straight)
