"""`lrec compare` on a tiny model: rows are those of quantize, train, export and evaluate, and a killed call goes on."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checks import tiny_model

from lrec import apart, checkpoint, shapes
from lrec.cli import main
from lrec.compare import FULL, RESULTS, Compare
from lrec.compare_entries import check_rank, expand, labels, layouts, read_entry

FIRST, SECOND, BAD = "rtn:2:group_size=32", "gptq:3:group_size=32", "gptq:2:group_size=100"
METHODS = f"{FIRST},{SECOND}"
FOLDED = "rtn:2:group_size=32:zero_point=float:scale_bits=8:train=scales,zeros:scales_learning_rate=6e-3"
ADAPTED = "rtn:2:group_size=64:train=adapters:lora_r=2"
# Without a text for its scales, and with levels whose place is read from the data.
TABLED = "icquant:2:scale_search=mse:train=scales"
LEARNED = (FOLDED, ADAPTED, TABLED)
LESSONS = {"tokens": 64, "length": 16, "dtype": "float32"}
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """A comparison of two methods that was killed in the second one and called again with a third that must fail.

    `killed` is its table at that time, `gone` tells that the quantizing process ended with it.
    """
    place = tmp_path_factory.mktemp("compare")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 200)
    words = {"model": str(place / "M"), "dataset": str(place / "text.txt"), "test_dataset": str(place / "text.txt")}
    sizes = {"num_samples": 8, "max_length": 32, "test_samples": 8}
    found = Compare(**words, **sizes, methods=METHODS, output_dir=str(place / "C"))
    call = subprocess.Popen([sys.executable, "-m", "lrec", *flags(found)], stderr=subprocess.DEVNULL)
    wait_until((place / "C" / "packed" / read_entry(SECOND, 0).folder).exists)
    workers = Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split()
    call.kill()
    call.wait()
    assert workers
    # They must not write on in the directory in which the next call goes on.
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    killed = rows(found)
    assert main(flags(dataclasses.replace(found, methods=f"{METHODS},{BAD}"))) == 1
    return found, killed


@pytest.fixture(scope="module")
def learned(compare, tmp_path_factory):
    """A comparison of methods that are trained, whose runs are made in this process, so as not to import all anew."""
    output_dir = str(tmp_path_factory.mktemp("learned") / "C")
    training = {"training_tokens": 64, "training_length": 16, "keep_models": True}
    found = dataclasses.replace(compare[0], methods=",".join(LEARNED), output_dir=output_dir, **training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart.subprocess, "run", run_here)
        assert main(flags(found)) == 0
    return found


def run_here(command: list[str], stdout, stderr, text: bool) -> subprocess.CompletedProcess:
    """What `subprocess.run` does with a verb of lrec."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(stderr):
        code = main(command[command.index(apart.CHILD) + 1 :])
    return subprocess.CompletedProcess(command, code, told.getvalue())


def flags(found: Compare) -> list[str]:
    given = {name: "none" if value is None else value for name, value in dataclasses.asdict(found).items()}
    return ["compare", *(f"--{name}={value}" for name, value in given.items())]


def rows(found: Compare) -> dict[str, dict]:
    return {row["method"]: row for row in checkpoint.read_json(Path(found.output_dir) / RESULTS)["rows"]}


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_call_goes_on_with_what_is_missing(compare):
    found, killed = compare
    assert list(killed) == [FULL, FIRST]
    assert list(rows(found)) == [FULL, FIRST, SECOND, BAD]
    assert {label: rows(found)[label] for label in killed} == killed
    assert {path.name.split("-")[0] for path in (Path(found.output_dir) / "packed").iterdir()} == {
        "gptq_2_group_size=100"
    }


@pytest.mark.parametrize("label", [FIRST, SECOND])
def test_rows_are_those_of_quantize_and_evaluate(compare, label, tmp_path, capsys):
    found, _ = compare
    method, bits, group_size = label.replace("group_size=", "").split(":")
    text = ["--dataset", found.dataset, "--num_samples", "8", "--max_length", "32"]
    words = ["--model", found.model, "--method", method, "--bits", bits, "--group_size", group_size, "--init_rank", "0"]
    assert main(["quantize", *words, *text, "--output_dir", str(tmp_path / "Q")]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "Q"), "--teacher", found.model, *text, "--json"]) == 0
    told, row = json.loads(capsys.readouterr().out), rows(found)[label]
    for name in ("perplexity", "kl", "top1_agreement", "bits_per_weight", "total_bytes"):
        assert row[name] == pytest.approx(told[name], rel=1e-6), name
    assert row["seconds"] > 0 and 2**26 < row["peak_bytes"] < 2**32
    assert rows(found)[FULL]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("label", LEARNED)
