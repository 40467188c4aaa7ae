"""How many bits an adapter is stored in: bfloat16, or int8 codes with one float scale for each component of its rank.

Component r of a pair is row r of A (R, K) and column r of B (N, R). Each of the two is stored as

    w = scale * code,   scale = max |w| / 127,   code = round(w / scale) in -127 ... 127

One component may be a hundred times another, as those of a closed form fall off like singular values, so a scale that
spans components would lose the small ones; and within one, 8 bits have levels to spare, so nothing is clipped.

Training sees the rounding: the optimizer steps floats, of which every product takes the rounded values. Gradients pass
the rounding straight through and reach a scale by the largest entry, which defines it; so scales are trained. In a
file the codes are `<layer>.lora_A.qweight` and the scales `<layer>.lora_A.scale`: names that peft does not know, so
that without lrec it misses weights, and never takes codes for them.
"""

from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from lrec import checkpoint

WIDTHS = (16, 8)
LEVELS = 127
DIMS = {"lora_A": 1, "lora_B": 0}  # of each half, the one that a component extends over


def scale_of(w: Tensor, dim: int) -> Tensor:
    """The scale of each component, float32, with `dim` kept."""
    return w.float().abs().amax(dim, keepdim=True).clamp_min(1e-30) / LEVELS


def rounded(w: Tensor, dim: int) -> Tensor:
    """What is stored of w, in its dtype; the gradient is that of scale * code, where code passes it on as it is to
    w / scale."""
    scale = scale_of(w, dim)
    code = w.float() / scale
    return ((code + (code.round() - code).detach()) * scale).to(w.dtype)


class RoundedLinear(nn.Linear):
    """Half an adapter: its `weight` is the rounded one, the parameter of that name is what the optimizer steps."""

    def __init__(self, linear: nn.Linear, dim: int):
        """Takes over the parameter of a linear without bias."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dim = linear.in_features, linear.out_features, dim
        self._parameters |= {"weight": linear.weight, "bias": None}

    @property
    def weight(self) -> Tensor:
        """What is stored, made anew at each access."""
        return rounded(self._parameters["weight"], self.dim)


def pair_bytes(shape: tuple[int, int], rank: int, bits: int) -> int:
    """Stored bytes of a pair of this rank on a weight of this shape, (N, K)."""
    return rank * (sum(shape) * bits // 8 + (2 * torch.float32.itemsize if bits == 8 else 0))


def start(model: nn.Module) -> None:
    """Lets all products with the adapters that are trained see them as int8 stores them. Raises ValueError under FSDP,
    which puts views of its own where a module's weight is."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError("lora_bits = 8 is not for FSDP: leave it at 16, or use plain data-parallel processes")
    for layer in [*model.modules()]:
        for half, dim in DIMS.items():
            parts = getattr(layer, half, None) or {}
            for name, part in parts.items():
                if part.weight.requires_grad:
                    parts[name] = RoundedLinear(part, dim)


def encode(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by their names in its file: codes and scales of A and B, all others in bfloat16."""
    found = {}
    for key, tensor in tensors.items():
        half = key.removesuffix(".weight")
        dim = DIMS.get(half.rpartition(".")[2])
        if half == key or dim is None or tensor.dim() != 2:
            found[key] = tensor.bfloat16()
            continue
        scale = scale_of(tensor, dim)
        found |= {f"{half}.qweight": (tensor.float() / scale).round().to(torch.int8), f"{half}.scale": scale.flatten()}
    return found


def decode(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An adapter's tensors as peft knows them: what was `encode`d in `dtype`, all others as they are.

    Raises ValueError for codes without scales or of another shape than theirs.
    """
    found = {**tensors}
    for key in [key for key in tensors if key.endswith(".qweight")]:
        half = key.removesuffix(".qweight")
        dim, codes, scale = DIMS.get(half.rpartition(".")[2]), found.pop(key), found.pop(f"{half}.scale", None)
        fits = dim is not None and codes.dim() == 2 and scale is not None and scale.shape == (codes.shape[1 - dim],)
        if not fits or codes.dtype != torch.int8:
            raise ValueError(f"{key} is no int8 half of an adapter with a scale for each component; train it again")
        found[f"{half}.weight"] = (codes.float() * scale.float().unsqueeze(dim)).to(dtype)
    return found


def read(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of an adapter's file, decoded; see `decode`."""
    with checkpoint.open_tensors(path) as file:
        return decode({key: file.get_tensor(key) for key in file.keys()}, dtype)  # noqa: SIM118  (not a dict)


def holds_codes(path: Path) -> bool:
    """Whether an adapter's file is one of int8 codes."""
    with checkpoint.open_tensors(path) as file:
        return any(key.endswith(".qweight") for key in file.keys())  # noqa: SIM118  (not a dict)


def store(path: Path, bits: int) -> None:
    """Rewrites an adapter's file in bfloat16, or in int8: peft trains in float32, but what is corrected is coarser."""
    tensors = read(path)
    narrow = encode(tensors) if bits == 8 else {key: tensor.bfloat16() for key, tensor in tensors.items()}
    checkpoint.write_tensors(path, narrow)
