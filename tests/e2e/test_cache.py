"""A teacher's targets on disk: what is stored, training from it, what is refused, and captures killed at any moment.

`LREC_KILLS=20 pytest tests/e2e/test_cache.py -k killed` kills as often as the project's bar asks for.
"""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from checks import assert_close, kill_at_random, run_apart, tiny_model

from lrec import checkpoint, correction, load, runs
from lrec.cache import TargetCache
from lrec.capture import Capture, CaptureSettings
from lrec.cli import main
from lrec.forward import StreamedForward
from lrec.head import Head
from lrec.losses import Objective
from lrec.teacher import CachedTeacher, LiveTeacher, final_hidden

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
WINDOWS = ["--num_samples", "13", "--max_length", "32", "--seed", "3"]
SWEEP = ["--sweep_tokens", "128"]  # four windows a shard, the last of four shards short


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a teacher `M`, a text, a packed model `Q` of it, and caches `hidden`, `topk` and `sampled`."""
    place = tmp_path_factory.mktemp("cache")
    tiny_model(place / "M", initializer_range=0.2)  # so that the KL of two bits is as large as in real models
    (place / "text.txt").write_text(TEXT * 200)
    words = ["--bits", "2", "--group_size", "32", "--num_samples", "8", "--max_length", "32"]
    assert run(place, "quantize", "--model", "M", *words, "--output_dir", "Q") == 0
    for kind, words in {"hidden": [], "topk": ["--what", "topk"], "sampled": ["--what", "topk", "--sampling"]}.items():
        words += ["--top_k", "100"] if kind != "hidden" else []
        assert run(place, "cache", "--model", "M", *WINDOWS, *SWEEP, *words, "--output_dir", kind) == 0
    return place


def run(place, verb, *words):
    names = {"M", "Q", "hidden", "wide", "topk", "sampled", "text.txt"}
    flags = [
        str(place / w) if w in names and words[i - 1] not in ("--what", "--teacher_targets") else w
        for i, w in enumerate(words)
    ]
    if "--output_dir" in words and not os.path.isabs(words[words.index("--output_dir") + 1]):
        flags[words.index("--output_dir") + 1] = str(place / words[words.index("--output_dir") + 1])
    return main([verb, *flags, "--dataset", str(place / "text.txt")])


def windows(place):
    text = runs.Text(dataset=str(place / "text.txt"), num_samples=13, max_length=32)
    return text.input_ids(load.tokenizer(str(place / "M")), 3)


def test_what_is_cached_is_what_the_live_teacher_says(place):
    ids = windows(place)
    teacher = load.model(str(place / "M"))
    live = LiveTeacher(teacher)
    for rows in (slice(0, 5), [12, 0, 7]):
        batch = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows])}
        expected = live.targets(batch)
        found = CachedTeacher(place / "hidden").targets(batch)
        assert torch.equal(found.hidden, expected.hidden.bfloat16())
        assert torch.equal(found.head.weight.float(), expected.head.weight)
        topk = CachedTeacher(place / "topk").targets(batch)
        logits = teacher(**batch).logits.flatten(0, 1)
        assert torch.equal(topk.ids, logits.topk(100).indices)
        assert_close(topk.values, (logits.topk(100).values - logits.amax(1, keepdim=True)), 1e-3)
        rest = logits.sort(descending=True).values[:, 100:].logsumexp(1) - logits.amax(1)
        assert_close(topk.lse, rest, 1e-5)
        sampled = CachedTeacher(place / "sampled").targets(batch)
        counts = torch.zeros(logits.shape).scatter_add_(1, sampled.ids, torch.ones(sampled.ids.shape))
        assert ((counts - 100 * logits.softmax(1)).abs() < 1.001).all()


def test_a_dry_run_tells_the_bytes_that_are_then_written(place, capsys):
    for kind, words in {"hidden": [], "topk": ["--what", "topk", "--top_k", "100"]}.items():
        capsys.readouterr()
        words = ["--model", "M", *WINDOWS, *SWEEP, *words, "--output_dir", "dry"]
        assert run(place, "cache", *words, "--dry_run", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert not (place / "dry").exists() and told["fits"] and told["estimated_seconds"] >= 0
        files = list((place / kind).glob("*.safetensors"))
        assert len(files) == told["num_shards"] + 1 == 5
        size = sum(t.nbytes for path in files for t in tensors(path).values())
        assert size == told["bytes"] == 13 * (32 * told["bytes_per_token"] + 16) + told["head_bytes"]


def tensors(path):
    with checkpoint.open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def train(place, out, capsys, *words):
    shutil.rmtree(place / out, ignore_errors=True)
    capsys.readouterr()
    training = ["--max_steps", "20", "--learning_rate", "5e-3", "--lora_r", "4", "--logging_steps", "1", "--use_cpu"]
    words = [*WINDOWS, *training, "--per_device_train_batch_size", "2", *words]
    assert run(place, "train", "--model", "Q", *words, "--output_dir", out, "--json") == 0
    return torch.tensor([row["loss"] for row in json.loads(capsys.readouterr().out)["history"]])


def test_training_from_a_hidden_cache_is_training_with_the_live_teacher(place, capsys):
    live = train(place, "A", capsys, "--teacher", "M")
    cached = train(place, "B", capsys, "--teacher_cache", "hidden")
    assert len(live) == 20 and live[-1] < 0.9 * live[0]
    assert ((cached - live).abs() <= 1e-3 * live).all(), (cached / live - 1).abs().max()
    words = [*WINDOWS, "--hidden_dtype", "float32", "--sweep_tokens", "64", "--output_dir", "wide"]
    assert run(place, "cache", "--model", "M", *words) == 0
    wide = train(place, "B", capsys, "--teacher_cache", "wide")
    assert ((wide - live).abs() <= 1e-6 * live).all(), (wide / live - 1).abs().max()
    made = train(place, "C", capsys, "--teacher", "M", "--teacher_targets", "hidden")
    assert torch.equal(made, cached)
    assert not (place / "C" / correction.WORKING_CACHE).exists()
    topk = train(place, "D", capsys, "--teacher_cache", "topk")
    assert (topk < live).all(), "a lower bound"


def test_only_windows_that_the_steps_see_are_cached(place):
    from lrec.trainer import LrecConfig

    config = LrecConfig(str(place / "x"), max_steps=3, per_device_train_batch_size=2, use_cpu=True)
    made = {"model": "", "output_dir": "", "dataset": str(place / "text.txt"), "max_length": 32, "num_samples": None}
    tokenizer = load.tokenizer(str(place / "M"))
    assert len(correction.Train(**made, teacher_targets="hidden").windows(tokenizer, config)) == 6
    assert len(correction.Train(**made).windows(tokenizer, config)) > 100


def test_the_students_head_serves_if_it_is_the_teachers(place):
    student = load.model(str(place / "Q"))
    shared = CachedTeacher(place / "hidden", student)
    assert shared.head is None and shared.targets({"input_ids": windows(place)[:1]}).head.weight is not None
    with torch.no_grad():
        student.lm_head.weight[-1, -1] += 1
    own = CachedTeacher(place / "hidden", student)
    head = own.targets({"input_ids": windows(place)[:1]}).head
    assert not torch.equal(head.weight.float(), Head.of(student).weight)


def test_a_window_that_is_not_there_stops_before_training(place, capsys):
    ids = windows(place)
    cached = CachedTeacher(place / "hidden")
    cached.check(Objective(), ids.tolist())
    other = ids.clone()
    other[4, 31] += 1
    with pytest.raises(ValueError, match="1 of 13 training windows"):
        cached.check(Objective(), other.tolist())
    with pytest.raises(ValueError, match="is not in"):
        cached.targets({"input_ids": other[3:6]})
    with pytest.raises(ValueError, match="is not in"):
        cached.targets({"input_ids": ids[:1, :31]})
    words = ["--model", "Q", "--teacher_cache", "hidden", "--output_dir", "x", "--max_length", "32"]
    assert run(place, "train", *words, "--num_samples", "13", "--seed", "4", "--max_steps", "1") == 2
    assert "training windows are not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("topk", ["--hidden_weight", "0.1"], "needs hidden states"),
        ("topk", ["--temperature", "2"], "temperature = 2"),
        ("sampled", ["--divergence", "jsd"], "unbiased for forward_kl alone"),
    ],
)
def test_what_logits_cannot_give_stops_before_training(place, capsys, kind, words, message):
    words = ["--model", "Q", "--teacher_cache", kind, *WINDOWS, *words, "--max_steps", "1", "--output_dir", "x"]
    assert run(place, "train", *words) == 2
    assert message in capsys.readouterr().err and not any((place / "x").glob("*"))


def test_the_cache_of_another_teacher_tokenizer_or_run_is_refused(place, tmp_path, capsys):
    tiny_model(tmp_path / "other", seed=1, initializer_range=0.2)
    words = ["--output_dir", str(tmp_path / "C"), *WINDOWS]
    assert run(place, "cache", "--model", str(tmp_path / "other"), *words) == 0
    training = ["--model", "Q", "--teacher_cache", str(tmp_path / "C"), *WINDOWS, "--max_steps", "1", "--use_cpu"]
    assert run(place, "train", *training, "--output_dir", "x") == 2
    assert "the cache of another teacher" in capsys.readouterr().err
    # Named, another teacher is what the user wants.
    assert run(place, "train", *training, "--teacher", str(tmp_path / "other"), "--output_dir", "y") == 0
    assert run(place, "cache", "--model", "M", *words) == 2
    assert "another teacher_sha256;" in capsys.readouterr().err
    assert run(place, "cache", "--model", str(tmp_path / "other"), *words[:2], *WINDOWS[:4], "--seed", "9") == 2
    assert "another ids_sha256;" in capsys.readouterr().err
    manifest = checkpoint.read_json(tmp_path / "C" / checkpoint.MANIFEST)
    manifest["tokenizer"]["sha256"] = "0" * 64
    checkpoint.write_json(tmp_path / "C" / checkpoint.MANIFEST, manifest)
    assert run(place, "train", *training, "--teacher", str(tmp_path / "other"), "--output_dir", "x") == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_damage_and_foreign_directories_are_refused(place, tmp_path):
    shutil.copytree(place / "hidden", tmp_path / "C")
    path = tmp_path / "C" / "targets-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"targets-00002.*was altered"):
        TargetCache(tmp_path / "C")
    with pytest.raises(ValueError, match="no teacher's cache"):
        TargetCache(place / "M")
    with pytest.raises(ValueError, match="is a model"):
        TargetCache(place / "Q")
    with pytest.raises(ValueError, match="not empty"):
        TargetCache.begin(place / "M", {})


def test_a_disk_without_room_is_refused_before_anything_is_written(place, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 20000, 20000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ["--model", "M", *WINDOWS, "--output_dir", "full"]
    assert run(place, "cache", *words, "--dry_run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert run(place, "cache", *words) == 3
    assert "has 20,000 free" in capsys.readouterr().err and not (place / "full").exists()


def capture(place, directory):
    job = Capture.of(
        str(place / "M"), windows(place), directory, CaptureSettings(sweep_tokens=64, batch_size=1), "cpu", "auto"
    )
    job.run()


def test_a_capture_killed_at_random_moments_ends_with_the_same_bytes(place, tmp_path):
    killed = tmp_path / "killed"
    run_apart(partial(capture, place, tmp_path / "first"))  # what runs first is slower
    seconds = run_apart(partial(capture, place, tmp_path / "straight"))

    def at_work():
        manifest = killed / checkpoint.MANIFEST
        done = len(checkpoint.read_json(manifest)["files"]) if manifest.exists() else 0
        if done == 8:
            assert_same_files(tmp_path / "straight", killed)
            shutil.rmtree(killed)
        return 0 < done < 8

    kill_at_random(partial(capture, place, killed), seconds, at_work)
    capture(place, killed)
    assert_same_files(tmp_path / "straight", killed)


def assert_same_files(expected, actual):
    names = {path.name for path in expected.iterdir()}
    assert names == {path.name for path in actual.iterdir()}
    for name in names:
        assert (expected / name).read_bytes() == (actual / name).read_bytes(), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_teacher_visits_its_blocks_again_and_again(tmp_path, tied):
    model = tiny_model(tmp_path, tie_word_embeddings=tied)
    ids = torch.randint(0, 256, (3, 16))
    with torch.no_grad():
        expected = final_hidden(model, ids)
    streamed = StreamedForward(tmp_path, torch.float32)
    calls = streamed.block_calls(ids)
    for _ in range(3):
        streamed.load_embeddings()
        hidden = streamed.embed(ids)
        streamed.free_embeddings()
        assert streamed.model.get_input_embeddings().weight.is_meta
        for (_, block), call in zip(streamed.visit(), calls, strict=True):
            hidden = call(block, hidden)
            assert sum(not b.self_attn.q_proj.weight.is_meta for b in streamed.blocks) <= 2
        assert torch.equal(streamed.finish(hidden), expected)
