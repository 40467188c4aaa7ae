"""y = W x + s B A x on a packed W, with its backward written out: what a LoRA step keeps is x, once, and A x.

Composed of torch's own operations the same product keeps x in the adapter's dtype, hence one copy for each layer that
shares x, and makes three tensors of y's size. Here x is kept as it came, so that q, k and v keep one tensor between
them (autograd holds a reference), and all is added up in place. With t = A x, g = s dy B and x~ = dropout(x):

    dx = dy W + dropout'(g A)      dA = g^T x~      dB = s dy^T t

No product is N x K. A x is made once for all layers that share x (`lrec.shared_inputs`), and s B A x, like g A, is
added by the kernel of the packed product, before rounding where that can. Floats of the packed weight that are trained
get their gradients from the same x and dy. Where x and the adapter differ in dtype, x is cast by rows,
`kernels.CAST_ELEMENTS` at a time, and dropped.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrec import formats, kernels, shared_inputs
from lrec.kernels import LowRank, add_product, slices
from lrec.nn import PackedLinear, plain, undisturbed


def lora_linear(
    x: Tensor, base: PackedLinear, a_RK: Tensor, b_NR: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """The base layer's output plus scaling * B A x, (..., N) for x of shape (..., K), in the base's output dtype.

    The adapter sees each entry of x with probability 1 - `dropout`, and computes in its own dtype or in that of an
    enclosing autocast, as peft's composition does. Raises ValueError if x does not fit the weight.
    """
    base.check(x)
    t_TR = None if dropout or not undisturbed(x) else shared_inputs.project(x, a_RK, _dtype(x, a_RK))
    return _LoraLinear.apply(x, a_RK, b_NR, t_TR, base, scaling, dropout, *base.op_tensors())


def add_low_rank(y: Tensor, x: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """y + scaling * B A x, in y's dtype, for x of shape (..., K). Of a frozen pair autograd keeps A and B alone."""
    t_TR = nn.functional.linear(x.to(a_RK.dtype), a_RK).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), t_TR.to(y.dtype), b_NR.to(y.dtype).t(), alpha=scaling).view(y.shape)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a_RK, b_NR, t_TR, base, scaling, dropout, *tensors):
        x_TK, keep_TK, dtype = x.reshape(-1, x.shape[-1]), None, _dtype(x, a_RK)
        if dropout:
            keep_TK = torch.empty_like(x_TK, dtype=torch.bool).bernoulli_(1 - dropout)
        if t_TR is None:
            t_TR = x.new_empty(len(x_TK), len(a_RK), dtype=dtype)
            for rows in slices(x_TK, dtype):
                torch.mm(_dropped(x_TK, keep_TK, dropout, rows, dtype), a_RK.to(dtype).t(), out=t_TR[rows])
        y = base(x, added=LowRank(t_TR, b_NR.t(), scaling))
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
        for rows in slices(dy_TN, dtype):
            part = dy_TN[rows].to(dtype)
            torch.mm(part, b_NR.to(dtype), out=g_TR[rows]).mul_(ctx.scaling)
            if needs_b:
                add_product(db_NR, part.t(), t_TR[rows], ctx.scaling)
        da_RK = a_RK.new_zeros(a_RK.shape, dtype=wide) if needs_a else None
        if needs_a:
            for rows in slices(x_TK, dtype):
                add_product(da_RK, g_TR[rows].t(), _dropped(x_TK, keep_TK, ctx.dropout, rows, dtype))
        dx_TK = None
        if needs_x:
            dx_TK = _input_gradient(dy_TN, tensors, ctx.key, LowRank(g_TR, a_RK), keep_TK, ctx.dropout)
            dx_TK = dx_TK.to(x.dtype).view(x.shape)
        da_RK = None if da_RK is None else da_RK.to(a_RK.dtype)
        db_NR = None if db_NR is None else db_NR.to(b_NR.dtype)
        of_base = [None] * len(tensors)
        if ctx.fields:
            packed = formats.build_by_key(tensors, ctx.key)
            of_base = kernels.field_gradients(packed, ctx.fields, dy_TN, packed.kept_input(x_TK, ctx.fields))
        return dx_TK, da_RK, db_NR, *(None,) * 4, *of_base


def _dtype(x: Tensor, a_RK: Tensor) -> torch.dtype:
    """What an adapter computes in."""
    autocast = torch.is_autocast_enabled(x.device.type) and a_RK.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else a_RK.dtype


def _input_gradient(
    dy_TN: Tensor, tensors: list[Tensor], key: str, adapters: LowRank, keep_TK: Tensor | None, p: float
) -> Tensor:
    """dy W + dropout'(g A) (T, K) in dy's dtype."""
    if keep_TK is None and plain(dy_TN):
        return kernels.multiply(dy_TN, formats.build_by_key(tensors, key), True, adapters)
    dx_TK = torch.ops.lrec.matmul(dy_TN, tensors, key, True)
    if keep_TK is None:
        return adapters.add_to(dx_TK)
    g_TR, a_RK = adapters.left_TR, adapters.right_RN.to(adapters.left_TR.dtype)
    for rows in slices(dx_TK, g_TR.dtype, masked=True):
        dx_TK[rows] += _scale_kept(g_TR[rows] @ a_RK, keep_TK[rows], p)
    return dx_TK


def _dropped(x_TK: Tensor, keep_TK: Tensor | None, p: float, rows: slice, dtype: torch.dtype) -> Tensor:
    part = x_TK[rows].to(dtype)
    return part if keep_TK is None else _scale_kept(part, keep_TK[rows], p)


def _scale_kept(values: Tensor, keep: Tensor, p: float) -> Tensor:
    return (values * keep).mul_(1 / (1 - p) if p < 1 else 0.0)
