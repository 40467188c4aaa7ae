"""What reports and configurations say of a packed layer."""

import torch
from torch import Tensor

from lrec import checkpoint
from lrec.formats import Packed


def layer_row(layer: str, packed: Packed, residual_NK: Tensor, w_NK: Tensor, hessian_KK: Tensor | None) -> dict:
    """What the report says of a layer; `error` is ||(W - Wq) X||^2 / ||W X||^2 over the calibration inputs, or, if
    there are none, `weight_error` is ||W - Wq||^2 / ||W||^2."""
    kind = "weight_error" if hessian_KK is None else "error"
    return packed_row(layer, packed, **{kind: energy(residual_NK, hessian_KK) / energy(w_NK, hessian_KK)})


def packed_row(layer: str, packed: Packed, **error: float) -> dict:
    """What the report and the configuration say of a packed layer."""
    return {
        "name": layer,
        "shape": list(packed.shape),
        "bits_per_weight": packed.bits_per_weight,
        "bytes": packed.nbytes,
        **error,
        "sha256": checkpoint.tensors_hash(packed.tensors()),
        "spec": packed.spec(),
    }


def energy(w_NK: Tensor, hessian_KK: Tensor | None) -> float:
    """tr(W H W^T), the mean squared output of a weight; without H, ||W||^2. Never zero, so that one may divide."""
    total = (w_NK.square() if hessian_KK is None else w_NK @ hessian_KK * w_NK).sum()
    return float(total.clamp_min(torch.finfo(torch.float32).tiny))
