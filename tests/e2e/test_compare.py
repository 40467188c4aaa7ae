"""`lrec compare` on a tiny model: its rows are those of quantize and evaluate, and a killed call goes on."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checks import tiny_model

from lrec import checkpoint
from lrec.cli import main
from lrec.compare import FULL, RESULTS, Compare, labels, read_entry

FIRST, SECOND, BAD = "rtn:2:group_size=32", "gptq:3:group_size=32", "gptq:2:group_size=100"
METHODS = f"{FIRST},{SECOND}"
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


def flags(found: Compare) -> list[str]:
    return ["compare", *(f"--{name}={value}" for name, value in dataclasses.asdict(found).items())]


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
    ],
)
def test_a_wrong_entry_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        read_entry(entry, 0)


def test_an_entry_comes_to_all_settings_of_its_method():
    found = labels("nf4,gptq:3:group-size=128:bits_map=mlp.*=4,re:.*up_proj=3,down_proj=8,rtn:2,kmeans")
    assert [label.split(":")[0] for label in found] == ["nf4", "gptq", "rtn", "kmeans"]
    entry = read_entry(found[1], 0)
    assert entry.settings["method"] == "gptq" and entry.settings["bits"] == 3 and entry.settings["group_size"] == 128
    assert entry.settings["bits_map"] == "mlp.*=4,re:.*up_proj=3,down_proj=8" and entry.settings["init_rank"] == 0
    assert entry.folder != read_entry(found[1], 8).folder


def test_preprocessing_is_part_of_an_entry():
    entry = read_entry("ptq161:preprocess=kl:preprocess_steps=3", 0)
    assert entry.settings["preprocess"] == "kl" and entry.settings["preprocess_steps"] == 3
    # Without it an entry comes to what it came to before there was any.
    assert "preprocess" not in read_entry("ptq161", 0).settings
    with pytest.raises(ValueError, match="unknown value of --preprocess 'kk'; allowed: ce, kl, none"):
        read_entry("rtn:2:preprocess=kk", 0)
