"""Memory is a number: what the pass over blocks, and a merged export, take above the interpreter and its libraries."""

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
FLOAT32, BFLOAT16 = 4, 2

MEASURED = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)

# Run in a process of its own, which forks for each case: a child first does its work on a tiny model, so that every
# library is loaded and the workspaces are made.
MEASURE = """
import json, os, sys, torch
from pathlib import Path
import transformers.models.llama.modeling_llama
from lrec import export, kernels
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec.export.merged import Merged
from lrec.meter import Meter
from lrec.quantizers.gptq import GPTQ
from lrec.quantizers.rtn import RTN
from lrec.stream import StreamedModel

def quantize(name, length, settings, number):
    streamed = StreamedModel(Path(name), torch.float32)
    ids = torch.arange(8 * length).view(8, length) % 256
    Pass(streamed, GPTQ(group_size=32), Calibration(ids), Path(f"{name}-{number}"), PassSettings(**settings)).run()
    kernels.matmul(torch.ones(64, 2048), RTN()(torch.ones(2048, 2048)))  # the kernels' panel, of one size for all

def merge(name, length):
    export.export(Merged(), Path(f"{name}-0"), None, Path(f"{name}-merged"))

def print_peak(work, *more):
    if os.fork() == 0:
        work("tiny", 16, *more)
        meter = Meter(torch.device("cpu"))
        work("model", int(sys.argv[1]), *more)
        print(meter.peak(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0

torch.set_num_threads(1)  # a fork of a process whose OpenMP threads have worked would hang
for number, settings in enumerate(json.loads(sys.argv[2])):
    print_peak(quantize, settings, number)
print_peak(merge)
"""
OTHER_STREAMS = [{"reconstruct_epochs": 1}, {"match_upstream": 0.5}, {"end_loss_hessian": True}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of `SHAPE`, saved in the directory `model` of its `place`."""
    shape = {**SHAPE, "vocab_size": VOCABULARY, "num_hidden_layers": NUM_BLOCKS, "max_position_embeddings": LENGTH}
    model, place = tiny_llama(**shape).bfloat16(), tmp_path_factory.mktemp("memory")
    model.save_pretrained(place / "model")
    tiny_llama().bfloat16().save_pretrained(place / "tiny")
    model.place = place
    return model


@pytest.fixture(scope="module")
def peaks(model):
    """What was taken in bytes by a pass over the model with the settings as they are, by one with each of
    `OTHER_STREAMS`, and by the merged export of the first."""
    words = [sys.executable, "-c", MEASURE, str(LENGTH), json.dumps([{}, *OTHER_STREAMS])]
    done = subprocess.run(words, cwd=model.place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@MEASURED
def test_the_pass_stays_under_two_blocks_the_states_and_the_embeddings(model, peaks):
    block_bytes = FLOAT32 * sum(p.numel() for p in model.model.layers[0].parameters())
    state_bytes = FLOAT32 * NUM_WINDOWS * LENGTH * SHAPE["hidden_size"]
    embedding_bytes = FLOAT32 * 2 * VOCABULARY * SHAPE["hidden_size"]
    peak, allowed = peaks[0], 2 * block_bytes + state_bytes + embedding_bytes
    assert peak <= allowed, f"{peak / 1e6:.0f} MB, allowed are {allowed / 1e6:.0f} MB"
    # The embeddings alone were in memory: a peak below them would mean that the measure is broken.
    assert peak >= embedding_bytes / 2, f"{peak / 1e6:.0f} MB cannot be right"


@pytest.mark.slow
@MEASURED
@pytest.mark.parametrize("case", range(len(OTHER_STREAMS)), ids=[next(iter(each)) for each in OTHER_STREAMS])
def test_other_streams_take_what_was_predicted(model, peaks, case):
    setup = Setup(group_size=32, max_length=LENGTH, **OTHER_STREAMS[case])
    predicted = pass_memory.quantizing(model.config, setup, NUM_WINDOWS * LENGTH).peak_bytes
    assert peaks[1 + case] == pytest.approx(predicted, rel=0.15)


@pytest.mark.slow
@MEASURED
def test_a_merged_export_stays_under_two_blocks_and_the_embeddings(model, peaks):
    embedding_bytes = BFLOAT16 * 2 * VOCABULARY * SHAPE["hidden_size"]
    block_bytes = BFLOAT16 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert block_bytes < peaks[-1] <= 2 * block_bytes + embedding_bytes, f"{peaks[-1] / 1e6:.0f} MB"
