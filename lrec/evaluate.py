"""How good a model is on text it has not seen: perplexity, KL(teacher || model), top-1 agreement; and its size."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrec.head import Head
from lrec.losses import token_metrics
from lrec.nn import PackedLinear
from lrec.teacher import final_hidden


@dataclass(frozen=True)
class Reference:
    """What the teacher says of a text: its final hidden states, a tensor (T, H) per batch, and the head on them."""

    hidden: list[Tensor]
    head: Head


@torch.no_grad()
def reference(teacher: nn.Module, input_ids: Tensor, batch_size: int = 4) -> Reference:
    """The teacher's side of `quality`, to be used for several models on the same windows and batch size."""
    batches = tqdm(input_ids.split(batch_size), desc="teacher", unit="batch", disable=None, leave=False)
    return Reference([predicting(teacher, batch) for batch in batches], Head.of(teacher))


@torch.no_grad()
def quality(model: nn.Module, input_ids: Tensor, teacher: Reference | None = None, batch_size: int = 4) -> dict:
    """Means over all next-token predictions inside the windows `input_ids` (B, L).

    perplexity = exp(mean nll); kl = KL(teacher || model) in nats per token and top1_agreement in [0, 1], left out
    without a teacher. Raises ValueError if the model's output is not finite.
    """
    head = Head.of(model)
    sums = torch.zeros(3, dtype=torch.float64)
    batches = tqdm(input_ids.split(batch_size), desc="evaluate", unit="batch", disable=None, leave=False)
    for i, batch in enumerate(batches):
        hidden = predicting(model, batch)
        target = (None, None) if teacher is None else (teacher.hidden[i], teacher.head)
        metrics = token_metrics(hidden, head, *target, batch[:, 1:].flatten().to(hidden.device))
        for k, metric in enumerate(metrics):
            sums[k] += 0.0 if metric is None else metric.double().sum().cpu()
    num_tokens = input_ids[:, 1:].numel()
    nll, kl, agreement = (sums / num_tokens).tolist()
    if not math.isfinite(nll):
        raise ValueError(
            "the model's output is not finite on the evaluation text; "
            "the checkpoint holds NaN, or overflows in this dtype: try --dtype float32"
        )
    found = {"perplexity": math.exp(min(nll, 700.0)), "num_tokens": num_tokens}
    return found if teacher is None else found | {"kl": kl, "top1_agreement": agreement}


def predicting(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Final hidden states (T, H) of the positions that have a next token in the window."""
    device = next(model.parameters()).device
    return final_hidden(model, input_ids.to(device))[:, :-1].flatten(0, 1)


def bits_per_weight(model: nn.Module) -> float | None:
    """Stored bits of the packed layers and of the adapter on them, per weight; None if no layer is packed."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    weights = sum(m.in_features * m.out_features for m in packed)
    adapter = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)
    return 8 * (sum(m.packed.nbytes for m in packed) + adapter) / weights if weights else None


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
