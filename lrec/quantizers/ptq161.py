"""PTQ1.61 (arXiv 2502.13179): salient input channels in 4 bits, the others as signs with learned factors.

`Ptq161` is the part that looks at one layer alone. `refine` is the part that looks at a block: it trains the factors
of all its layers until the block's outputs agree with the full-precision ones; signs, mask and 4-bit codes stay.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrec.formats.salient import SALIENT_BITS, Salient
from lrec.quantizers import Quantizer, setting
from lrec.statistics import Statistics

RUN = 32


@dataclass(frozen=True, kw_only=True)
class Ptq161(Quantizer):
    """Mask by channel maxima; 4-bit asymmetric rows of the salient columns; s sign(w - mu) + mu for the rest.

    s = mean |w - mu| and mu = mean w over the columns of a row that are not salient; r1 = r2 = 1. The number of
    salient columns is the share of K rounded to a multiple of 32, which packs without a gap.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maxima"})

    bits: int = setting(1, "bits of columns that are not salient; this method has one width")
    salient_share: float = setting(0.2, "share of input channels kept in 4 bits, above 0 and below 1")

    def __post_init__(self):
        if self.bits != 1:
            raise ValueError(
                f"ptq161 has 1 bit for most columns and 4 for salient ones, not {self.bits}; leave bits out"
            )
        if not 0 < self.salient_share < 1:
            raise ValueError(f"salient_share = {self.salient_share}; allowed: above 0 and below 1, 0.2 as a rule")

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Salient:
        """The packed weight before any block-wise training."""
        mask_K = salient_mask(statistics.maxima_K, self.salient_share)
        kept_NS, rest_NM = w_NK[:, mask_K], w_NK[:, ~mask_K]
        # Zero lies in the range, so that a zero weight is stored as zero and the zero point fits 4 bits.
        low, high = kept_NS.amin(1).clamp_max(0), kept_NS.amax(1).clamp_min(0)
        top = 2**SALIENT_BITS - 1
        scale = ((high - low) / top).clamp_min(1e-6).half()
        step = scale.to(w_NK.dtype)
        zero = (-low / step).round().clamp(0, top)
        codes_NS = (kept_NS / step[:, None] + zero[:, None]).round().clamp(0, top)
        mu = rest_NM.mean(1, keepdim=True)
        s = (rest_NM - mu).abs().mean(1)
        factors = (s.half(), mu[:, 0].half(), torch.ones_like(rest_NM[0]).half())
        return Salient.pack(mask_K, (codes_NS.byte(), scale, zero.byte()), (rest_NM > mu).byte(), factors)


def salient_mask(maxima_K: Tensor, share: float) -> Tensor:
    """bool (K,): true for the channels of largest maximum, a `share` of K to the nearest multiple of 32, at least 1."""
    K = len(maxima_K)
    count = RUN * round(share * K / RUN)
    if not 0 < count < K:
        count = max(1, int(share * K))
    mask = torch.zeros(K, dtype=torch.bool, device=maxima_K.device)
    mask[maxima_K.topk(count).indices] = True
    return mask


