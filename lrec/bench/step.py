"""A LoRA training step on a packed model beside the same step of peft on the full-precision one, in one run.

Both sides train adapters of equal rank on all linears with cross-entropy on the same tokens, by the same optimizer and
loop; steps alternate, so that whatever else the machine does hits both. Reported are medians and their ratio.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch

from lrec import load
from lrec.options import setting


@dataclass(frozen=True, kw_only=True)
class Step:
    """`lrec bench step`: tokens per second of a training step, packed against dense."""

    model: str = field(metadata={"help": "packed model"})
    teacher: str = field(metadata={"help": "the full-precision model it was made from"})
    batch_size: int = setting(4, "windows in a step")
    max_length: int = setting(256, "tokens in a window")
    lora_r: int = setting(16, "rank of the adapters")
    num_steps: int = setting(5, "timed steps a side, after one that is not")
    device: str = setting("auto", "auto (first GPU, else CPU), cpu, cuda")
    dtype: str = setting("auto", "auto (float32 on a CPU, else bfloat16), float32, bfloat16")

    def run(self) -> dict:
        """Seconds a step and tokens per second of both sides, and packed over dense."""
        sides = {"packed": self.trainer(self.model), "dense": self.trainer(self.teacher)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(self.num_steps + 1):
            for name, step in sides.items():
                seconds[name].append(step())
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        tokens = self.batch_size * self.max_length
        return {
            "tokens": tokens,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **{f"{name}_step_s": round(s, 4) for name, s in medians.items()},
            **{f"{name}_tokens_per_s": round(tokens / s, 1) for name, s in medians.items()},
            "packed_over_dense": round(medians["dense"] / medians["packed"], 3),
        }

    def trainer(self, name: str):
        """A function that makes one optimizer step on the model of that name and returns its seconds."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = load.model(name, None, self.device, self.dtype).requires_grad_(False)
        config = LoraConfig(r=self.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        device = next(model.parameters()).device
        ids = torch.randint(0, base.config.vocab_size, (self.batch_size, self.max_length), device=device)

        def step() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return step
