"""The README holds: its commands and its Python run as they stand there, on a tiny model and with smaller sizes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checks import tiny_model

from lrec import registry
from lrec.cli import VERBS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.partition("  #")[0] for kind, block in BLOCKS if not kind for line in block.splitlines()]
NAMES = {
    "<directory or Hub id>": "M",
    "<the same model>": "M",
    "smollm2": "M",
    "wikipedia:train": "my_text.txt",
    "wikipedia:test": "held_out.txt",
}
SIZES = {
    "--max_steps 200": "--max_steps 2",
    "rtn:2,gptq:2,gptq:3,nf4": "rtn:2",
    "--training_tokens 16384 --training_length 256": "--training_tokens 64 --training_length 32",
    "layouts:2:": "gptq:2:group_size=32:train=scales:",
}
TEXT = "In the beginning there was a quick brown fox, and it jumped over seven lazy dogs and a jovial yak.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of somebody who has a model and two texts."""
    place = tmp_path_factory.mktemp("readme")
    tiny_model(place / "M", max_position_embeddings=512)
    for name, times in (("my_text.txt", 900), ("held_out.txt", 200)):
        (place / name).write_text(TEXT * times)
    return place


def test_commands_run_in_their_order_and_then_the_python(place, monkeypatch):
    monkeypatch.chdir(place)
    commands = [command for command in COMMANDS if command.startswith("lrec ")]
    assert {"quantize", "train", "evaluate", "export", "compare", "cache"} <= {line.split()[1] for line in commands}
    for command in commands:
        for there, here in {**NAMES, **SIZES}.items():
            command = command.replace(there, here)
        words = shlex.split(command)[1:]
        # An estimate that does not fit says so by its exit code.
        assert main(words) in ((0, 3) if words[0] == "estimate" else (0,)), command
    for code in (block for kind, block in BLOCKS if kind == "python"):
        exec(compile(code, "README.md", "exec"), {})


def test_what_it_names_is_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`|^make (\w+)", README, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    for recipe in re.findall(r"recipes/\w+\.py", README):
        assert (ROOT / recipe).is_file(), recipe
    assert set(re.findall(r"lrec (\w+)", " ".join(COMMANDS))) <= set(VERBS)


@pytest.mark.parametrize(("folder", "heading"), [("quantizers", "Methods"), ("export", "Exports and imports")])
def test_every_method_and_export_has_a_row(folder, heading):
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    named = {name.replace("-", "_") for name in re.findall(r"`([a-z][\w-]*)`", rows)}
    assert named == set(registry.names(folder))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(set(re.findall(r"accelerate launch (recipes/\w+\.py)", README))))
def test_a_recipe_runs_to_its_table(place, recipe):
    small = {"num_samples": 4, "max_length": 64, "train_length": 32, "test_samples": 2, "max_steps": 2, "lora_r": 4}
    text = {"model": "M", "train_dataset": "my_text.txt", "test_dataset": "held_out.txt", "prompts": "A fox"}
    output_dir = Path("runs") / Path(recipe).stem
    values = {**small, **text, "init_rank": 4, "per_device_train_batch_size": 1, "output_dir": output_dir}
    words = [sys.executable, str(ROOT / recipe), *(f"--{name}={value}" for name, value in values.items())]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((place / output_dir / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["full precision", "quantized", "corrected"]
    assert all(row["model"] in done.stdout for row in rows)
