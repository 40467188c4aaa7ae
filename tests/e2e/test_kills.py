"""`lrec quantize` and `lrec train` killed at random moments: run again, they end with the bytes of a straight run.

`LREC_KILLS=20 pytest tests/e2e/test_kills.py` kills as often as the project's bar asks for; `lrec cache` has the same
test in test_cache.py.
"""

import shutil
from functools import partial

import pytest
from checks import kill_at_random, run_apart, tiny_model

from lrec import assembly, checkpoint
from lrec.cli import main
from lrec.correction import whole_checkpoints

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model `M` of six blocks, a text, and `Q`, which is `M` packed by a straight run."""
    place = tmp_path_factory.mktemp("kills")
    tiny_model(place / "M", num_hidden_layers=NUM_BLOCKS)
    (place / "text.txt").write_text(TEXT * 200)
    quantize(place, place / "Q")
    return place


def quantize(place, output_dir):
    words = ["--model", str(place / "M"), "--bits", "2", "--group_size", "32", "--max_length", "32"]
    words += ["--num_samples", "8", "--dataset", str(place / "text.txt"), "--output_dir", str(output_dir)]
    assert main(["quantize", *words]) == 0


def train(place, output_dir):
    words = ["--model", str(place / "Q"), "--teacher", str(place / "M"), "--dataset", str(place / "text.txt")]
    words += ["--max_length", "32", "--max_steps", "12", "--lora_r", "4", "--use_cpu", "true", "--lora_dropout", "0.1"]
    words += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]
    assert main(["train", *words, "--resume_from_checkpoint", "true", "--output_dir", str(output_dir)]) == 0


def assert_same_weights(expected, actual):
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in actual.glob("*.safetensors"))
    for name in [*names, *(path.name for path in expected.glob("config.json"))]:
        assert (expected / name).read_bytes() == (actual / name).read_bytes(), name


def test_a_killed_quantization_ends_with_the_same_bytes(place, tmp_path):
    killed = tmp_path / "killed"
    run_apart(partial(quantize, place, tmp_path / "first"))  # what runs first is slower
    seconds = run_apart(partial(quantize, place, tmp_path / "straight"))
    assert_same_weights(place / "Q", tmp_path / "straight")

    def at_work():
        progress = killed / assembly.PROGRESS
        if not progress.exists() and killed.exists() and any(killed.iterdir()):
            assert_same_weights(place / "Q", killed)
            shutil.rmtree(killed)
        return progress.exists() and 0 < len(checkpoint.read_json(progress)["blocks"]) < NUM_BLOCKS

    kill_at_random(partial(quantize, place, killed), seconds, at_work)
    quantize(place, killed)
    assert_same_weights(place / "Q", killed)


def test_a_killed_training_ends_with_the_same_adapter(place, tmp_path):
    killed = tmp_path / "killed"
    seconds = run_apart(partial(train, place, tmp_path / "straight"))

    def at_work():
        if (killed / checkpoint.ADAPTER_STAMP).exists():
            assert_same_weights(tmp_path / "straight", killed)
            shutil.rmtree(killed)
        return bool(whole_checkpoints(killed))

    kill_at_random(partial(train, place, killed), seconds, at_work)
    train(place, killed)
    assert_same_weights(tmp_path / "straight", killed)


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (11, '{"glob'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert whole_checkpoints(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-10"]


def test_factors_whose_parts_are_half_gone_are_not_merged_again(place, tmp_path):
    shutil.copytree(place / "Q", tmp_path / "Q")
    unfinished = assembly.Assembly(tmp_path / "new", "run", NUM_BLOCKS)
    whole = (place / "Q" / assembly.LOWRANK).read_bytes()
    (tmp_path / "new" / assembly.LOWRANK).write_bytes(whole)
    # Killed while parts were removed: the last one is still there.
    shutil.copy(place / "Q" / assembly.LOWRANK, tmp_path / "new" / f"lowrank-{NUM_BLOCKS:05}.safetensors")
    unfinished._merge_factors()
    assert (tmp_path / "new" / assembly.LOWRANK).read_bytes() == whole
    assert not list((tmp_path / "new").glob("lowrank-0*"))
