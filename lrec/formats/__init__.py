"""What a packed weight means.

A format is one frozen dataclass whose fields are tensors or plain numbers. `unpack(rows)` in plain torch *is* its
definition; kernels, exports and tests must agree with it. Everything else (saving, loading, moving, counting bytes,
the arguments of the op) is derived from the fields by reflection, so a new format is one file.

Legend of shape suffixes, used in the whole package: B batch, L length, T = B*L tokens, N out, K in, G groups along K,
P bit planes, R rank, V vocabulary, O outliers. A weight is `w_NK`, oriented like `nn.Linear.weight`.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lrec import documents, registry

GRADIENT_WEIGHTS = 2**20  # of the gradient of a decoded weight, made at once

Kinds = tuple[torch.dtype, ...]
# A layout: of each tensor field, the dtypes and the shape that it may have together.
Layout = dict[str, list[tuple[Kinds, tuple[int, ...]]]]

INT32: Kinds = (torch.int32,)
UINT8: Kinds = (torch.uint8,)
MOST = 2**62  # product of all sizes that a spec names
STORED = ("int32", "int8", "uint8", "float16", "bfloat16", "float32")
FLOATS: Kinds = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """A weight of shape (N, K) in packed storage.

    Fields typed Tensor (or Tensor | None) are stored; all other fields are plain JSON values and form the spec.
    The first tensor field of every format is `qweight`. `TRAINED` names the float fields that `lrec train --train` can
    train, by kind.
    """

    TRAINED: ClassVar[dict[str, tuple[str, ...]]] = {}

    shape: tuple[int, int]
    qweight: Tensor

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))

    @classmethod
    def name(cls) -> str:
        """The format's name: that of its file."""
        return registry.name_of(cls)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The decoded rows as float32 (n, K): the definition of the format."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name; fields that are None are left out."""
        held = ((name, getattr(self, name)) for name in tensor_fields(type(self)))
        return {name: value for name, value in held if value is not None}

    def spec(self) -> dict:
        """All that is known without the data, as JSON values: format, settings, and each tensor's dtype and shape."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in tensor_fields(type(self))]
        plain = {name: getattr(self, name) for name in names}
        kinds = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in self.tensors().items()}
        return {"format": self.name(), **plain, "shape": list(self.shape), "tensors": kinds}

    @cached_property
    def key(self) -> str:
        """`spec_key` of the spec."""
        return spec_key(self.spec())

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zeros, indices, masks, tables."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def to(self, device) -> "Packed":
        """The same weight on another device."""
        return dataclasses.replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    def layout(self) -> Layout:
        """What tensors these settings call for. Raises ValueError for settings that no weight of the format has."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError for settings or tensors that do not belong together: kernels would read past their ends."""
        if len(self.shape) != 2 or not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise ValueError(f"a weight's shape is two numbers above zero, not {self.shape}")
        layout = self.layout()
        for name, tensor in self.tensors().items():
            if not any(tensor.dtype in dtypes and tuple(tensor.shape) == shape for dtypes, shape in layout[name]):
                allowed = " or ".join(
                    f"{'/'.join(str(t).removeprefix('torch.') for t in dtypes)} {list(shape)}"
                    for dtypes, shape in layout[name]
                )
                found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                raise ValueError(f"{name} is {found}, but {self.name()} of shape {self.shape} takes {allowed}")

    def check_values(self) -> None:
        """Raises ValueError for stored numbers that point outside of the weight. Reads the data, so not on `meta`."""

    def updated(self, tensors: dict[str, Tensor]) -> "Packed":
        """The same weight with other tensors in these fields."""
        return dataclasses.replace(self, **tensors)

    def trainable(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """The fields of these kinds that can be trained; those that are absent or hold codes are left out."""
        held = {name: tensor for name, tensor in self.tensors().items() if tensor.is_floating_point()}
        return tuple(name for kind in kinds for name in self.TRAINED.get(kind, ()) if name in held)

    def widened(self, fields: Sequence[str]) -> "Packed":
        """The same weight, value for value, with these trainable fields in float32."""
        return self.updated({name: getattr(self, name).float() for name in fields})

    def narrowed(self, fields: Sequence[str], spec: dict, scale_bits: int | None) -> "Packed":
        """The weight with these fields as `spec`, that of the weight before `widened`, stored them: rounded to it.
        `scale_bits` asks for 8 or 16 bits, where the format has both."""
        return self.updated({name: getattr(self, name).to(getattr(torch, spec["tensors"][name][0])) for name in fields})

    def kept_input(self, x_TK: Tensor, fields: Sequence[str]) -> Tensor:
        """What of the input of x W^T `gradients` of these fields need."""
        return x_TK

    def gradients(self, dy_TN: Tensor, kept: Tensor, fields: Sequence[str]) -> list[Tensor]:
        """The gradients of sum(dy * x W^T) in these fields, float32 in `widened` form; `kept` is `kept_input(x)`.

        dW = dy^T x is made by slices of rows, so that nothing of size N*K exists.
        """
        leaves = [getattr(self, name).detach().requires_grad_() for name in fields]
        leaf = dataclasses.replace(self, **dict(zip(fields, leaves, strict=True)))
        sums = [torch.zeros_like(tensor) for tensor in leaves]
        for rows in row_slices(*self.shape):
            dw_nK = (dy_TN[:, rows].t() @ kept).float()
            with torch.enable_grad():
                w_nK = leaf.unpack(rows)
            parts = torch.autograd.grad(w_nK, leaves, dw_nK)
            for total, part in zip(sums, parts, strict=True):
                total += part
        return sums


Base = Packed


def words(n: int, bits: int) -> int:
    """Number of int32 words in which `pack_codes` stores n codes."""
    return -(-n // 32) * bits


@lru_cache
def tensor_fields(cls: type) -> tuple[str, ...]:
    """Names of the fields of a format that hold tensors, `qweight` first."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.type in (Tensor, Tensor | None))


def row_slices(N: int, K: int) -> list[slice]:
    """Runs of rows of at most `GRADIENT_WEIGHTS` weights, in multiples of 32 where they are more than that."""
    step = max(1, GRADIENT_WEIGHTS // K)
    step = step // 32 * 32 or step
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


def build(tensors: dict[str, Tensor] | list[Tensor], spec: dict) -> Packed:
    """The inverse of `tensors()` and `spec()`; a list of tensors is taken in the spec's order.

    Raises ValueError for an unknown format, or when the tensors are not the ones the spec names, or do not fit it.
    """
    packed = _put_together(tensors, spec)
    packed.check()
    return packed


def _put_together(tensors: dict[str, Tensor] | list[Tensor], spec: dict) -> Packed:
    cls = registry.find("formats", spec["format"])
    if not isinstance(tensors, dict):
        tensors = dict(zip(spec["tensors"], tensors, strict=True))
    if tensors.keys() != spec["tensors"].keys():
        raise ValueError(f"format {spec['format']} has tensors {list(spec['tensors'])}, but got {list(tensors)}")
    plain = {key: value for key, value in spec.items() if key not in ("format", "tensors")}
    return cls(**plain, **tensors)


def empty(spec: dict, device=None) -> Packed:
    """A weight of this spec with unset tensors on `device`; loading a checkpoint fills them.

    Raises ValueError for a spec that no weight has.
    """
    check_spec(spec)
    kinds = spec["tensors"].items()
    return build(
        {n: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for n, (dtype, shape) in kinds}, spec
    )


def check_spec(spec: dict) -> None:
    """Raises ValueError for a spec, as a file has it, with fields that its format lacks or without some that it needs,
    or with numbers or dtypes that are none."""
    documents.check(spec, documents.Spec, "the spec of a packed layer")
    cls = registry.find("formats", spec["format"])
    named = {"format", "tensors", *(f.name for f in dataclasses.fields(cls))} - {*tensor_fields(cls)}
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.type is Tensor}
    if spec.keys() != named:
        raise ValueError(f"a spec of format {cls.name()} has {sorted(named)}, but got {sorted(spec)}")
    if not needed <= spec["tensors"].keys() <= {*tensor_fields(cls)}:
        raise ValueError(f"format {cls.name()} has tensors {list(tensor_fields(cls))}, but got {list(spec['tensors'])}")
    settings = [value for key, value in spec.items() if key not in ("format", "tensors", "shape")]
    if odd := [value for value in settings if type(value) is not int or not 0 <= value < MOST]:
        raise ValueError(f"a spec of format {cls.name()} holds {odd[0]!r}, which is no size")
    for name, (dtype, shape) in spec["tensors"].items():
        if dtype not in STORED or not isinstance(shape, list) or math.prod([*shape, *spec["shape"]]) > MOST:
            raise ValueError(f"{name} of format {cls.name()} is {dtype!r} {shape}; allowed: a shape of {STORED}")


def spec_key(spec: dict) -> str:
    """The spec as one line of JSON: hashable, and what the op takes."""
    return json.dumps(spec, separators=(",", ":"))


@lru_cache(maxsize=4096)
def parse_key(key: str) -> dict:
    """The inverse of `spec_key`; shared between calls, so not to be changed."""
    return json.loads(key)


def build_by_key(tensors: list[Tensor], key: str) -> Packed:
    """`build` for a caller that has the key of a weight that was checked; not put together or checked again."""
    packed = _put_together(tensors, parse_key(key))
    packed.__dict__["key"] = key
    return packed


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes (..., n) into int32 words (..., ceil(n / 32) * bits).

    Each run of 32 codes fills `bits` words exactly: code k of a run stands in bits [k*bits, (k+1)*bits) of the
    little-endian bit stream of those words (GPTQ's order). A short last run is filled up with zeros.
    """
    assert not codes.is_floating_point(), f"codes must be integers, got {codes.dtype}"
    pad = -codes.shape[-1] % 32
    runs = torch.nn.functional.pad(codes, (0, pad)).long().unflatten(-1, (-1, 32))
    words = runs.new_zeros(*runs.shape[:-1], bits)
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        words[..., word] |= runs[..., k] << shift
        if shift + bits > 32:
            words[..., word + 1] |= runs[..., k] >> (32 - shift)
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).int().flatten(-2)


def unpack_codes(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_codes`: the first `n` codes of each row as uint8 (..., n)."""
    if 8 % bits == 0:
        # Codes that do not cross bytes: one byte holds 8 / bits of them, lowest bits first.
        data = words.contiguous().view(torch.uint8)
        fields = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, -1).flatten(-2)[..., :n]
    runs = words.unflatten(-1, (-1, bits))
    codes = []
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        code = runs[..., word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            code = (code & (2**low - 1)) | (runs[..., word + 1] << low)
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, -1).flatten(-2)[..., :n]
