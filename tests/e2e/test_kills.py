"""Every verb with long work killed at random moments: given again, it ends with the bytes of a straight run.

`LREC_KILLS=50 pytest tests/e2e/test_kills.py -s` spreads 50 kills over the verbs and says how many met them at work; it
kills one or both of two processes as often, in the verbs that processes share.
"""

import os
import shutil
from dataclasses import dataclass
from functools import partial

import pytest
from checks import kill_at_random, kill_child, kill_workers, launch, run_apart, tiny_model

from lrec import assembly, checkpoint, checkpoints, compare, record
from lrec.checkpoints import whole_checkpoints
from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
NUM_BLOCKS = 6


def text_of(place):
    return ["--dataset", place / "text.txt", "--num_samples", "8", "--max_length", "32"]


def training(place):
    words = ["--teacher", place / "M", "--dataset", place / "text.txt", "--max_length", "32", "--max_steps", "12"]
    words += ["--lora_r", "4", "--use_cpu", "true", "--lora_dropout", "0.1", "--resume_from_checkpoint", "true"]
    return [*words, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]


def comparison(place):
    words = ["--methods", "rtn:2,nf4", "--test_dataset", place / "text.txt", "--test_samples", "4"]
    return [*text_of(place), *words, "--init_rank", "4", "--keep_models", "true"]


def blocks_done(output):
    progress = output / assembly.PROGRESS
    return progress.exists() and 0 < len(checkpoint.read_json(progress)["blocks"]) < NUM_BLOCKS


@dataclass(frozen=True)
class Verb:
    """What is killed: its words, when it has finished, what shows that it was at work, its share of the kills."""

    model: str
    words: callable
    finished: callable
    at_work: callable
    share: float


VERBS = {
    "quantize": Verb(
        "M",
        lambda place: ["--bits", "2", "--group_size", "32", *text_of(place)],
        lambda output: (output / checkpoint.MANIFEST).exists() and not (output / assembly.PROGRESS).exists(),
        blocks_done,
        0.24,
    ),
    "train": Verb(
        "Q",
        training,
        lambda output: (output / checkpoint.ADAPTER_STAMP).exists(),
        lambda output: bool(whole_checkpoints(output)),
        0.24,
    ),
    "cache": Verb(
        "M",
        lambda place: [*text_of(place), "--sweep_tokens", "32"],
        lambda output: len(list(output.glob("targets-*.safetensors"))) == 8,
        lambda output: any(output.glob("targets-*.safetensors")),
        0.16,
    ),
    "compare": Verb(
        "M",
        comparison,
        lambda output: (output / compare.RESULTS).exists() and len(rows_of(output)) == 3,
        lambda output: any((output / "packed").glob("*")) or (output / compare.RESULTS).exists(),
        0.12,
    ),
    "import": Verb(
        "G",
        lambda place: [],
        lambda output: (output / checkpoint.MANIFEST).exists() and not (output / assembly.PROGRESS).exists(),
        blocks_done,
        0.12,
    ),
    "export": Verb(
        "Q",
        lambda place: ["--format", "merged"],
        lambda output: (output / "config.json").exists(),
        lambda output: output.with_name(f".{output.name}.partial").exists(),
        0.12,
    ),
}

# The verbs killed in two processes of a launch too; by default one, since launches take their time.
SHARED = ("quantize", "cache", "train") if "LREC_KILLS" in os.environ else ("cache",)


def started(output):
    """Whether a run has begun to write."""
    return output.exists() or output.with_name(f".{output.name}.partial").exists()


def rows_of(output):
    return checkpoint.read_json(output / compare.RESULTS)["rows"]


