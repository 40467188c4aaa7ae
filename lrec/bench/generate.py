"""Tokens a second of `generate` on a packed model beside the full-precision one, in one run.

Both continue the same random prompt greedily by the same number of tokens, in turns, so that whatever else the machine
does hits both. The prompt's own forward pass counts too, as it does for who waits.
"""

import os
import statistics
import time
from dataclasses import dataclass, field

import torch

from lrec import kernels, load
from lrec.options import setting


@dataclass(frozen=True, kw_only=True)
class Generate:
    """`lrec bench generate`: tokens per second of decoding, packed against dense."""

    model: str = field(metadata={"help": "packed model"})
    teacher: str = field(metadata={"help": "the full-precision model it was made from"})
    prompt_length: int = setting(16, "tokens in the prompt")
    max_new_tokens: int = setting(64, "tokens that follow")
    repeats: int = setting(5, "timed continuations a side, after a short one that is not")
    activation_bits: int | None = setting(None, "8: activations are rounded, as by LREC_ACTIVATION_BITS=8")
    device: str = setting("auto", "auto (first GPU, else CPU), cpu, cuda")
    dtype: str = setting("auto", "auto (float32 on a CPU, else bfloat16), float32, bfloat16")

    def run(self) -> dict:
        """Tokens per second of both sides, medians, and packed over dense."""
        kernels.round_activations(self.activation_bits)
        sides = {"packed": load.model(self.model, None, self.device, self.dtype)}
        sides["dense"] = load.model(self.teacher, None, self.device, self.dtype)
        vocabulary = min(side.config.vocab_size for side in sides.values())
        ids = torch.randint(vocabulary, (1, self.prompt_length), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(self.repeats + 1):
            for name, side in sides.items():
                spent = continue_text(side, ids.to(side.device), self.max_new_tokens if repeat else 2)
                seconds[name].append(spent)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        return {
            "prompt_length": self.prompt_length,
            "max_new_tokens": self.max_new_tokens,
            "activation_bits": self.activation_bits,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            **{f"{name}_tokens_per_s": round(self.max_new_tokens / s, 2) for name, s in medians.items()},
            "packed_over_dense": round(medians["dense"] / medians["packed"], 3),
        }


def continue_text(model, ids: torch.Tensor, num_tokens: int) -> float:
    """Seconds to continue `ids` greedily by exactly so many tokens; on a CPU with one thread, of that thread's time."""
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    start = clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start
