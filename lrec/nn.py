"""PackedLinear: an `nn.Linear` whose weight is packed.

It *is* an `nn.Linear` so that transformers, peft and trl treat it as one; its `weight` is a property that decodes,
uncached, for the few places that ask. The packed tensors are buffers, `qweight` first (peft moves adapters to that
buffer's device), so they are saved, loaded and moved like any others, and never trained or given gradients.
"""

import torch
from torch import Tensor, nn

import lrec.kernels  # noqa: F401  defines the op lrec::matmul
from lrec import formats
from lrec.formats import Packed


class PackedLinear(nn.Linear):
    """y = x W^T + b with W packed; `packed` is the weight, `spec` its description, `dtype` that of decoded weights."""

    def __init__(self, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype = torch.float32):
        """Takes over the tensors of `packed` and `bias` without copying. Raises nothing."""
        N, K = packed.shape
        super().__init__(K, N, bias=False, device="meta")
        del self._parameters["weight"]
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.dtype = dtype
        self.spec = packed.spec()
        self.key = formats.spec_key(self.spec)
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def packed(self) -> Packed:
        """The packed weight, a view of the buffers."""
        return formats.build(self._tensors(), self.spec)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (N, K), made anew at each access."""
        return self.packed.unpack().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., K) to (..., N), in x's dtype, or in that of an enclosing autocast as `nn.Linear` does.

        Raises ValueError if x does not fit the weight.
        """
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} columns, but the packed layer has {self.in_features} inputs")
        # Not `kernels.apply`: it parses the key, which torch.compile cannot trace.
        y = torch.ops.lrec.matmul(x.reshape(-1, self.in_features), self._tensors(), self.key, False)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self) -> Tensor:
        """The decoded weight, under the name by which peft asks for it."""
        return self.weight

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A frozen `nn.Linear` of the decoded weight and the bias, in `dtype` (the layer's own if None)."""
        dtype = dtype or self.dtype
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.packed.unpack().to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=False)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Shape, format and bits per weight, as `print(model)` shows them."""
        settings = {k: v for k, v in self.spec.items() if k not in ("format", "shape", "tensors")}
        shown = ", ".join(f"{k}={v}" for k, v in settings.items())
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.spec['format']}({shown})"

    def _tensors(self) -> list[Tensor]:
        return [self._buffers[name] for name in self.spec["tensors"]]

    def _apply(self, fn, recurse=True):
        # `model.to(dtype)` must move scales and tables but never round them: they are part of the stored weight.
        held = {name: self._buffers[name] for name in self.spec["tensors"]}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, tensor in held.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self
