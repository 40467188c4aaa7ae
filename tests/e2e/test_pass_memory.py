"""Memory is a number: what the pass over blocks takes above the interpreter and its libraries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checks import tiny_llama

from lrec import pass_memory
from lrec.memory import Setup

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
# The vocabulary is to the hidden size as Llama-7B's.
VOCABULARY, NUM_BLOCKS, NUM_WINDOWS, LENGTH = 8000, 2, 8, 256
FLOAT32 = 4

MEASURED = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)

# Run in a process of its own, after a pass over a tiny model has loaded every library and made its workspaces.
MEASURE = """
import json, sys, torch
from pathlib import Path
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec import kernels
from lrec.meter import Meter
from lrec.quantizers.gptq import GPTQ
from lrec.quantizers.rtn import RTN
from lrec.stream import StreamedModel

def run(name, length):
    streamed = StreamedModel(Path(name), torch.float32)
    ids = torch.arange(8 * length).view(8, length) % 256
    passing = PassSettings(**json.loads(sys.argv[2]))
    Pass(streamed, GPTQ(group_size=32), Calibration(ids), Path(name + "-packed"), passing).run()

run("tiny", 16)
kernels.matmul(torch.ones(64, 2048), RTN()(torch.ones(2048, 2048)))  # the kernels' panel, of one size for all models
meter = Meter(torch.device("cpu"))
run("model", int(sys.argv[1]))
print(meter.peak())
"""


def peak_bytes(place, **settings):
    """What a pass with these settings over the model in `place` took, measured by a process of its own."""
    tiny_llama().bfloat16().save_pretrained(place / "tiny")
    words = [sys.executable, "-c", MEASURE, str(LENGTH), json.dumps(settings)]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def save_model(place):
    """A model of `SHAPE` in `place`, which is returned."""
    shape = {**SHAPE, "vocab_size": VOCABULARY, "num_hidden_layers": NUM_BLOCKS, "max_position_embeddings": LENGTH}
    model = tiny_llama(**shape).bfloat16()
    model.save_pretrained(place / "model")
    return model


@pytest.mark.slow
@MEASURED
def test_the_pass_stays_under_two_blocks_the_states_and_the_embeddings(tmp_path):
    model = save_model(tmp_path)
    block_bytes = FLOAT32 * sum(p.numel() for p in model.model.layers[0].parameters())
    state_bytes = FLOAT32 * NUM_WINDOWS * LENGTH * SHAPE["hidden_size"]
    embedding_bytes = FLOAT32 * 2 * VOCABULARY * SHAPE["hidden_size"]
    del model
    peak, allowed = peak_bytes(tmp_path), 2 * block_bytes + state_bytes + embedding_bytes
    assert peak <= allowed, f"{peak / 1e6:.0f} MB, allowed are {allowed / 1e6:.0f} MB"
    # The embeddings alone were in memory: a peak below them would mean that the measure is broken.
    assert peak >= embedding_bytes / 2, f"{peak / 1e6:.0f} MB cannot be right"


@pytest.mark.slow
@MEASURED
@pytest.mark.parametrize("settings", [{"reconstruct_epochs": 1}, {"match_upstream": 0.5}, {"end_loss_hessian": True}])
def test_other_streams_take_what_was_predicted(tmp_path, settings):
    config = save_model(tmp_path).config
    setup = Setup(group_size=32, max_length=LENGTH, **settings)
    predicted = pass_memory.quantizing(config, setup, NUM_WINDOWS * LENGTH).peak_bytes
    assert peak_bytes(tmp_path, **settings) == pytest.approx(predicted, rel=0.15)
