"""Reconstruction of a block: the floats and codes of all its packed layers, trained on what the block puts out.

A quantizer saw each layer alone. Here they are trained together (Block-AP of EfficientQAT, 2407.11062), block after
block, until the block makes of the quantized model's hidden states what the full-precision block makes of its own.
One block is in memory, and the two streams of hidden states. Codes move by the floats behind them
(`lrec.formats.latent`): a code changes once its float has gone half the way to the next one, which takes many steps
that agree, so that noise changes few. Integer zero points stay, since trained ones would take 16 bits.

With few tokens codes fit the text and not the model: on 8 blocks of SmolLM2-135M (2 bits, groups of 64, 4096 tokens, 4
epochs, 2026-11) held-out KL went from 0.849 to 0.658 with scales and zeros, and to 0.671 with a reach of 0.96 besides,
although the fifth block's error on the text itself was less than half. So codes stay unless they are given reach.

Plain squared error fails at 2 bits: it is blind to what the head reads of a state, and one massive activation
outweighs all the text. So the error of a token counts by how much the full model's output depends on the block's
output there (`lrec.end_loss`), or, where that is not known, by one over its size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrec import trained
from lrec.descent import descend
from lrec.formats import Packed
from lrec.nn import replace
from lrec.options import setting
from lrec.stream import BlockCall


@dataclass(frozen=True)
class Stream:
    """What enters a block and what should leave it, by batches of windows: `states` (B, L, H) of the quantized model
    before it, `targets` (B, L, H) of the full one behind it, the tokens' `weights` (B, L) if they are known; `call`
    runs the block."""

    states: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor] | None
    call: BlockCall

    def error(self, block: nn.Module, i: int) -> Tensor:
        """The mean over the tokens of batch i of their weighted squared error, a scalar."""
        target_BLH = self.targets[i].float()
        error_BL = (self.call(block, self.states[i]).float() - target_BLH).square().mean(-1)
        if self.weights is None:
            size_BL = target_BLH.square().mean(-1)
            return (error_BL / size_BL.clamp_min(torch.finfo(torch.float32).tiny)).mean()
        return (error_BL * self.weights[i].to(error_BL)).mean()


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """How blocks are reconstructed, and whether."""

    reconstruct_epochs: int = setting(
        0, "passes over the text that train each block's scales, zeros (and codes) on its output (0: none)"
    )
    reconstruct_lr: float = setting(2e-3, "peak rate of scales and zeros in these passes, as a share of their size")
    reconstruct_reach: float = setting(
        0.0, "how far, in codes, the float behind a code can move in all these steps together (0: codes stay)"
    )

    def __post_init__(self):
        for name in ("reconstruct_epochs", "reconstruct_lr", "reconstruct_reach"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; allowed: 0 or more")

    @torch.enable_grad()
    def reconstruct(
        self, block: nn.Module, name: str, packed: dict[str, Packed], stream: Stream
    ) -> tuple[dict[str, Packed], dict]:
        """The block's layers, trained from `packed` on, by name in the block; and what reports say of each:
        `reconstruct_loss`, the mean of `Stream.error` in each epoch. `block` holds packed layers afterwards.

        Adam, a batch of windows a step, rates falling along a cosine to zero. Raises ValueError, naming the block, if
        the error is not finite.
        """
        layers = {linear: replace(block, linear, weight) for linear, weight in packed.items()}
        block.requires_grad_(False)
        for layer in layers.values():
            layer.train_fields(self.fields(layer.packed))
        steps = self.reconstruct_epochs * len(stream.states)
        groups = trained.parameter_groups(block, self.reconstruct_lr, self.reconstruct_reach, steps)
        history = descend(
            torch.optim.Adam(groups),
            self.reconstruct_epochs,
            len(stream.states),
            lambda i: stream.error(block, i),
            lambda epoch, error: (
                f"{name}: the error of epoch {epoch} is {error}; lower reconstruct_lr = {self.reconstruct_lr}"
            ),
        )
        found = {
            linear: layer.packed.narrowed(layer.trained, packed[linear].spec(), None)
            for linear, layer in layers.items()
        }
        return found, {"reconstruct_loss": history}

    def fields(self, packed: Packed) -> tuple[str, ...]:
        """What of a layer is trained: its floats, and codes if they have any reach."""
        kinds = ["scales", "zeros", *(["codes"] if self.reconstruct_reach else [])]
        integers = packed.tensors().get("zero") is not None and packed.zero.dtype == torch.int32
        return tuple(name for name in packed.trainable(kinds) if not (integers and name == "zero"))
