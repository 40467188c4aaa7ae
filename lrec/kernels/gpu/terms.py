"""A packed weight as the fused product takes it: one term or two, each with one kind of codes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lrec.eight_bits import power_of_two
from lrec.formats import Packed, unpack_codes
from lrec.formats.binary import Binary
from lrec.formats.codebook import Codebook
from lrec.formats.outlier import Outlier
from lrec.formats.salient import SALIENT_BITS, Salient
from lrec.formats.ternary import Ternary
from lrec.formats.uniform import Uniform, groups
from lrec.kernels import gpu
from lrec.kernels.gpu.decode import ONE_GROUP, scales_and_zeros
from lrec.kernels.gpu.tiling import Weight

# Tensor -> {what: (the tensor's version, what was made of it)}, let go with the tensor.
_MADE = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Term:
    """Some columns of a weight: column k meets x's column `index` k, times `column` k, or column k itself."""

    packed: Packed
    weight: Weight
    index: Tensor | None = None
    column: Tensor | None = None

    @cached_property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.weight.group_size if groups(self.weight.shape[1], self.weight.group_size) > 1 else ONE_GROUP


def terms(packed: Packed) -> list[Term]:
    """What to add up for a weight that `tiling.refuses` does not refuse."""
    weight = Weight.of(packed)
    if isinstance(packed, Outlier):
        return [Term(inliers(packed), weight)]
    if not isinstance(packed, Salient):
        return [Term(packed, weight)]
    K, S = packed.shape[1], packed.num_salient
    places = beside(packed.mask, "columns", lambda mask: _salient_first(unpack_codes(mask, 1, K)))
    found = []
    for part in weight.parts(S):
        shape, size = part.shape, part.group_size
        if part.bits == SALIENT_BITS:
            scale, zero = packed.salient_scale[:, None], packed.salient_zero[None]
            codes = Uniform(shape=shape, bits=4, group_size=size, qweight=packed.salient, scale=scale, zero=zero)
            found.append(Term(codes, part, places[:S]))
        else:
            alpha, offset = packed.scale[:, None, None], packed.offset[:, None]
            signs = Binary(shape=shape, group_size=size, qweight=packed.qweight[:, None], alpha=alpha, offset=offset)
            found.append(Term(signs, part, places[S:], packed.column))
    return found


def inliers(packed: Outlier) -> Packed:
    """The weight that `packed` would be if none of its weights were an outlier."""
    same = {"shape": packed.shape, "bits": packed.bits, "qweight": packed.qweight}
    if packed.table is not None:
        return Codebook(**same, group_size=packed.shape[1], block_size=0, table=packed.table[:, 0].contiguous())
    # base + scale q = scale (q - zero)
    scale = packed.scale[:, :1].contiguous()
    return Uniform(**same, group_size=packed.shape[1], scale=scale, zero=-packed.base[:, :1].float() / scale)


def _salient_first(mask_K: Tensor) -> Tensor:
    """int32 (K,): the columns that are marked, then the others; no number has to come back from the device."""
    return mask_K.sort(stable=True, descending=True).indices.int()


def arguments(term: Term) -> tuple[tuple, dict]:
    """(qweight, scale, zero, table, its scale up, units of a row, G, words of a row of zeros, tables of a row) as
    `multiply` takes them, and its constants."""
    packed = term.packed
    scale = zero = table = up = None
    codes, kind, levels, words, planes, G = packed.qweight, "none", "", 0, 1, 1
    if isinstance(packed, Binary):
        scale, zero, kind = packed.alpha, packed.offset, "offset"
        G, planes = packed.alpha.shape[1:]
    elif isinstance(packed, Ternary):
        scale, kind, G = packed.scale, "trits", packed.scale.shape[1]
    elif isinstance(packed, Uniform):
        scale, zero, kind = scales_and_zeros(packed)
        words, G = zero.shape[1], scale.shape[1]
    else:
        assert isinstance(packed, Codebook)
        table, kind = packed.table, "levels"
        levels = ("one", "row", "group" if term.weight.table_size else "row")[table.dim() - 1]
        up = scale_up(table)
        if packed.scale is not None:
            G = packed.shape[1] // packed.block_size
            scale = packed.scale if packed.scale_scale is None else packed.block_scales()
    if codes.dtype is torch.uint8:
        codes = codes.view(torch.int16) if codes.shape[-1] % 2 == 0 else codes
    elif term.weight.bits != 3 and not (levels and gpu.interpreted()):
        codes = codes.view(torch.int16)
    # Rows are whole runs of 32 codes: a multiple that the compiler knows makes for longer loads.
    unit = 1 if isinstance(packed, Ternary) else codes.shape[-1] // -(-packed.shape[1] // 32)
    tables = table.shape[1] if levels == "group" else 1
    held = (codes, scale, zero, table, up, codes.shape[-1] // unit, G, words, tables)
    constants = {"GROUP": term.group, "ZERO": kind, "PLANES": planes, "UNIT": unit}
    return held, constants | {"LEVELS": levels, "TABLE": term.weight.table_size}


def scale_up(scale: Tensor) -> Tensor:
    """float32 (1,): the power of two that brings the largest of these scales under 2^14; kept beside the weight."""
    return beside(scale, "up", _up)


def _up(scale: Tensor) -> Tensor:
    exponent = torch.frexp(scale.detach().abs().amax().float()).exponent.clamp(-100, 100)
    return power_of_two(14 - exponent).view(1)


def beside(tensor: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(tensor), made once for each version of the tensor and kept as long as that lives."""
    version = 0 if tensor.is_inference() else tensor._version
    known = _MADE.get(tensor, {}).get(what)
    if known is not None and known[0] == version:
        return known[1]
    made = make(tensor)
    if not (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory is its own
        _MADE.setdefault(tensor, {})[what] = version, made
    return made
