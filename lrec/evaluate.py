"""How good a model is on text it has not seen: perplexity, KL(teacher || model), top-1 agreement; and its size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from lrec import anatomy
from lrec.head import Head
from lrec.losses import IGNORE, shift_labels, token_metrics
from lrec.nn import PackedLinear
from lrec.progress import Progress
from lrec.teacher import final_hidden


@dataclass(frozen=True)
class States:
    """What a model makes of a text: its final hidden states, (T, H) for each batch of windows, and the head on them.

    `hidden` is made as it is read, one batch at a time; `kept` holds on to it, to be compared with several models.
    """

    hidden: Iterable[Tensor]
    head: Head

    def kept(self) -> "States":
        """The same with all batches in memory."""
        return States(list(self.hidden), self.head)


def states(model: nn.Module, input_ids: Tensor, batch_size: int = 4, desc: str = "evaluate") -> States:
    """The hidden states at all positions that have a next token in their window, `input_ids` (B, L)."""

    def run():
        device = next(model.parameters()).device
        for batch in Progress(input_ids.split(batch_size), desc, "batch", leave=False):
            with torch.no_grad():
                hidden = final_hidden(model, batch.to(device))
            # Outside of no_grad, which would otherwise stay on in the caller between two batches.
            yield hidden[:, :-1].flatten(0, 1)

    return States(run(), Head.of(model))


@torch.no_grad()
def quality(student: States, input_ids: Tensor, teacher: States | None = None, batch_size: int = 4) -> dict:
    """Means over all next-token predictions inside the windows `input_ids` (B, L) that the states were made of.

    perplexity = exp(mean nll); kl = KL(teacher || student) in nats per token and top1_agreement in [0, 1], left out
    without a teacher. Raises ValueError if the student's output is not finite.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    teacher_head, targets = (None, repeat(None)) if teacher is None else (teacher.head, teacher.hidden)
    for hidden, target, batch in zip(student.hidden, targets, input_ids.split(batch_size), strict=False):
        labels = batch[:, 1:].flatten().to(hidden.device)
        metrics = token_metrics(hidden, student.head, target, teacher_head, labels)
        sums += torch.stack([torch.zeros(()) if m is None else m.double().sum().cpu() for m in metrics])
    num_tokens = input_ids[:, 1:].numel()
    nll, kl, agreement = (sums / num_tokens).tolist()
    check_finite(nll, kl)
    found = {"perplexity": math.exp(min(nll, 700.0)), "num_tokens": num_tokens}
    return found if teacher is None else found | {"kl": kl, "top1_agreement": agreement}


def check_finite(nll: float, kl: float) -> None:
    """Raises ValueError that says whose output is not finite, if one is not."""
    wrong = "the model's" if not math.isfinite(nll) else "the teacher's" if not math.isfinite(kl) else None
    if wrong:
        raise ValueError(
            f"{wrong} output is not finite on the evaluation text; "
            "the checkpoint holds NaN, or overflows in this dtype: try --dtype float32"
        )


@torch.no_grad()
def rows_quality(
    model: nn.Module, ids: list[list[int]], labels: list[list[int]], teacher: nn.Module | None = None
) -> dict:
    """Means over the learned tokens of rows (`lrec.conversations`), each run by itself: `loss` is that of -log q.

    With a teacher also kl and top1_agreement, as `quality`. Raises ValueError if there is no such token, or an output
    that is not finite.
    """
    sums, num_tokens = torch.zeros(3, dtype=torch.float64), 0
    device = next(model.parameters()).device
    for row, row_labels in Progress(list(zip(ids, labels, strict=True)), "evaluate", "row", leave=False):
        row_BL, next_T = torch.tensor([row], device=device), shift_labels(torch.tensor([row_labels], device=device))
        target = None if teacher is None else final_hidden(teacher, row_BL)[0]
        head = None if teacher is None else Head.of(teacher)
        metrics = token_metrics(final_hidden(model, row_BL)[0], Head.of(model), target, head, next_T)
        sums += torch.stack([torch.zeros(()) if m is None else m.double().sum().cpu() for m in metrics])
        num_tokens += int((next_T != IGNORE).sum())
    if not num_tokens:
        raise ValueError(
            "no token of the rows is to be predicted: they are empty, or cut off before any completion; raise "
            "max_length or look at the rows"
        )
    loss, kl, agreement = (sums / num_tokens).tolist()
    check_finite(loss, kl)
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_tokens": num_tokens}
    return found if teacher is None else found | {"kl": kl, "top1_agreement": agreement}


def bits_per_weight(model: nn.Module, adapter_bytes: int = 0) -> float | None:
    """Stored bits of the blocks' packed layers and of an adapter on them, per weight; None if no layer is packed."""
    packed = [m for name, m in model.named_modules() if isinstance(m, PackedLinear) and anatomy.in_block(name)]
    weights = sum(m.in_features * m.out_features for m in packed)
    return 8 * (sum(m.packed.nbytes for m in packed) + adapter_bytes) / weights if weights else None


@torch.no_grad()
def continuations(model: nn.Module, tokenizer, prompts: list[str], max_new_tokens: int = 32) -> list[str]:
    """Greedy continuations of each prompt, the prompt itself left out."""
    device = next(model.parameters()).device
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
