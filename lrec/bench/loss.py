"""The divergence by chunks beside the same written out in torch with all logits at once: time, and memory above its
inputs. Values and gradients are compared too, so that a fast wrong answer shows."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lrec import load
from lrec.head import Head
from lrec.losses import Objective, Targets, divergence
from lrec.meter import Meter
from lrec.options import setting


@dataclass(frozen=True, kw_only=True)
class Loss:
    """`lrec bench loss`: forward KL and its gradient, by chunks against all logits at once."""

    num_tokens: int = setting(1024, "tokens")
    vocab_size: int = setting(49152, "logits of a token")
    hidden_size: int = setting(576, "width of the hidden states")
    chunk_tokens: int | None = setting(None, "tokens whose logits are made at once (none: 12 MB of them)")
    repeats: int = setting(5, "timed calls of each; medians are reported")
    device: str = setting("auto", "auto (first GPU, else CPU), cpu, cuda")

    def run(self) -> dict:
        """Seconds and peak bytes of both, the ratio of times, and how far apart their results are."""
        device = load.device_of(self.device)
        torch.manual_seed(0)
        shape = (self.num_tokens, self.hidden_size)
        student, teacher = (torch.randn(shape, device=device) for _ in range(2))
        head = Head(torch.randn(self.vocab_size, self.hidden_size, device=device) / self.hidden_size**0.5)
        sides = {
            "chunked": lambda: chunked(student, teacher, head, self.chunk_tokens),
            "unchunked": lambda: unchunked(student, teacher, head),
        }
        seconds, peaks, found = {name: [] for name in sides}, {}, {}
        for turn in range(self.repeats + 1):  # the first one warms up and is measured for memory
            for name, call in sides.items():
                meter = Meter(device) if turn == 0 else None
                start = time.perf_counter()
                found[name] = call()
                seconds[name].append(time.perf_counter() - start)
                if meter:
                    peaks[name] = meter.peak()
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        (loss, grad), (expected, expected_grad) = found["chunked"], found["unchunked"]
        return {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **{f"{name}_s": round(s, 4) for name, s in medians.items()},
            **{f"{name}_extra_peak_bytes": peak for name, peak in peaks.items()},
            "time_over_unchunked": round(medians["chunked"] / medians["unchunked"], 3),
            "loss_apart": abs(loss - expected) / expected,
            "gradient_apart": float((grad - expected_grad).norm() / expected_grad.norm()),
        }


def chunked(student_TH: Tensor, teacher_TH: Tensor, head: Head, chunk_tokens: int | None) -> tuple[float, Tensor]:
    """The summed forward KL and its gradient, by `lrec.losses`."""
    hidden_TH = student_TH.detach().requires_grad_()
    labels_T = torch.zeros(len(hidden_TH), dtype=torch.long, device=hidden_TH.device)
    objective = Objective(chunk_tokens=chunk_tokens)
    loss = divergence(hidden_TH, head, Targets(teacher_TH, head), labels_T, objective).loss
    return loss.item(), torch.autograd.grad(loss, hidden_TH)[0]


def unchunked(student_TH: Tensor, teacher_TH: Tensor, head: Head) -> tuple[float, Tensor]:
    """The same as torch has it: all logits, log softmax, kl_div, autograd."""
    hidden_TH = student_TH.detach().requires_grad_()
    with torch.no_grad():
        log_p = (teacher_TH @ head.weight.t()).log_softmax(-1)
    log_q = (hidden_TH @ head.weight.t()).log_softmax(-1)
    loss = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return loss.item(), torch.autograd.grad(loss, hidden_TH)[0]
