"""A disk that fills up: one line and exit code 3; what is there stays valid, and with room the run ends as ever."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys

import pytest
import torch
from checks import tiny_model
from test_kills import assert_same_weights

from lrec import assembly, checkpoint
from lrec.cli import main

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model `M` of three blocks, `Q`, which is it packed, a text, and what each verb of `VERBS` makes."""
    place = tmp_path_factory.mktemp("full")
    tiny_model(place / "M", num_hidden_layers=3)
    (place / "text.txt").write_text(TEXT * 60)
    for name, verb in {"Q": "quantize", "A": "train", "T": "cache", "O": "export"}.items():
        assert main([verb, *words(place, verb), "--output_dir", str(place / name)]) == 0
    return place


def words(place, verb):
    text = ["--dataset", place / "text.txt", "--num_samples", "8", "--max_length", "16"]
    train = ["--teacher", place / "M", *text, "--max_steps", "3", "--save_steps", "1", "--use_cpu", "true"]
    found = {
        "quantize": ["--model", place / "M", "--bits", "2", "--init_rank", "8", *text],
        "cache": ["--model", place / "M", *text, "--sweep_tokens", "32"],
        "train": ["--model", place / "Q", *train, "--lora_r", "8", "--resume_from_checkpoint", "true"],
        "export": ["--model", place / "Q", "--format", "merged"],
        "evaluate": ["--model", place / "Q", *text, "--record"],
    }
    return list(map(str, found[verb]))


def limited(verb, arguments, num_bytes, told):
    """The exit code of a verb in a process that can write no file larger than this; what it says goes to a file."""

    def job():
        torch.set_num_threads(1)
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        code = main([verb, *arguments])
        sys.stderr.flush()
        os._exit(code)

    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    child.join()
    return child.exitcode


# Less than what a shard, an adapter's weights or an optimizer's state takes, more than the manifest.
LIMITS = {"quantize": 20_000, "cache": 20_000, "train": 20_000, "export": 20_000}


@pytest.mark.parametrize("verb", LIMITS)
def test_a_file_that_does_not_fit_is_one_line_and_the_rest_goes_on_later(place, tmp_path, verb):
    told, output = tmp_path / "told.txt", tmp_path / "O"
    arguments = [*words(place, verb), "--output_dir", str(output)]
    assert limited(verb, arguments, LIMITS[verb], told) == 3
    last = told.read_text().strip().splitlines()[-1]
    assert last.startswith(f"lrec {verb}: does not fit on the disk (") and "Traceback" not in told.read_text()
    assert not list(tmp_path.rglob("*.partial"))
    if verb == "quantize":
        num_done = len(json.loads((output / assembly.PROGRESS).read_text())["blocks"])
        shards = sorted(output.glob("model-*.safetensors"))
        # Of the last block the shard may have fitted and the progress not: then it is made again.
        assert len(shards) - num_done in (0, 1) and all(checkpoint.open_tensors(shard).keys() for shard in shards)
    assert main([verb, *arguments]) == 0
    assert_same_weights(place / {"quantize": "Q", "cache": "T", "train": "A", "export": "O"}[verb], output)


def test_a_record_that_does_not_fit_leaves_the_earlier_one(place, tmp_path):
    assert main(["evaluate", *words(place, "evaluate")]) == 0
    kept = (place / "Q" / "lrec_evaluation.json").read_bytes()
    arguments = [*words(place, "evaluate"), "--batch_size", "1"]
    assert limited("evaluate", arguments, 100, tmp_path / "told.txt") == 3
    assert (place / "Q" / "lrec_evaluation.json").read_bytes() == kept
    checkpoint.verify(place / "Q")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which only root may")
@pytest.mark.parametrize("verb", LIMITS)
def test_a_full_file_system_is_one_line(place, tmp_path, verb):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        arguments = [*words(place, verb), "--output_dir", str(disk / "O")]
        assert limited(verb, arguments, 2**40, tmp_path / "told.txt") == 3
        last = (tmp_path / "told.txt").read_text().strip().splitlines()[-1]
        assert "does not fit on the disk (" in last
    finally:
        subprocess.run(["umount", str(disk)], check=True)
