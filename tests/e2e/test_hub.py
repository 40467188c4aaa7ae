"""`lrec push` and push_to_hub against a Hub on loopback, by the real client; what went there comes back the same."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from hub_server import TOKEN, serving
from safetensors.torch import load_file
from test_exports import export, packed_model

from lrec import checkpoint, export_record, load, record
from lrec.cli import main

TEXT = "In the beginning there was a quick brown fox, and it jumped over seven lazy dogs.\n"
IDS = torch.arange(32)[None]


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """A packed model Q with an adapter A, as `lrec train` leaves it, and a text; only read by the tests."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("hub")
    (place / "text.txt").write_text(TEXT * 20)
    base = packed_model(dense, "--bits", "4", "--group_size", "32")
    (place / "Q").symlink_to(base)
    model = get_peft_model(load.model(str(base)), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(place / "A")
    stamp = {"base_model": str(base), "packed_sha256": checkpoint.packed_sha256(model.get_base_model()), "lora_r": 4}
    checkpoint.write_json(place / "A" / checkpoint.ADAPTER_STAMP, stamp | {"teacher": str(dense)})
    (place / "A" / "training_args.bin").write_bytes(b"pickled")
    words = ["--teacher", str(dense), "--dataset", str(place / "text.txt"), "--max_length", "32", "--num_samples", "4"]
    assert main(["evaluate", "--model", str(base), *words, "--record"]) == 0
    assert main(["evaluate", "--model", str(base), "--adapter", str(place / "A"), *words, "--record"]) == 0
    return place


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that holds the base `owner/tiny`, for this process and, by its environment, for those it starts."""
    from huggingface_hub import constants

    with serving() as hub:
        # huggingface_hub has read these when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        told = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        for name, value in {**told, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        hub.add("owner/tiny", {"README.md": b"---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# tiny\n"})
        yield hub


def push(directory, repo_id, *words):
    return main(["push", str(directory), "--repo_id", repo_id, *words])


def card_of(tree):
    """The head of a repository's card as a mapping, and its body."""
    _, head, body = tree["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), body


def test_what_is_pushed_comes_back_the_same_in_a_process_that_knows_the_hub_alone(made, hub, tmp_path):
    before = {path: path.read_bytes() for part in ("Q", "A") for path in (made / part).iterdir()}
    assert push(made / "Q", "me/tiny-4bit", "--base_model", "owner/tiny", "--private") == 0
    assert push(made / "A", "me/tiny-lora", "--base_model", "me/tiny-4bit") == 0
    assert before == {path: path.read_bytes() for part in ("Q", "A") for path in (made / part).iterdir()}
    assert [len(hub.repos[name]["commits"]) for name in ("me/tiny-4bit", "me/tiny-lora")] == [2, 2]
    assert hub.repos["me/tiny-4bit"]["private"] and not hub.repos["me/tiny-lora"]["private"]
    trees = {part: hub.tree(f"me/tiny-{name}")[1] for part, name in (("Q", "4bit"), ("A", "lora"))}
    for part, tree in trees.items():
        for path in [*(made / part).glob("*.safetensors"), *(made / part).glob("tokenizer*")]:
            assert tree[path.name] == path.read_bytes()
        assert not any(str(made).encode() in data for name, data in tree.items() if not name.endswith("safetensors"))
    assert "training_args.bin" not in trees["A"] and "tokenizer.json" in trees["Q"]
    script = tmp_path / "reader.py"
    script.write_text("""
import sys, torch, lrec
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(32)[None]
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained("me/tiny-4bit", dtype=torch.float32)
    base.push_to_hub("me/again")
    again = AutoModelForCausalLM.from_pretrained("me/again", dtype=torch.float32)
    logits = [base(ids).logits, again(ids).logits]
    logits.append(PeftModel.from_pretrained(base, "me/tiny-lora").eval()(ids).logits)
    torch.save(logits, sys.argv[1])
print(snapshot_download("me/tiny-4bit"))
""")
    done = subprocess.run([sys.executable, script, tmp_path / "logits"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    base, again, corrected = torch.load(tmp_path / "logits")
    with torch.no_grad():
        expected = load.model(str(made / "Q"), dtype="float32")(IDS).logits
        assert torch.equal(base, expected) and torch.equal(again, expected)
        expected = load.model(str(made / "Q"), str(made / "A"), dtype="float32")(IDS).logits
        assert torch.equal(corrected, expected) and not torch.equal(corrected, base)
    folder = done.stdout.splitlines()[-1]
    checkpoint.verify(folder)
    assert main(["inspect", "--model", folder]) == 0


def test_the_cards_tell_what_the_hub_and_a_reader_ask(made, hub):
    push(made / "Q", "me/tiny-4bit", "--base_model", "owner/tiny")
    push(made / "A", "me/tiny-lora", "--base_model", "me/tiny-4bit")
    (base_id, _), (packed_id, packed), (_, adapter) = map(hub.tree, ("owner/tiny", "me/tiny-4bit", "me/tiny-lora"))
    head, body = card_of(packed)
    assert head == {
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lrec", "quantized", "4-bit", "rtn"],
    }
    row = record.rows(made / "Q")[0]
    bits = checkpoint.read_json(made / "Q" / "config.json")["quantization_config"]["meta"]["bits_per_weight"]
    numbers = [f"{row[key]:.4g}" for key in ("perplexity", "kl", "top1_agreement", "bits_per_weight")]
    assert f"| text.txt | {row['num_tokens']} | {' | '.join(numbers)} |" in body
    assert f"{bits:.2f} bits per weight" in body and base_id in body and "- group_size: 32" in body
    assert 'from_pretrained("me/tiny-4bit")' in body
    head, body = card_of(adapter)
    told = {key: head[key] for key in ("base_model", "base_model_relation", "library_name", "license", "tags")}
    assert told == {
        "base_model": "me/tiny-4bit",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["lrec", "quantized", "lora"],
    }
    assert "owner/tiny at 4." in body and f"{record.rows(made / 'A')[0]['kl']:.4g}" in body
    config = json.loads(adapter["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny-4bit", packed_id)
    meta = json.loads(packed["config.json"])["quantization_config"]["meta"]
    assert (meta["base_model"], meta["base_revision"]) == ("owner/tiny", base_id)


BASE = ("--base_model", "owner/tiny")


@pytest.mark.parametrize(
    ("part", "words", "message"),
    [
        ("Q", (), "which only this machine has: give its Hub id by --base_model OWNER/NAME"),
        ("A", (), "which only this machine has: push it first, then give its Hub id"),
        ("Q", ("--base_model", "owner/gone"), "the Hub shows you no owner/gone"),
        ("Q", (*BASE, "--max_kl", "0"), "above --max_kl 0: give it more bits"),
        ("A", ("--base_model", "owner/packed"), "was made for a base with packed weights"),
        ("Q", (*BASE, "--repo_id=tiny"), "--repo_id 'tiny' is not OWNER/NAME"),
        ("Q", (*BASE, "--repo_id=owner/packed"), "owner/packed holds 1 files already; --replace puts these"),
    ],
)
def test_what_should_not_go_is_refused_before_anything_went(made, hub, capsys, part, words, message):
    other = {"quantization_config": {"quant_method": "lrec", "meta": {"packed_sha256": "another"}}}
    hub.add("owner/packed", {"config.json": json.dumps(other).encode()})
    there = {name: len(repo["commits"]) for name, repo in hub.repos.items()}
    repo = [word for word in words if word.startswith("--repo_id")] or ["--repo_id=me/new"]
    rest = [word for word in words if word not in repo]
    assert main(["push", str(made / part), *repo, *rest]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert there == {name: len(repo["commits"]) for name, repo in hub.repos.items()} and not hub.objects


def test_quality_that_nobody_measured_is_not_pushed_unless_forced(made, hub, tmp_path, capsys):
    copy = tmp_path / "A"
    copy.mkdir()
    for path in (made / "A").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    push(made / "Q", "me/tiny-4bit", *BASE)
    tensors = {key: tensor * 1.5 for key, tensor in load_file(copy / "adapter_model.safetensors").items()}
    checkpoint.write_tensors(copy / "adapter_model.safetensors", tensors)
    capsys.readouterr()
    # What is on record was measured on other weights.
    assert push(copy, "me/new", "--base_model", "me/tiny-4bit") == 2
    assert "no evaluation of these weights is on record" in capsys.readouterr().err
    assert push(copy, "me/new", "--base_model", "me/tiny-4bit", "--force") == 0
    assert "No evaluation is on record." in card_of(hub.tree("me/new")[1])[1]


def test_without_token_or_network_or_with_a_damaged_file_nothing_goes(made, hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert push(made / "Q", "me/new", *BASE) == 2
    assert "not pushed: no Hub token: run `hf auth login`, or set HF_TOKEN." in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(made / "Q", "me/new", *BASE) == 2
    told = capsys.readouterr().err
    assert "not pushed: " in told and "401" in told and told.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(made / "Q", "me/new", *BASE) == 2
    told = capsys.readouterr().err
    assert "not pushed: " in told and "is as it was" in told and told.count("\n") == 1
    copy = tmp_path / "Q"
    copy.mkdir()
    for path in (made / "Q").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert push(copy, "me/new", *BASE) == 2
    assert "model-00001-of-00003.safetensors has" in capsys.readouterr().err
    assert set(hub.repos) == {"owner/tiny"} and not hub.objects


def kill_a_push(hub, directory, repo_id, stall_at):
    """Kills a push of the directory when the hub has been sent so many files."""
    words = [sys.executable, "-m", "lrec", "push", str(directory), "--repo_id", repo_id, *BASE]
    hub.stall_at = stall_at
    child = subprocess.Popen(words, env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    assert hub.stalled.wait(120)
    child.kill()
    child.wait()


def test_a_killed_push_leaves_nothing_that_loads_and_goes_on(made, hub):
    kill_a_push(hub, made / "Q", "me/tiny-4bit", stall_at=3)
    assert set(hub.tree("me/tiny-4bit")[1]) == {".gitattributes"}
    checkpoint.verify(made / "Q")
    sent = len(hub.objects)
    assert sent > 0
    hub.stall_at, hub.num_puts = None, 0
    assert push(made / "Q", "me/tiny-4bit", *BASE) == 0
    assert hub.num_puts == len(list((made / "Q").glob("*.safetensors"))) - sent
    assert "config.json" in hub.tree("me/tiny-4bit")[1]


def test_a_new_version_replaces_the_shards_of_the_old_in_one_commit(made, hub, capsys):
    hub.add("me/tiny-4bit", {"model-00009-of-00009.safetensors": b"old", "notes.txt": b"kept", ".gitattributes": b""})
    assert push(made / "Q", "me/tiny-4bit", *BASE, "--replace") == 0
    tree = hub.tree("me/tiny-4bit")[1]
    assert "model-00009-of-00009.safetensors" not in tree and tree["notes.txt"] == b"kept"
    assert len(hub.repos["me/tiny-4bit"]["commits"]) == 2
    assert push(made / "Q", "me/other", *BASE, "--license", "mit") == 0
    head, _ = card_of(hub.tree("me/other")[1])
    assert head["license"] == "mit" and head["language"] == ["en"]
    capsys.readouterr()
    assert push(made / "Q", "me/third", *BASE, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "base_model: owner/tiny" in told and "me/third" not in hub.repos


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """A directory of exports by format: `merged` with the adapter, the others of the packed model."""
    place = tmp_path_factory.mktemp("exports")
    for format in ("merged", "gptq", "compressed-tensors", "gguf"):
        words = ["--adapter", str(made / "A")] if format == "merged" else []
        assert export(made / "Q", place / format, format, *words) == 0
    return place


@pytest.mark.parametrize(
    ("format", "relation", "library", "tags", "load_line"),
    [
        ("merged", "finetune", "transformers", [], "vllm serve me/tiny"),
        ("gptq", "quantized", "transformers", ["gptq"], "pip install optimum gptqmodel"),
        ("compressed-tensors", "quantized", "transformers", ["compressed-tensors"], "vllm serve me/tiny"),
        ("gguf", "quantized", "gguf", ["gguf"], "llama-cli --hf-repo me/tiny --hf-file model.gguf"),
    ],
)
def test_an_export_goes_whole_with_a_card_that_tells_what_it_is(
    made,
    exported,
    hub,
    format,
    relation,
    library,
    tags,
    load_line,
):
    before = {path: path.read_bytes() for path in (exported / format).iterdir()}
    assert push(exported / format, "me/tiny", *BASE) == 0
    assert before == {path: path.read_bytes() for path in (exported / format).iterdir()}
    (base_id, _), (_, tree) = hub.tree("owner/tiny"), hub.tree("me/tiny")
    assert tree.keys() == {path.name for path in before} | {"README.md", ".gitattributes"}
    for path in export_record.weight_files(exported / format):
        assert tree[path.name] == path.read_bytes()
    assert not any(str(made).encode() in data for name, data in tree.items() if name.endswith((".json", ".md")))
    told = json.loads(tree[export_record.FILE])["meta"]
    assert (told["base_model"], told["base_revision"]) == ("owner/tiny", base_id)
    head, body = card_of(tree)
    assert head == {
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "owner/tiny",
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["lrec", "quantized", *tags, "4-bit", "rtn"],
    }
    row = record.rows(made / ("A" if format == "merged" else "Q"))[0]
    assert f"{row['kl']:.4g} | {row['top1_agreement']:.4g}" in body and load_line in body
    assert ("a LoRA of rank 4" in body) == (format == "merged")


@pytest.mark.parametrize("format", ["merged", "compressed-tensors"])
@torch.no_grad()
def test_the_lines_of_the_card_load_it_without_lrec(made, exported, hub, tmp_path, format):
    if format == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed")
    assert push(exported / format, "me/tiny", *BASE) == 0
    lines = re.search(r"```python\n(.*?)```", card_of(hub.tree("me/tiny")[1])[1], re.DOTALL)[1]
    asked = "import sys, torch\nwith torch.no_grad():\n    logits = model.float()(torch.arange(32)[None]).logits\n"
    script = (
        f"{lines}\n{asked}torch.save(logits, sys.argv[1])\nassert 'lrec' not in sys.modules\nassert len(tokenizer)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "logits")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = str(made / "A") if format == "merged" else None
    expected = load.model(str(made / "Q"), adapter, dtype="float32")(IDS).logits
    assert (torch.load(tmp_path / "logits") - expected).norm() < 2e-2 * expected.norm()


def test_what_is_damaged_or_unmeasured_or_has_no_card_stays(made, exported, hub, tmp_path, capsys):
    copy = shutil.copytree(exported / "gguf", tmp_path / "G")
    (copy / "model.gguf").write_bytes((copy / "model.gguf").read_bytes()[:-1])
    assert push(copy, "me/tiny", *BASE) == 2
    assert "model.gguf has" in capsys.readouterr().err
    copy = shutil.copytree(exported / "gptq", tmp_path / "P")
    checkpoint.write_tensors(copy / "other.safetensors", {"x": torch.ones(1)})
    assert push(copy, "me/tiny", *BASE) == 2
    assert "other.safetensors is not in lrec_export.json" in capsys.readouterr().err
    told = checkpoint.read_json(exported / "merged" / export_record.FILE)
    copy = shutil.copytree(exported / "merged", tmp_path / "M")
    checkpoint.write_json(copy / export_record.FILE, told | {"evaluation": []})
    assert push(copy, "me/tiny", *BASE) == 2
    assert "evaluate what it was exported from by `lrec evaluate --record`" in capsys.readouterr().err
    assert push(exported / "merged", "me/tiny", *BASE, "--max_kl", "0") == 2
    assert push(exported / "merged", "me/tiny") == 2
    assert "which only this machine has" in capsys.readouterr().err
    words = ["--model", str(made / "Q"), "--adapter", str(made / "A"), "--format", "gguf-lora"]
    assert main(["export", *words, "--output_dir", str(tmp_path / "L")]) == 0
    assert push(tmp_path / "L", "me/tiny", *BASE) == 2
    assert "gguf_lora export, which has no card of its own" in capsys.readouterr().err
    assert set(hub.repos) == {"owner/tiny"} and not hub.objects


def test_a_killed_push_of_an_export_leaves_nothing_that_loads_and_goes_on(exported, hub):
    kill_a_push(hub, exported / "gptq", "me/tiny", stall_at=2)
    assert set(hub.tree("me/tiny")[1]) == {".gitattributes"}
    sent = len(hub.objects)
    hub.stall_at, hub.num_puts = None, 0
    assert push(exported / "gptq", "me/tiny", *BASE) == 0
    assert hub.num_puts == len(list((exported / "gptq").glob("*.safetensors"))) - sent
