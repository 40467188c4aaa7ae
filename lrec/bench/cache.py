"""Capturing a teacher's hidden states, streamed, beside the same teacher run live over the same text.

Each side runs in a fresh process, so that its peak is its own, above the interpreter and libraries. Speed is taken from
wall time, and from the process's CPU time, which others on the machine disturb less.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch

from lrec import load, text
from lrec.capture import Capture, CaptureSettings
from lrec.meter import Meter
from lrec.options import setting
from lrec.teacher import final_hidden


@dataclass(frozen=True, kw_only=True)
class CacheBench:
    """`lrec bench cache`: memory and speed of `lrec cache --what hidden` against the live model."""

    model: str = field(metadata={"help": "teacher: local directory, Hub id, or a data/ script (smollm2)"})
    dataset: str = field(metadata={"help": "text, as for the other verbs"})
    num_samples: int = setting(32, "windows")
    max_length: int = setting(512, "tokens in a window")
    batch_size: int = setting(2, "windows in a forward pass, on both sides")
    sweep_tokens: int = setting(CaptureSettings.sweep_tokens, "tokens that pass the streamed teacher at once")
    device: str = setting("auto", "auto (first GPU, else CPU), cpu, cuda")
    dtype: str = setting("auto", "auto (float32 on a CPU, else bfloat16), float32, bfloat16")

    def run(self) -> dict:
        """Peak bytes and tokens per second of both sides, and streamed over live."""
        found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "load_average": os.getloadavg()[0]}
        for name, side in (("live", live), ("streamed", streamed)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found |= {f"{name}_{key}": value for key, value in process.submit(side, self).result().items()}
        peaks = (found["streamed_peak_bytes"], found["live_peak_bytes"])
        return found | {
            "peak_ratio": None if None in peaks else round(peaks[0] / peaks[1], 3),
            "speed_ratio": round(found["streamed_tokens_per_s"] / found["live_tokens_per_s"], 3),
            "cpu_speed_ratio": round(found["live_cpu_s"] / found["streamed_cpu_s"], 3),
        }


def live(bench: CacheBench) -> dict:
    """The model in memory; the time is that of its forward passes alone, without loading."""
    ids, meter = prepared(bench)
    model = load.model(bench.model, None, bench.device, bench.dtype)
    clock = Clock()
    for batch in ids.split(bench.batch_size):
        with torch.no_grad():
            final_hidden(model, batch.to(model.device)).to("cpu", torch.bfloat16)
    return clock.told(ids.numel()) | {"peak_bytes": meter.peak()}


def streamed(bench: CacheBench) -> dict:
    """The capture; the time has everything in it, reading weights and writing shards too."""
    ids, meter = prepared(bench)
    settings = CaptureSettings(batch_size=bench.batch_size, sweep_tokens=bench.sweep_tokens)
    with tempfile.TemporaryDirectory() as directory:
        job = Capture.of(bench.model, ids, directory, settings, bench.device, bench.dtype)
        clock = Clock()
        job.run()
    return clock.told(ids.numel()) | {"peak_bytes": meter.peak()}


def prepared(bench: CacheBench):
    """The windows, and a meter that starts when they and the libraries are in memory."""
    import accelerate  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401

    load.quiet()
    tokenizer = load.tokenizer(bench.model)
    ids = text.windows(text.documents(bench.dataset), tokenizer, bench.max_length, bench.num_samples)
    return ids, Meter(load.device_of(bench.device))


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def told(self, num_tokens: int) -> dict:
        """Tokens per second of wall time, and the CPU seconds."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"tokens_per_s": round(num_tokens / wall, 1), "cpu_s": round(cpu, 2)}
