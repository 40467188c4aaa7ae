"""The product with a packed weight: one op, an ordered table of kernels, and the reason each one stands aside.

`matmul(x, packed)` is x W^T, `matmul(dy, packed, transpose=True)` is dy W. Both are the same custom op
`lrec::matmul`, whose backward is the op with `transpose` flipped: nothing of size N*K is kept between forward and
backward, and no copy of x either, since a frozen weight needs none. Where floats of the weight (scales, zero points,
tables) ask for a gradient, x is kept, or what `Packed.kept_input` makes of it, and still nothing of size N*K.

A kernel is one file of this folder with one subclass of `Kernel`. For a call, the kernels of higher priority are
asked first; each may refuse with a reason in words, and the sliced reference never refuses. `explain` lists the
reasons. `LREC_KERNEL=name` forces one kernel, and the call raises with its reason if it refuses.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lrec import formats, registry
from lrec.formats import Packed

# What in the environment decides which kernel serves.
ASKED = ("LREC_KERNEL", "LREC_ACTIVATION_BITS")
CAST_ELEMENTS = 2**22  # what is cast at once, and dropped


@dataclass(frozen=True)
class Call:
    """What a kernel is asked to serve, known before any data: device type, dtype of x, and the number of rows T."""

    device: str
    dtype: torch.dtype
    num_rows: int
    transpose: bool = False


@dataclass(frozen=True)
class LowRank:
    """scale * left right, to be added to a product (T, width): `left` (T, R) and `right` (R, width), in the dtype of
    `left`."""

    left_TR: Tensor
    right_RN: Tensor
    scale: float = 1.0

    def add_to(self, y_TN: Tensor) -> Tensor:
        """y itself, with this added in place; each sum is rounded once, to y's dtype."""
        right_RN = self.right_RN.to(self.left_TR.dtype)
        for rows in slices(y_TN, self.left_TR.dtype):
            add_product(y_TN[rows], self.left_TR[rows], right_RN, self.scale)
        return y_TN


def slices(like: Tensor, dtype: torch.dtype, masked: bool = False) -> Iterator[slice]:
    """All rows at once where nothing has to be cast to `dtype` or masked, else as many as `CAST_ELEMENTS` allows."""
    step = CAST_ELEMENTS // max(1, like.shape[1]) if masked or like.dtype != dtype else len(like)
    return (slice(start, start + max(1, step)) for start in range(0, len(like), max(1, step)))


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """out += scale * left @ right; the sum is rounded once, to out's dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.add_(left @ right, alpha=scale)


class Kernel:
    """One way to multiply. `priority` orders the table, highest first; the reference has 0."""

    priority: int

    @classmethod
    def refuses(cls, call: Call, spec: dict) -> str | None:
        """Why this kernel cannot serve the call, in words, or None if it can."""
        raise NotImplementedError

    @classmethod
    def chosen(cls, call: Call, spec: dict) -> str | None:
        """What decided that this kernel serves the call, and where that was measured; None if nothing had to."""
        return None

    @classmethod
    def matmul(cls, x_TK: Tensor, packed: Packed, transpose: bool) -> Tensor:
        """x W^T of shape (T, N), or with `transpose` x W of shape (T, K), in x's dtype."""
        raise NotImplementedError

    @classmethod
    def matmul_plus(cls, x_TK: Tensor, packed: Packed, transpose: bool, added: LowRank) -> Tensor:
        """`matmul` with `added` added; by a kernel that can, before the product is rounded or written."""
        return added.add_to(cls.matmul(x_TK, packed, transpose))


Base = Kernel


def round_activations(bits: int | None) -> None:
    """What `--activation_bits` does: asks, for this process, for the kernels that round x; None changes nothing.

    Raises ValueError for a width other than 8.
    """
    if bits not in (None, 8):
        raise ValueError(f"--activation_bits {bits} is not offered; allowed: 8; leave it out for exact activations")
    if bits:
        os.environ["LREC_ACTIVATION_BITS"] = str(bits)


def table() -> dict[str, type[Kernel]]:
    """All kernels by name, those asked first in front."""
    return dict(sorted(registry.members("kernels").items(), key=lambda item: -item[1].priority))


def explain(call: Call, spec: dict) -> tuple[str, dict[str, str]]:
    """The name of the kernel that serves a call, and why each kernel asked before it stood aside.

    Raises ValueError if `LREC_KERNEL` names no kernel or one that refuses.
    """
    forced = os.environ.get("LREC_KERNEL")
    if forced:
        reason = registry.find("kernels", forced).refuses(call, spec)
        if reason:
            raise ValueError(
                f"LREC_KERNEL={forced} was asked for, but it refuses: {reason}. Unset LREC_KERNEL to let lrec choose."
            )
        return forced, {name: f"LREC_KERNEL={forced} is set" for name in table() if name != forced}
    aside = {}
    for name, kernel in table().items():
        reason = kernel.refuses(call, spec)
        if reason is None:
            return name, aside
        aside[name] = reason
    raise AssertionError("the reference kernel never refuses")