def run(verb, place, output):
    words = ["--model", place / VERBS[verb].model, *VERBS[verb].words(place), "--output_dir", output]
    assert main([verb, *map(str, words)]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model `M` of six blocks, a text, `Q`, which is `M` packed, and `G`, which is that as GPTQ."""
    place = tmp_path_factory.mktemp("kills")
    tiny_model(place / "M", num_hidden_layers=NUM_BLOCKS)
    (place / "text.txt").write_text(TEXT * 200)
    run("quantize", place, place / "Q")
    words = ["--model", place / "M", "--method", "rtn", "--bits", "4", "--group_size", "32"]
    assert main(["quantize", *map(str, words), "--output_dir", str(place / "R")]) == 0
    words = ["--model", place / "R", "--format", "gptq", "--output_dir", place / "G"]
    assert main(["export", *map(str, words)]) == 0
    run_apart(warm_up)
    return place


def warm_up():
    """What is forked first waits for imports, and no other should be timed so."""


def assert_same_weights(expected, actual):
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in actual.glob("*.safetensors"))
    for name in [*names, *(path.name for path in expected.glob("config.json"))]:
        assert (expected / name).read_bytes() == (actual / name).read_bytes(), name


def assert_same(expected, actual):
    """Equal weights; of a comparison, equal figures, but for time and memory."""
    if (expected / compare.RESULTS).exists():
        told = ("method", "settings", "bits_per_weight", "total_bytes", "perplexity", "kl", "top1_agreement")
        found = [[{name: row.get(name) for name in told} for row in rows_of(output)] for output in (expected, actual)]
        assert found[0] == found[1]
        for packed in (expected / "packed").glob("*/"):
            assert_same_weights(packed, actual / "packed" / packed.name)
    else:
        assert_same_weights(expected, actual)


@pytest.mark.parametrize(("verb", "count"), [*((verb, 1) for verb in VERBS), *((verb, 2) for verb in SHARED)])
def test_a_killed_run_that_is_given_again_ends_as_a_straight_one(place, tmp_path, verb, count):
    kind, straight, killed = VERBS[verb], tmp_path / "straight", tmp_path / "killed"

    def job(output):
        alone = partial(run, verb, place, output)
        return alone if count == 1 else partial(launch, alone, count)

    def at_work():
        if killed.exists() and kind.finished(killed):
            assert_same(straight, killed)
            shutil.rmtree(killed)
        return kind.at_work(killed)

    seconds = run_apart(job(straight))
    kill = kill_child if count == 1 else partial(kill_workers, finished=lambda: kind.finished(killed))
    kills, met = kill_at_random(job(killed), seconds, at_work, kind.share, lambda: started(killed), kill)
    run_apart(job(killed))
    assert_same(straight, killed)
    print(f"\n{verb} in {count}: {kills} kills, {met} at work, none lost")


def recorded(place, output):
    words = ["--model", output, *text_of(place), "--record"]
    assert main(["evaluate", *map(str, words)]) == 0


def test_a_record_is_the_old_one_or_the_new_one(place, tmp_path):
    shutil.copytree(place / "Q", tmp_path / "Q")
    seconds = run_apart(partial(recorded, place, tmp_path / "Q"))
    straight = record.rows(tmp_path / "Q")

    def forget():
        checkpoint.write_json(tmp_path / "Q" / record.FILE, {"weights_sha256": "of others", "rows": []})

    def at_work():
        found = record.rows(tmp_path / "Q")
        assert found in ([], straight)
        forget()  # else all kills after one that came too late would do so too
        return not found

    forget()
    kills, met = kill_at_random(partial(recorded, place, tmp_path / "Q"), seconds, at_work, 0.08)
    recorded(place, tmp_path / "Q")
    assert record.rows(tmp_path / "Q") == straight
    print(f"\nevaluate --record: {kills} kills, {met} at work, none lost")


def test_a_training_that_ended_makes_no_step_too_many(place, tmp_path):
    """Killed between its last checkpoint and its stamp, and given again: once and twice."""
    run("train", place, tmp_path / "A")
    weights = (tmp_path / "A" / checkpoint.ADAPTER_WEIGHTS).read_bytes()
    for _ in range(2):
        (tmp_path / "A" / checkpoint.ADAPTER_STAMP).unlink()
        run("train", place, tmp_path / "A")
        assert (tmp_path / "A" / checkpoint.ADAPTER_WEIGHTS).read_bytes() == weights
        assert [path.name for path in whole_checkpoints(tmp_path / "A")] == ["checkpoint-11", "checkpoint-12"]


def test_half_a_checkpoint_is_passed_over_and_a_damaged_one_refused(tmp_path):
    for step, files in ((2, ["a", "b"]), (10, ["a", "b"]), (11, ["a"]), (12, [])):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name in ("a", "b"):
            (path / name).write_text(name)
        if files:
            checkpoints.finish(path)
        for name in {"a", "b"} - {*files}:
            (path / name).unlink()  # as rotation does, killed in between
    assert whole_checkpoints(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-10"]
    (tmp_path / "checkpoint-10" / "a").write_text("b")
    with pytest.raises(ValueError, match="a was altered"):
        checkpoints.check_checkpoint(tmp_path / "checkpoint-10")


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
