"""A full-precision model, its packed one and the corrected one, run on the same text one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrec import anatomy, evaluate, load, text
from lrec.sweep import relative_error

WINDOW_TOKENS = 64  # of text on which the blocks' outputs are compared
PROMPT_TOKENS = 16
NEW_TOKENS = 40


@dataclass(frozen=True)
class Compared:
    """`samples`: a row a prompt, with each model's greedy continuation; `blocks`: a row a block, with the mean over
    tokens of ||out - exact||^2 / ||exact||^2 of its output under each model but the first."""

    samples: list[dict]
    blocks: list[dict]


def compare(models: dict[str, tuple[str, str | None]], dataset: str, count: int, device: str, dtype: str) -> Compared:
    """The models, each by what to call it and (directory, adapter), on `count` passages spaced evenly over a text.

    The first is the one that the others are compared with. One model is in memory at a time.
    """
    tokenizer = load.tokenizer(next(iter(models.values()))[0])
    ids_BL = text.windows(text.documents(dataset), tokenizer, WINDOW_TOKENS, count, seed=None)
    prompts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids_BL[:, :PROMPT_TOKENS]]
    samples: list[dict] = [{"prompt": prompt} for prompt in prompts]
    errors: dict[str, list[float]] = {}
    exact: list[Tensor] = []
    for name, (directory, adapter) in models.items():
        model = load.model(directory, adapter, device, dtype)
        for row, said in zip(samples, evaluate.continuations(model, tokenizer, prompts, NEW_TOKENS), strict=True):
            row[name] = said
        outputs = block_outputs(model, ids_BL)
        if exact:
            errors[name] = [relative_error(out, right) for out, right in zip(outputs, exact, strict=True)]
        else:
            exact = outputs
        del model, outputs
    told = [dict(zip(errors, row, strict=True)) for row in zip(*errors.values(), strict=True)]
    return Compared(samples, [{"block": index, **row} for index, row in enumerate(told)])


@torch.no_grad()
def block_outputs(model: nn.Module, ids_BL: Tensor) -> list[Tensor]:
    """What each block makes of the text, (B, L, H) on the CPU."""
    seen: list[list[Tensor]] = []
    with watched(model, seen):
        for row_L in ids_BL:
            evaluate.final_hidden(model, row_L[None].to(next(model.parameters()).device))
    return [torch.cat(parts) for parts in seen]


@contextmanager
def watched(model: nn.Module, seen: list[list[Tensor]]) -> Iterator[None]:
    """Inside, every block's output goes to the list of `seen` that is made for it."""
    hooks = []
    for block in anatomy.find_blocks(model).modules:
        seen.append([])

        def note(module, args, out, to=seen[-1]):
            to.append((out[0] if isinstance(out, tuple) else out).float().cpu())

        hooks.append(block.register_forward_hook(note))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
