"""y = W x + s B A x on a packed W, with its backward written out: what a LoRA step keeps is x, once, and A x.

Composed of torch's own operations the same product keeps x in the adapter's dtype, hence one copy for each layer that
shares x, and makes three tensors of y's size. Here x is kept as it came, so that q, k and v keep one tensor between
them (autograd holds a reference), and all is added up in place. With t = A x, g = s dy B and x~ = dropout(x):

    dx = dy W + dropout'(g A)      dA = g^T x~      dB = s dy^T t

No product is N x K. Floats of the packed weight that are trained get their gradients from the same x and dy. Where x
and the adapter differ in dtype, x is cast by rows, `CAST_ELEMENTS` at a time, and dropped.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrec import formats, kernels
from lrec.nn import PackedLinear

CAST_ELEMENTS = 2**22


def lora_linear(
    x: Tensor, base: PackedLinear, a_RK: Tensor, b_NR: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """The base layer's output plus scaling * B A x, (..., N) for x of shape (..., K), in the base's output dtype.

    The adapter sees each entry of x with probability 1 - `dropout`, and computes in its own dtype or in that of an
    enclosing autocast, as peft's composition does. Raises ValueError if x does not fit the weight.
    """
    return _LoraLinear.apply(x, a_RK, b_NR, base, scaling, dropout, *base.op_tensors())


def add_low_rank(y: Tensor, x: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """y + scaling * B A x, in y's dtype, for x of shape (..., K). Of a frozen pair autograd keeps A and B alone."""
    t_TR = nn.functional.linear(x.to(a_RK.dtype), a_RK).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), t_TR.to(y.dtype), b_NR.to(y.dtype).t(), alpha=scaling).view(y.shape)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a_RK, b_NR, base, scaling, dropout, *tensors):
        dtype = a_RK.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        y = base(x)
        x_TK, y_TN = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        keep_TK = None
        if dropout:
            keep_TK = torch.empty_like(x_TK, dtype=torch.bool).bernoulli_(1 - dropout)
        t_TR = x.new_empty(len(x_TK), len(a_RK), dtype=dtype)
        for rows in _slices(x_TK, dtype):
            torch.mm(_dropped(x_TK, keep_TK, dropout, rows, dtype), a_RK.to(dtype).t(), out=t_TR[rows])
        for rows in _slices(y_TN, dtype):
            _add_product(y_TN[rows], t_TR[rows], b_NR.to(dtype).t(), scaling)
        ctx.key, ctx.fields, ctx.scaling, ctx.dropout, ctx.dtype = base.key, base.trained, scaling, dropout, dtype
        ctx.save_for_backward(x, t_TR, keep_TK, a_RK, b_NR, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # Under gradient checkpointing saved tensors may be unpacked once only.
        x, t_TR, keep_TK, a_RK, b_NR, *tensors = ctx.saved_tensors
        dtype, wide = ctx.dtype, torch.promote_types(ctx.dtype, torch.float32)
        x_TK, dy_TN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).contiguous()
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        g_TR = torch.empty_like(t_TR)
        db_NR = b_NR.new_zeros(b_NR.shape, dtype=wide) if needs_b else None
        for rows in _slices(dy_TN, dtype):
            part = dy_TN[rows].to(dtype)
            torch.mm(part, b_NR.to(dtype), out=g_TR[rows]).mul_(ctx.scaling)
            if needs_b:
                _add_product(db_NR, part.t(), t_TR[rows], ctx.scaling)
        da_RK = a_RK.new_zeros(a_RK.shape, dtype=wide) if needs_a else None
        if needs_a:
            for rows in _slices(x_TK, dtype):
                _add_product(da_RK, g_TR[rows].t(), _dropped(x_TK, keep_TK, ctx.dropout, rows, dtype))
        dx_TK = None
        if needs_x:
            dx_TK = torch.ops.lrec.matmul(dy_TN, tensors, ctx.key, True)
            for rows in _slices(dx_TK, dtype, masked=keep_TK is not None):
                if keep_TK is None:
                    _add_product(dx_TK[rows], g_TR[rows], a_RK.to(dtype))
                else:
                    dx_TK[rows] += _scale_kept(g_TR[rows] @ a_RK.to(dtype), keep_TK[rows], ctx.dropout)
            dx_TK = dx_TK.to(x.dtype).view(x.shape)
        da_RK = None if da_RK is None else da_RK.to(a_RK.dtype)
        db_NR = None if db_NR is None else db_NR.to(b_NR.dtype)
        of_base = [None] * len(tensors)
        if ctx.fields:
            packed = formats.build_by_key(tensors, ctx.key)
            of_base = kernels.field_gradients(packed, ctx.fields, dy_TN, packed.kept_input(x_TK, ctx.fields))
        return dx_TK, da_RK, db_NR, None, None, None, *of_base


def _slices(like: Tensor, dtype: torch.dtype, masked: bool = False) -> Iterator[slice]:
    """All rows at once where nothing has to be copied, else as many as `CAST_ELEMENTS` allows."""
    copies = masked or like.dtype != dtype
    step = max(1, CAST_ELEMENTS // max(1, like.shape[1])) if copies else max(1, len(like))
    return (slice(start, start + step) for start in range(0, len(like), step))


def _dropped(x_TK: Tensor, keep_TK: Tensor | None, p: float, rows: slice, dtype: torch.dtype) -> Tensor:
    part = x_TK[rows].to(dtype)
    return part if keep_TK is None else _scale_kept(part, keep_TK[rows], p)


def _scale_kept(values: Tensor, keep: Tensor, p: float) -> Tensor:
    return (values * keep).mul_(1 / (1 - p) if p < 1 else 0.0)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """out += scale * left @ right; the sum is rounded once, to out's dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.add_(left @ right, alpha=scale)
