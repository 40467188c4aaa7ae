"""Code that a model or an adapter brings is run only when that is asked for, and pickles not at all."""

import json
import pickle
import shutil

import pytest
from checks import tiny_model

from lrec import foreign, load
from lrec.cli import main

# Says that it was run, and then is a Llama by another name.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A model whose classes are in a file beside its weights; `ran` appears when that is run."""
    monkeypatch.setattr(foreign, "_trusted", False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny_model(tmp_path / "odd")
    (tmp_path / "odd" / "modeling_odd.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    classes = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": classes}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("seven wizards box with a jovial yak. " * 60)
    return tmp_path


VERBS = {
    "quantize": ["--method", "nf4", "--output_dir", "O"],
    "cache": ["--dataset", "text.txt", "--num_samples", "2", "--max_length", "16", "--output_dir", "O"],
    "evaluate": ["--dataset", "text.txt", "--num_samples", "2", "--max_length", "16"],
    "estimate": [],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_with_code_of_its_own_is_refused_and_run_when_trusted(odd, capsys, verb):
    words = [str(odd / word) if word in ("text.txt", "O") else word for word in VERBS[verb]]
    assert main([verb, "--model", str(odd / "odd"), *words]) == 2
    assert "--trust_remote_code" in capsys.readouterr().err and not (odd / "ran").exists()
    assert main([verb, "--model", str(odd / "odd"), *words, "--trust_remote_code"]) == 0
    assert (odd / "ran").exists()


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_not_read(tmp_path, capsys, name):
    tiny_model(tmp_path / "M")
    (tmp_path / "M" / "model.safetensors").unlink()
    (tmp_path / "M" / name).write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    assert (
        main(["quantize", "--model", str(tmp_path / "M"), "--method", "nf4", "--output_dir", str(tmp_path / "O")]) == 2
    )
    assert "safetensors" in capsys.readouterr().err and not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A packed model `Q` and an adapter `A` of it, with its checkpoints."""
    place = tmp_path_factory.mktemp("trained")
    tiny_model(place / "M")
    (place / "text.txt").write_text("seven wizards box with a jovial yak. " * 60)
    assert main(["quantize", "--model", str(place / "M"), "--method", "nf4", "--output_dir", str(place / "Q")]) == 0
    words = ["--teacher", str(place / "M"), "--dataset", str(place / "text.txt"), "--num_samples", "4"]
    words += ["--max_length", "16", "--max_steps", "2", "--save_steps", "1", "--lora_r", "4", "--lora_init", "zero"]
    assert main(["train", "--model", str(place / "Q"), *words, "--output_dir", str(place / "A")]) == 0
    return place


def test_training_writes_no_pickle(trained):
    """Every file of a pickle begins so, in a zip archive (torch) or by itself."""
    files = [path for path in (trained / "A").rglob("*") if path.is_file()]
    assert {"optimizer.safetensors", "generators-0.safetensors"} <= {path.name for path in files}
    assert not [path for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]


@pytest.mark.parametrize(
    "change",
    [{"megatron_config": {"x": 1}, "megatron_core": "evil"}, {"corda_config": {"cache_file": "evil.pt"}}],
)
def test_an_adapter_that_would_import_or_open_something_is_refused(trained, tmp_path, change):
    shutil.copytree(trained / "A", tmp_path / "A")
    config = json.loads((tmp_path / "A" / "adapter_config.json").read_text())
    (tmp_path / "A" / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="which a trained adapter does not need"):
        load.model(str(trained / "Q"), str(tmp_path / "A"))


def test_a_pickled_adapter_is_refused(trained, tmp_path):
    shutil.copytree(trained / "A", tmp_path / "A")
    (tmp_path / "A" / "adapter_model.safetensors").unlink()
    (tmp_path / "A" / "adapter_model.bin").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    with pytest.raises(ValueError, match="never read"):
        load.model(str(trained / "Q"), str(tmp_path / "A"))
    assert not (tmp_path / "ran").exists()
