"""PTQ1.61 (arXiv 2502.13179): salient input channels in 4 bits, the others as signs with learned factors.

`quantize` looks at one layer alone. `refine` looks at a block: it trains the factors of all its layers until the
block's outputs agree with the full-precision ones; signs, mask and 4-bit codes stay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrec.descent import descend
from lrec.formats.salient import SALIENT_BITS, Salient
from lrec.quantizers import BlockView, Quantizer, setting
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
    refine_epochs: int = setting(4, "passes over the text that train each block's factors (0: layer by layer only)")
    scale_lr: float = setting(2e-3, "peak learning rate of s in these passes")
    factor_lr: float = setting(1e-2, "peak learning rate of r1 and r2 in these passes")
    relative_error: bool = setting(True, "their loss is relative to each token's size; false: the paper's")

    def __post_init__(self):
        if self.bits != 1:
            raise ValueError(
                f"ptq161 has 1 bit for most columns and 4 for salient ones, not {self.bits}; leave bits out"
            )
        if not 0 < self.salient_share < 1:
            raise ValueError(f"salient_share = {self.salient_share}; allowed: above 0 and below 1, 0.2 as a rule")
        if self.refine_epochs < 0:
            raise ValueError(f"refine_epochs = {self.refine_epochs}; allowed: 0 (no block-wise training) or more")

    @property
    def refines(self) -> bool:
        """See `Quantizer.refines`."""
        return self.refine_epochs > 0

    def refine(self, packed: dict[str, Salient], view: BlockView) -> tuple[dict[str, Salient], list[float]]:
        """See `Quantizer.refine`."""
        return refine(packed, view, self)

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
        # Over all K columns, zero where they have nothing to say: no column need be moved in any step.
        fixed_NK, signs_NK = (torch.zeros(packed.shape, device=rest.device) for _ in range(2))
        fixed_NK[:, salient], signs_NK[:, rest] = packed.salient_weight(), packed.signs()
        self.register_buffer("fixed_NK", fixed_NK)
        self.register_buffer("signs_NK", signs_NK)
        self.register_buffer("mu_N", packed.offset.float())
        self.register_buffer("rest_M", rest)
        self.s_N = nn.Parameter(packed.scale.float().clone())
        self.r1_N = nn.Parameter(torch.ones_like(self.s_N))
        self.r2_M = nn.Parameter(packed.column.float().clone())

    def forward(self) -> Tensor:
        """The weight (N, K) in float32."""
        r2_1K = self.r2_M.new_zeros(self.fixed_NK.shape[1]).index_copy(0, self.rest_M, self.r2_M)[None]
        offset_NK = torch.addmm(self.fixed_NK, (self.r1_N * self.mu_N)[:, None], r2_1K)
        return torch.addcmul(offset_NK, (self.r1_N * self.s_N)[:, None] @ r2_1K, self.signs_NK)

    @torch.no_grad()
    def packed(self) -> Salient:
        """The trained weight in storage: r1 is multiplied into scale and offset."""
        factors = (self.r1_N * self.s_N, self.r1_N * self.mu_N, self.r2_M)
        old = self._origin
        new = [value.to(kind.dtype) for value, kind in zip(factors, (old.scale, old.offset, old.column), strict=True)]
        stored = old.tensors() | dict(zip(("scale", "offset", "column"), new, strict=True))
        return Salient(shape=old.shape, num_salient=old.num_salient, **stored)


def two_branch_loss(output: Tensor, clean: Tensor, drifted: Tensor, relative: bool = False) -> Tensor:
    """MSE(clean, output) + MSE(drifted, output) - log cos(clean, output) - log cos(drifted, output), a scalar.

    `output` is that of the quantized block on the quantized model's hidden states, `drifted` that of the full block
    on the same states, `clean` that of the full block on the full model's. Cosines are along the last dimension,
    their logarithm is averaged over tokens (PTQ1.61, section 3.3). `relative` takes log(1 + the squared error of
    a token / the mean square of its target) in place of the error: else one massive activation, whose error came from
    earlier blocks, is a thousand times all the text (SmolLM2, 1024 tokens, 4 epochs, EPYC CPU, 2026-11-25: perplexity
    462 in place of 518).
    """
    loss = output.new_zeros(())
    for target in (clean, drifted):
        cosine = nn.functional.cosine_similarity(target, output, dim=-1)
        error, size = (x.square().mean(-1) for x in (output - target, target))
        error = (error / size.clamp_min(torch.finfo(size.dtype).tiny)).log1p() if relative else error
        loss = loss + error.mean() - cosine.clamp_min(1e-6).log().mean()
    return loss


@torch.enable_grad()
def refine(packed: dict[str, Salient], view: BlockView, settings: Ptq161) -> tuple[dict[str, Salient], list[float]]:
    """The same layers with factors trained on a block's outputs, and the mean loss of each epoch.

    AdamW without weight decay, one window a step; rates fall along a cosine to zero, since the passes are few where
    the paper takes 20 over 128 windows at constant 5e-4 and 1e-3. Raises ValueError if the loss is not finite.
    """
    latent = nn.ModuleDict({str(i): Latent(p) for i, p in enumerate(packed.values())})
    scales = [module.s_N for module in latent.values()]
    others = [value for module in latent.values() for value in (module.r1_N, module.r2_M)]
    groups = [{"params": scales, "lr": settings.scale_lr}, {"params": others, "lr": settings.factor_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    with torch.no_grad():
        drifted = [view.run(view.weights, i) for i in range(len(view.targets))]

    def loss_of(i: int) -> Tensor:
        now = dict(zip(packed, (module() for module in latent.values()), strict=True))
        output = view.run(now, i).float()
        return two_branch_loss(output, view.targets[i].float(), drifted[i].float(), settings.relative_error)

    def fault(epoch: int, loss: float) -> str:
        return (
            f"the loss of epoch {epoch} is {loss}; learning rates must keep it finite: "
            f"lower scale_lr = {settings.scale_lr} and factor_lr = {settings.factor_lr}"
        )

    history = descend(optimizer, settings.refine_epochs, len(view.targets), loss_of, fault)
    return dict(zip(packed, (module.packed() for module in latent.values()), strict=True)), history
