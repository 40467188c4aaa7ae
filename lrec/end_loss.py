"""How much each token's input of a linear matters to what the model says in the end (GuidedQuant, 2505.07004).

Let y = W x be a linear's output for a token and l the cross-entropy of all predictions of its window. To second order
an error dy costs E (dl/dy . dy)^2 / 2 of KL to the full-precision model, if the labels are drawn from the model's own
predictions: then E (dl/dy)(dl/dy)^T is the Hessian of that KL. With the mean over output channels of (dl/dy)^2 in the
place of each channel's own, that is the layer's error in the norm of H = mean_t a_t x_t x_t^T, a_t being that mean.

Gradients pass the teacher as hidden states do, one block in memory: a sweep of windows goes forward, leaving its
hidden states before every block, and back, each block being run again from them. So a sweep takes
(number of blocks) * 4096 tokens * (hidden size) values, and every block's weights are read twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrec import anatomy, processes
from lrec.forward import reach_head
from lrec.head import Head
from lrec.progress import Progress
from lrec.stream import BlockCall, StreamedModel, advance

SWEEP_TOKENS = 4096
CHUNK_TOKENS = 256  # whose logits are made at once
OUTPUT = ""  # the block itself among its linears


def token_weights(
    streamed: StreamedModel, input_ids_nL: Tensor, own: slice = slice(None), seed: int = 0
) -> list[dict[str, Tensor]]:
    """For each block, by its linears' names and `OUTPUT`: (n', L), the mean over output channels of (dl/dy)^2 for the
    windows `own`.

    Labels are drawn with a generator of this seed. Embeddings and head must be in memory, and stay there. Other
    processes do the other windows; a linear is named in all of them, or in none.
    """
    n, L = input_ids_nL.shape
    # For all windows, so that each has its own whoever does it.
    uniform_nl = torch.rand(n, L - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[own]
    size, found = max(1, SWEEP_TOKENS // L), []
    sweeps = list(zip(input_ids_nL[own].split(size), uniform_nl.split(size), strict=True))
    calls, head = streamed.block_calls(input_ids_nL[:1]), Head.of(streamed.model)
    for ids_wL, uniform_wl in Progress(sweeps, "end-loss gradients", "sweep"):
        states = [streamed.embed(ids) for ids in ids_wL.split(1)]
        before = []
        for index, call in enumerate(Progress(calls, "forward", "block", inner=True)):
            before.append([*states])
            advance(streamed.load(index), streamed.anatomy.name(index), states, call)
            streamed.free(index)
        grads = [_at_last_block(streamed, head, *each) for each in zip(states, uniform_wl, strict=True)]
        swept = [
            _back(streamed, index, before.pop(), grads, calls[index])
            for index in Progress(range(len(calls))[::-1], "backward", "block", inner=True)
        ]
        found.append(swept[::-1])
    named = processes.everyones([[set(block) for block in swept] for swept in found])
    common = [set.intersection(*(swept[i] for theirs in named for swept in theirs)) for i in range(len(calls))]
    return [{name: torch.cat([part[i][name] for part in found]) for name in common[i]} for i in range(len(calls))]


def of_groups(
    weights: dict[str, Tensor], block: nn.Module, groups: list[list[str]], batch_size: int
) -> list[list[Tensor] | None]:
    """What tokens weigh for the linears of a group, (batch_size * L,) for each batch of windows, 1 in the mean over all
    processes.

    All output channels of a group count alike. None for a group of which `weights` do not know every linear, or that
    no gradient reaches: its tokens all weigh the same.
    """
    linears, found = anatomy.linears(block), []
    for group in groups:
        if not all(name in weights for name in group):
            found.append(None)
            continue
        total_nL = sum(linears[name].out_features * weights[name] for name in group)
        sums = processes.everyones((float(total_nL.double().sum()), total_nL.numel()))
        mean = sum(weight for weight, _ in sums) / sum(tokens for _, tokens in sums)
        found.append([part.flatten() for part in (total_nL / mean).split(batch_size)] if mean > 0 else None)
    return found


def of_output(weights: dict[str, Tensor], batch_size: int) -> list[Tensor] | None:
    """What the error of a block's output counts for each token, (batch_size, L) for each batch of windows, 1 in the
    mean. None if the block's `weights` are not known, or if no gradient reaches it."""
    found_nL = weights.get(OUTPUT)
    if found_nL is None or not found_nL.any():
        return None
    return list((found_nL / found_nL.mean()).split(batch_size))


def _at_last_block(streamed: StreamedModel, head: Head, hidden_1LH: Tensor, uniform_l: Tensor) -> Tensor:
    """dl/dh for the last block's output h, labels being drawn by `uniform_l` (L - 1,); the last position predicts
    nothing that is known."""
    with torch.enable_grad():
        hidden_1LH = hidden_1LH.detach().requires_grad_()
        seen_1LH = reach_head(streamed, hidden_1LH)
    grad_LH = torch.zeros_like(seen_1LH[0])
    for start in range(0, len(grad_LH) - 1, CHUNK_TOKENS):
        part = slice(start, min(start + CHUNK_TOKENS, len(grad_LH) - 1))
        logits_nV = head.logits(seen_1LH[0, part].detach())
        slope = head.slope(logits_nV)
        p_nV = logits_nV.softmax(-1)
        # By the inverse of the distribution, so that any device draws the same.
        uniform_n1 = uniform_l[part, None].to(p_nV)
        label_n1 = torch.searchsorted(p_nV.cumsum(-1), uniform_n1).clamp_max_(p_nV.shape[1] - 1)
        grad_nV = p_nV.scatter_add_(1, label_n1, -torch.ones_like(uniform_n1)).mul_(slope)
        grad_LH[part] = head.backward(grad_nV).to(grad_LH)
    return torch.autograd.grad(seen_1LH, hidden_1LH, grad_LH[None])[0]


def _back(
    streamed: StreamedModel, index: int, before: list[Tensor], grads: list[Tensor], call: BlockCall
) -> dict[str, Tensor]:
    """The token weights of a block's linears over a sweep; `grads`, of the block's outputs, become its inputs'."""
    block = streamed.load(index).requires_grad_(False)
    linears = anatomy.linears(block)
    power: dict[str, list[Tensor]] = {name: [] for name in linears}
    power[OUTPUT] = [grad_1LH.float().square().mean(-1).cpu() for grad_1LH in grads]
    hooks = [linear.register_forward_hook(_watch(power[name])) for name, linear in linears.items()]
    for i, hidden_1LH in enumerate(before):
        with torch.enable_grad():
            entering_1LH = hidden_1LH.detach().requires_grad_()
            leaving_1LH = call(block, entering_1LH)
        (grads[i],) = torch.autograd.grad(leaving_1LH, entering_1LH, grads[i].to(leaving_1LH))
    for hook in hooks:
        hook.remove()
    streamed.free(index)
    length = before[0].shape[1]
    # A linear that sees some tokens alone, as an expert does, has no weight for the others.
    whole = {name: parts for name, parts in power.items() if [p.numel() for p in parts] == [length] * len(before)}
    return {name: torch.stack([p.flatten() for p in parts]) for name, parts in whole.items()}


def _watch(power: list[Tensor]) -> Callable:
    def hook(module: nn.Module, args: tuple, out_1LN: Tensor) -> None:
        if out_1LN.requires_grad:
            out_1LN.register_hook(lambda grad_1LN: power.append(grad_1LN.float().square().mean(-1).cpu()))

    return hook