class Latent(nn.Module):
    """A salient weight whose factors s_N, r1_N, r2_M train; signs, mu and the salient columns are fixed.

    `forward()` is (r1 r2^T) o (s sign + mu) in the other columns, differentiable in s, r1 and r2.
    """

    def __init__(self, packed: Salient):
        super().__init__()
        self._origin = packed
        salient, rest = packed.columns()
        self.register_buffer("signs_NM", packed.signs())
        self.register_buffer("salient_NS", packed.salient_weight())
        self.register_buffer("mu_N", packed.offset.float())
        # From the order (rest, salient) in which columns are made to their natural one.
        self.register_buffer("place_K", torch.cat([rest, salient]).argsort())
        self.s_N = nn.Parameter(packed.scale.float().clone())
        self.r1_N = nn.Parameter(torch.ones_like(self.s_N))
        self.r2_M = nn.Parameter(packed.column.float().clone())

    def forward(self) -> Tensor:
        """The weight (N, K) in float32."""
        rest = torch.outer(self.r1_N, self.r2_M) * (self.s_N[:, None] * self.signs_NM + self.mu_N[:, None])
        return torch.cat([rest, self.salient_NS], 1)[:, self.place_K]

    @torch.no_grad()
    def packed(self) -> Salient:
        """The trained weight in storage: r1 is multiplied into scale and offset."""
        factors = (self.r1_N * self.s_N, self.r1_N * self.mu_N, self.r2_M)
        old = self._origin
        new = [value.to(kind.dtype) for value, kind in zip(factors, (old.scale, old.offset, old.column), strict=True)]
        stored = old.tensors() | dict(zip(("scale", "offset", "column"), new, strict=True))
        return Salient(shape=old.shape, num_salient=old.num_salient, **stored)


def two_branch_loss(output: Tensor, clean: Tensor, drifted: Tensor) -> Tensor:
    """MSE(clean, output) + MSE(drifted, output) - log cos(clean, output) - log cos(drifted, output), a scalar.

    `output` is that of the quantized block on the quantized model's hidden states, `drifted` that of the full block
    on the same states, `clean` that of the full block on the full model's. Cosines are along the last dimension,
    their logarithm is averaged over tokens (PTQ1.61, section 3.3).
    """
    loss = output.new_zeros(())
    for target in (clean, drifted):
        cosine = nn.functional.cosine_similarity(target, output, dim=-1)
        loss = loss + nn.functional.mse_loss(output, target) - cosine.clamp_min(1e-6).log().mean()
    return loss


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How `refine` trains: AdamW without weight decay, one batch a step (the paper's values for LLaMA)."""

    epochs: int = setting(20, "passes over the calibration batches")
    scale_lr: float = setting(5e-4, "learning rate of s")
    factor_lr: float = setting(1e-3, "learning rate of r1 and r2")


@torch.enable_grad()
def refine(
    packed: dict[str, Salient],
    weights: dict[str, Tensor],
    run: Callable[[dict[str, Tensor], int, Tensor], Tensor],
    states: Sequence[tuple[Tensor, Tensor]],
    settings: Refinement = Refinement(),
) -> tuple[dict[str, Salient], list[float]]:
    """The same layers with factors trained on a block's outputs, and the mean loss of each epoch.

    `weights` holds the full weights under the names of `packed`; `run(weights, i, state)` is the block's output on the
    hidden states of batch i with these weights in place (`torch.func.functional_call` does it); `states` holds, for
    each batch, those of the full and those of the quantized model. Raises ValueError if the loss is not finite.
    """
    latent = nn.ModuleDict({str(i): Latent(p) for i, p in enumerate(packed.values())})
    scales = [module.s_N for module in latent.values()]
    others = [value for module in latent.values() for value in (module.r1_N, module.r2_M)]
    groups = [{"params": scales, "lr": settings.scale_lr}, {"params": others, "lr": settings.factor_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    with torch.no_grad():
        targets = [(run(weights, i, full), run(weights, i, ours)) for i, (full, ours) in enumerate(states)]
    history = []
    for epoch in range(settings.epochs):
        total = 0.0
        for i, ((_, ours), (clean, drifted)) in enumerate(zip(states, targets, strict=True)):
            now = dict(zip(packed, (module() for module in latent.values()), strict=True))
            loss = two_branch_loss(run(now, i, ours), clean, drifted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        history.append(total / len(states))
        if not math.isfinite(history[-1]):
            raise ValueError(
                f"the loss of epoch {epoch + 1} is {history[-1]}; learning rates must keep it finite: "
                f"lower scale_lr = {settings.scale_lr} and factor_lr = {settings.factor_lr}"
            )
    return dict(zip(packed, (module.packed() for module in latent.values()), strict=True)), history
