"""What several tests share: the one table of tolerances, closeness with a useful message, tiny random models, kills."""

import gc
import multiprocessing
import os
import random
import signal
import socket
import time
from functools import partial

import psutil
import torch

# Relative error (Frobenius) of a product against float64 of the same decoded weights, by dtype of x.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def assert_close(actual, expected, tolerance, what="value"):
    """Demands ||actual - expected|| <= tolerance * ||expected||, equal shapes and no NaN; names the worst entry."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} NaN"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs()
    relative = float(error.norm() / expected.double().norm().clamp_min(1e-300))
    worst = int(error.argmax())
    assert relative <= tolerance, (
        f"{what}: relative error {relative:.3g} > {tolerance:.3g}; worst at flat index {worst}: "
        f"{actual.flatten()[worst].item():.6g}, expected {expected.flatten()[worst].item():.6g}"
    )


def tiny_llama(seed=0, **changes):
    """A random Llama of two blocks with 64 hidden units; keywords change its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tiny_model(directory, max_shard_size="50GB", **changes):
    """Saves `tiny_llama(**changes)` with a byte-level tokenizer of its 256 ids into a directory; returns the model."""
    model = tiny_llama(**changes)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer(directory)
    return model


def tiny_tokenizer(directory):
    """Saves a byte-level tokenizer of 256 ids into a directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {letter: i for i, letter in enumerate(letters[:255], 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(directory)


def run_together(job, count=2):
    """Runs job(), which must be picklable, in `count` processes connected as a launcher does it (gloo, on the CPU)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_apart(partial(_member, job, rank, count, port)) for rank in range(count)]
    for child in children:
        child.join()
    codes = [child.exitcode for child in children]
    assert codes == [0] * count, f"the processes ended with exit codes {codes}"


def _member(job, rank, count, port):
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in known.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    job()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# What jobs import, so that they need not wait for it.
PRELOADED = [
    "lrec.correction",
    "lrec.trainer",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.launcher.api",
]


def _apart(job):
    # Forked from a server that imported what jobs need and ran nothing: a fork of a process whose OpenMP threads have
    # worked would hang at its first product.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_without_garbage, args=(job,))
    child.start()
    return child


def _without_garbage(job):
    gc.freeze()  # as in conftest.py
    job()


def run_apart(job):
    """Runs job(), which must be picklable, in a process of its own; returns how many seconds it took."""
    start = time.monotonic()
    child = _apart(job)
    child.join()
    assert child.exitcode == 0, f"the job ended with exit code {child.exitcode}"
    return time.monotonic() - start


MOST_KILLS = 60  # a short job is seldom met at work


def launch(job, count=2):
    """Runs job() in `count` processes that torchrun's agent starts in this one's name; raises what it raises."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting = {"run_id": "tests", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, count, start_method="fork", max_restarts=0, **meeting)
    elastic_launch(config, _launched)(job)


def _launched(job):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's handler, which a process of torchrun has not
    torch.set_num_threads(1)
    job()


def kill_child(child, _):
    """Kills a process."""
    child.kill()


def kill_workers(launcher, chance, finished):
    """Kills one or all of the processes that a launcher has started, or itself if there are none; waits for its end and
    theirs. `finished()` says whether there was nothing left to do."""
    workers = psutil.Process(launcher.pid).children()
    for victim in chance.choice([workers, workers[:1], workers[-1:]]) or [launcher]:
        victim.kill()
    launcher.join(10 if finished() else 60)
    if launcher.is_alive() and finished():
        # Killed after its last word: torch's agent, when it forks, waits for good for such a one to hear of the end.
        for process in (launcher, *filter(psutil.Process.is_running, workers)):
            process.kill()
        launcher.join(60)
    assert not launcher.is_alive(), "a launcher whose worker was killed went on for a minute"
    _, alive = psutil.wait_procs(workers, 10)
    assert not alive, "a worker outlived its launcher"


def kill_at_random(job, seconds, at_work, share=1.0, started=None, kill=kill_child):
    """Runs job() in processes of their own and kills each (SIGKILL, by `kill`) at a random moment within `seconds`.

    With `started`, every other one is first waited for until `started()`, and killed within a third of the time: the
    start of an interpreter takes most of a short job.

    A share of LREC_KILLS times (4 if that is not set), at least once; more, at most `MOST_KILLS` or ten times as many,
    until `at_work()`, called after each kill, has once been true: a test whose kills all come too early or too late
    proves nothing, and fails. Returns the number of kills and how many of them met the job at work.
    """
    moments, met = random.Random(0), 0
    kills = max(1, round(share * int(os.environ.get("LREC_KILLS", "4"))))
    most = max(MOST_KILLS, 10 * kills)
    for count in range(most):
        if count >= kills and met:
            return count, met
        child = _apart(job)
        moment = moments.uniform(0, seconds)
        if started is not None and count % 2 == 0:
            while child.is_alive() and not started():
                time.sleep(0.001)
            moment /= 3
        child.join(moment)
        if child.is_alive():
            kill(child, moments)
        child.join()
        met += bool(at_work())
    assert met, "no kill met the job at work"
    return most, met