@lru_cache(maxsize=65536)
def _choose(call: Call, key: str, asked: tuple[str | None, ...]) -> type[Kernel]:
    name, aside = explain(call, formats.parse_key(key))
    if name == "reference" and not os.environ.get("LREC_KERNEL"):
        _warn_once(
            call.device,
            str(call.dtype),
            formats.parse_key(key)["format"],
            "; ".join(f"{k}: {v}" for k, v in aside.items()),
        )
    return registry.find("kernels", name)


@lru_cache
def _warn_once(device: str, dtype: str, format: str, reasons: str) -> None:
    if reasons:
        warnings.warn(
            f"lrec: {format} weights on {device} with {dtype} use the reference kernel ({reasons}); "
            "`lrec explain` has the table",
            stacklevel=2,
        )


def multiply(x: Tensor, packed: Packed, transpose: bool = False, added: LowRank | None = None) -> Tensor:
    """The op's body: the product by the kernel that serves the call, without gradient and unseen by tracers; `added`,
    if given, is added to it."""
    call = Call(x.device.type, x.dtype, x.shape[0], transpose)
    asked = tuple(map(os.environ.get, ASKED))
    kernel = _choose(call, packed.key, asked)
    return kernel.matmul(x, packed, transpose) if added is None else kernel.matmul_plus(x, packed, transpose, added)


@torch.library.custom_op("lrec::matmul", mutates_args=())
def _matmul(x: Tensor, tensors: list[Tensor], spec: str, transpose: bool) -> Tensor:
    return multiply(x, formats.build_by_key(tensors, spec), transpose)


@_matmul.register_fake
def _(x: Tensor, tensors: list[Tensor], spec: str, transpose: bool) -> Tensor:
    N, K = formats.parse_key(spec)["shape"]
    return x.new_empty(x.shape[0], K if transpose else N)


def _setup_context(ctx, inputs, output):
    x, tensors, ctx.spec, ctx.transpose = inputs
    names = formats.parse_key(ctx.spec)["tensors"]
    ctx.fields = tuple(name for name, t in zip(names, tensors, strict=True) if t.requires_grad)
    ctx.needs_x = x.requires_grad
    kept = []
    if ctx.fields:
        kept = [x if ctx.transpose else formats.build_by_key(tensors, ctx.spec).kept_input(x, ctx.fields)]
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx, grad):
    # Under gradient checkpointing saved tensors may be unpacked once only.
    tensors = list(ctx.saved_tensors)
    grads, grad = [None] * (len(tensors) - bool(ctx.fields)), grad.contiguous()
    if ctx.fields:
        dy, x = (tensors.pop(), grad) if ctx.transpose else (grad, tensors.pop())
        packed = formats.build_by_key(tensors, ctx.spec)
        kept = packed.kept_input(x, ctx.fields) if ctx.transpose else x
        grads = field_gradients(packed, ctx.fields, dy, kept)
    dx = _matmul(grad, tensors, ctx.spec, not ctx.transpose) if ctx.needs_x else None
    return dx, grads, None, None


@torch.no_grad()
def field_gradients(packed: Packed, fields: tuple[str, ...], dy_TN: Tensor, kept: Tensor) -> list[Tensor | None]:
    """`Packed.gradients` in the place of each tensor of the weight, in its dtype; None for those that are frozen."""
    found = dict(zip(fields, packed.gradients(dy_TN.to(kept.dtype), kept, fields), strict=True))
    return [found[name].to(tensor.dtype) if name in found else None for name, tensor in packed.tensors().items()]


_matmul.register_autograd(_backward, setup_context=_setup_context)


def matmul(x: Tensor, packed: Packed, transpose: bool = False) -> Tensor:
    """x W^T for x of shape (..., K), or x W for x of shape (..., N) with `transpose`; differentiable in x.

    Raises ValueError if the last dimension of x does not fit the weight.
    """
    return apply(x, list(packed.tensors().values()), packed.key, transpose)


def apply(x: Tensor, tensors: list[Tensor], key: str, transpose: bool = False) -> Tensor:
    """`matmul` for a caller that holds the op's own arguments, as a layer does."""
    inner = formats.parse_key(key)["shape"][0 if transpose else 1]
    if x.shape[-1] != inner:
        raise ValueError(
            f"x has {x.shape[-1]} columns, but the packed weight of shape "
            f"{formats.parse_key(key)['shape']} needs {inner}"
        )
    return _matmul(x.reshape(-1, inner), tensors, key, transpose).unflatten(0, x.shape[:-1])