def test_a_trained_row_is_of_what_a_user_would_keep(learned, label, capsys):
    row, entry, adapted = rows(learned)[label], read_entry(label, 0, LESSONS), label == ADAPTED
    adapter = learned.place("trained", entry)
    kept = ["--model", str(learned.place("packed" if adapted else "folded", entry))]
    kept += ["--adapter", str(adapter)] if adapted else []
    text = ["--dataset", learned.dataset, "--num_samples", "8", "--max_length", "32"]
    capsys.readouterr()
    assert main(["evaluate", *kept, "--teacher", learned.model, *text, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for name in ("perplexity", "kl", "top1_agreement", "bits_per_weight", "total_bytes"):
        assert row[name] == pytest.approx(told[name], rel=1e-6), name
    assert row["kl"] < row["kl_quantized"]
    if adapted:
        added = 8 * (adapter / checkpoint.ADAPTER_WEIGHTS).stat().st_size / (2 * 64 * (2 * 64 + 2 * 32 + 3 * 160))
        assert row["bits_per_weight"] - row["bits_per_weight_quantized"] == pytest.approx(added)
    else:
        assert row["bits_per_weight"] == row["bits_per_weight_quantized"]
    assert row["training_seconds"] > 0 and row["seconds"] > 0 and row["training_tokens"] == 64


def test_all_learn_once_from_the_windows_that_were_cached_once(learned):
    made = Path(learned.output_dir)
    (cache,) = (path for path in made.glob("teacher_*") if path.is_dir())
    assert checkpoint.read_json(cache / checkpoint.MANIFEST)["num_windows"] == 4
    for label in LEARNED:
        adapter = learned.place("trained", read_entry(label, 0, LESSONS))
        told = checkpoint.read_json(adapter / checkpoint.ADAPTER_STAMP)
        assert told["num_steps"] == 4 and told["teacher"] == str(cache) and told["dataset"] == learned.dataset


def test_a_trained_row_is_taken_up_only_for_the_same_training(learned):
    path = Path(learned.output_dir) / RESULTS

    def kept(label, **changes):
        return label in learned.finished(path, {label: read_entry(label, 0, LESSONS | changes)})

    assert all(map(kept, LEARNED))
    assert not any(kept(FOLDED, **change) for change in ({"tokens": 128}, {"length": 32}, {"dtype": "bfloat16"}))
    # Nothing is left to run, so that nothing is started.
    assert learned.run()["failed"] == 0
    with pytest.raises(ValueError, match=r"holds results for dataset = .*remove it"):
        dataclasses.replace(learned, dataset="other.txt").run()


def test_what_differs_in_training_alone_is_quantized_once(learned, tmp_path, monkeypatch):
    base, started = "rtn:2:group_size=32", []

    def count(command, **kwargs):
        started.append(command[command.index(apart.CHILD) + 1])
        return run_here(command, **kwargs)

    monkeypatch.setattr(apart.subprocess, "run", count)
    changes = {"methods": f"{base}:train=scales,{base}", "output_dir": str(tmp_path / "C"), "keep_models": False}
    found = dataclasses.replace(learned, **changes)
    # Killed in its first moments, a run leaves what it does not go on from.
    left = found.place("packed", read_entry(base, 0))
    left.mkdir(parents=True)
    (left / ".lrec_progress.json.1.partial").touch()
    assert found.run()["failed"] == 0 and started == ["cache", "quantize", "train", "export"]
    first, second = (rows(found)[label] for label in labels(found.methods))
    assert first["kl_quantized"] == second["kl"]
    assert not [*(tmp_path / "C").glob("*/rtn*")]
    assert read_entry(LEARNED[0], 0, LESSONS).base == read_entry(LEARNED[0].partition(":train")[0], 0)


def test_a_method_that_fails_is_a_row_that_says_why(compare):
    row = rows(compare[0])[BAD]
    assert "q_proj: group_size = 100 does not fit 64 columns" in row["error"] and "exit code 2" in row["error"]
    assert "kl" not in row


def test_a_row_is_taken_up_only_for_the_same_settings(compare):
    found, _ = compare
    path = Path(found.output_dir) / RESULTS

    def kept(*labels, init_rank=0):
        return list(found.finished(path, {label: read_entry(label, init_rank) for label in labels}))

    assert kept(FIRST, SECOND) == [FULL, FIRST, SECOND]
    assert kept(SECOND, init_rank=4) == [FULL, FIRST]
    # A row that failed is tried again; those that are not named stay.
    assert kept(BAD) == [FULL, FIRST, SECOND]
    for change in ({"num_samples": 9}, {"seed": 1}, {"dtype": "bfloat16"}, {"test_samples": 7}):
        with pytest.raises(ValueError, match=f"holds results for {next(iter(change))} = .*remove it"):
            dataclasses.replace(found, **change).finished(path, {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gptw:2", "'gptw:2'.*Did you mean 'gptq'"),
        ("gptq:2:group_sizes=64", "'gptq:2:group_sizes=64'.*Did you mean 'group_size'"),
        ("gptq:2:64", "--bits is '2:64', but must be int"),
        ("gptq:5", "bits = 5 is not offered; allowed: 2, 3, 4, 8"),
        ("gptq:two", "--bits is 'two', but must be int"),
        ("gptq:2:output_dir=x", "unknown setting 'output_dir'"),
        ("", "unknown quantizer ''"),
        ("rtn:2,gptw:2", "unknown quantizer 'gptw'.*Did you mean 'gptq'"),
        ("rtn:2:lora_r=4", "unknown setting 'lora_r'"),
        ("rtn:2:train=scales:learning_rat=1", "unknown setting 'learning_rat'.*Did you mean 'learning_rate'"),
        ("rtn:2:train=scales,zero", "unknown part to train 'zero'.*Did you mean 'zeros'"),
        ("rtn:2:train=scales:max_steps=9", "max_steps cannot be an entry's own"),
    ],
)
def test_a_wrong_entry_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        read_entry(entry, 0, LESSONS)


def test_a_comparison_that_cannot_train_is_refused_before_anything_runs(learned):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(learned, **changes).run()

    refused("'icquant:2.*needs --training_tokens", training_tokens=None, methods=TABLED)
    refused("training_tokens = 70 is no whole number of windows of 16 .* the nearest is 64", training_tokens=70)
    refused("lora_r = 40 is larger than .*k_proj \\(32, 64\\).* up to 32", methods="rtn:2:train=all:lora_r=40")
    refused("'layouts:5': layouts needs a width; allowed: layouts:2", methods="layouts:5")


def test_layouts_are_entries_of_the_same_bytes():
    sides = shapes.linear_sides("llama-7b")
    found = expand("layouts:2:weight_decay=0.1", lambda: sides)
    assert found == [f"{label}:weight_decay=0.1" for label in layouts(2, sides)] and len(set(found)) == 7
    assert labels(",".join(found)) == found
    # algorithms.md counts rank 22 in 16 bits or 45 in 8, and that 2.28 bits per weight are met.
    entries = [read_entry(label, 0, LESSONS) for label in layouts(2, sides)]
    ranks = [entry.settings["training"]["lora_r"] for entry in entries if entry.adapted]
    assert ranks == [22, 45, 50] and [entry.given["init_rank"] for entry in entries if entry.adapted] == ranks
    assert entries[-1].settings["target_bpw"] == pytest.approx(2.2812)
    allocated = "gptq:2:target_bpw=2.5:init_rank=32:allocate_ranks=true:train=adapters:lora_bits=8"
    assert read_entry(allocated, 0, LESSONS).given["init_rank"] == "32"
    small = {"q_proj": (32, 64)}
    check_rank(read_entry(layouts(2, small)[1], 0, LESSONS), small)


def test_an_entry_comes_to_all_settings_of_its_method():
    found = labels("nf4,gptq:3:group-size=128:bits_map=mlp.*=4,re:.*up_proj=3,down_proj=8,rtn:2,kmeans")
    assert [label.split(":")[0] for label in found] == ["nf4", "gptq", "rtn", "kmeans"]
    entry = read_entry(found[1], 0)
    assert entry.settings["method"] == "gptq" and entry.settings["bits"] == 3 and entry.settings["group_size"] == 128
    assert entry.settings["bits_map"] == "mlp.*=4,re:.*up_proj=3,down_proj=8" and entry.settings["init_rank"] == 0
    assert entry.folder != read_entry(found[1], 8).folder
    learned = "gptq:2:train=scales,zeros:lora_target_modules=q_proj,k_proj"
    assert labels(f"nf4,{learned},rtn:3,layouts:2,nf2") == ["nf4", learned, "rtn:3", "layouts:2", "nf2"]


def test_preprocessing_is_part_of_an_entry():
    entry = read_entry("ptq161:preprocess=kl:preprocess_steps=3", 0)
    assert entry.settings["preprocess"] == "kl" and entry.settings["preprocess_steps"] == 3
    # Without it an entry comes to what it came to before there was any.
    assert "preprocess" not in read_entry("ptq161", 0).settings
    with pytest.raises(ValueError, match="unknown value of --preprocess 'kk'; allowed: ce, kl, none"):
        read_entry("rtn:2:preprocess=kk", 0)
