"""Layers whose weight is packed: an `nn.Linear`, an `nn.Embedding`, and an output head that shares the embeddings'.

They *are* an `nn.Linear` and an `nn.Embedding` so that transformers, peft and trl treat them as such; their `weight` is
a property that decodes, uncached, for the few places that ask. The packed tensors are buffers, `qweight` first (peft
moves adapters to that buffer's device), so they are saved, loaded and moved like any others. Codes are never trained;
floats are where `train_fields` has made parameters of them (see lrec.trained).
"""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lrec import formats, kernels
from lrec.formats import Packed
from lrec.kernels import LowRank


@torch.library.custom_op("lrec::rows", mutates_args=())
def _rows(index: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    return formats.build(tensors, formats.parse_key(spec)).unpack(index)


@_rows.register_fake
def _(index: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    return index.new_empty(index.shape[0], formats.parse_key(spec)["shape"][1], dtype=torch.float32)


class PackedModule(nn.Module):
    """What the layers below share: `packed` is the weight, `spec` its description, `dtype` that of decoded weights."""

    visit: Callable[[], None] | None = None  # brings the packed tensors in before they are used, see lrec.offload
    trained: tuple[str, ...] = ()  # fields that are parameters now

    def _hold(self, packed: Packed, dtype: torch.dtype) -> None:
        """Takes over the tensors of `packed` without copying, in the place of the parameter `weight`."""
        del self._parameters["weight"]
        self.dtype, self.spec = dtype, {"tensors": {}}
        self.become(packed)

    def hold(self, tensors: dict[str, Tensor]) -> None:
        """Other tensors in the place of those held, by field name; nothing here keeps the old ones."""
        self._buffers.update(tensors)
        self._made = (None, None)

    def become(self, packed: Packed) -> None:
        """Another packed weight of the same shape, frozen, in the place of this one; takes its tensors over."""
        for name in self.spec["tensors"]:
            self._buffers.pop(name, None)
            self._parameters.pop(name, None)
        self.trained = ()
        self.spec, self.key = packed.spec(), packed.key
        self._made = (list(packed.tensors().values()), packed)
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)

    def train_fields(self, fields: Sequence[str]) -> None:
        """Makes float32 parameters of these trainable fields, which then get gradients."""
        self.become(self.packed.widened(fields))
        for name in fields:
            self._parameters[name] = nn.Parameter(self._buffers.pop(name))
        self.trained = tuple(fields)

    @property
    def packed(self) -> Packed:
        """The packed weight, a view of the buffers: the same object as long as they are the same. No gradient flows
        through it into trained fields."""
        tensors, (made_of, packed) = self.op_tensors(), self._made
        if made_of is None or not all(map(operator.is_, tensors, made_of)):
            packed = formats.build_by_key([t.detach() if t.requires_grad else t for t in tensors], self.key)
            self._made = (tensors, packed)
        return packed

    @property
    def weight(self) -> Tensor:
        """The decoded weight (N, K), made anew at each access."""
        return self.packed.unpack().to(self.dtype)

    def dequantize(self) -> Tensor:
        """The decoded weight, under the name by which peft asks for it."""
        return self.weight

    def extra_repr(self) -> str:
        """Shape, format and settings, as `print(model)` shows them."""
        settings = {k: v for k, v in self.spec.items() if k not in ("format", "shape", "tensors")}
        shown = ", ".join(f"{k}={v}" for k, v in settings.items())
        return f"{self._shape_repr()}, {self.spec['format']}({shown})"

    def op_tensors(self) -> list[Tensor]:
        """The packed tensors in the order in which the op lrec::matmul takes them."""
        if self.visit is not None:
            self.visit()
        held = self._buffers | self._parameters if self.trained else self._buffers
        return [held[name] for name in self.spec["tensors"]]

    def _apply(self, fn, recurse=True):
        # `model.to(dtype)` must move scales and tables but never round them: they are part of the stored weight.
        held = {name: self._buffers[name] for name in self.spec["tensors"] if name in self._buffers}
        trained = {name: self._parameters[name].data for name in self.trained}
        super()._apply(fn, recurse)
        self._made = (None, None)  # keeps nothing alive that was moved away
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, tensor in held.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        for name, tensor in trained.items():
            moved = self._parameters[name]
            if moved.dtype != tensor.dtype:
                moved.data = tensor.to(moved.device)
        return self


class PackedLinear(PackedModule, nn.Linear):
    """y = x W^T + b with W packed."""

    def __init__(self, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype = torch.float32):
        """Takes over the tensors of `packed` and `bias` without copying. Raises nothing."""
        N, K = packed.shape
        super().__init__(K, N, bias=False, device="meta")
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._hold(packed, dtype)

    def forward(self, x: Tensor, added: LowRank | None = None) -> Tensor:
        """x of shape (..., K) to (..., N), in x's dtype, or in that of an enclosing autocast as `nn.Linear` does.

        `added` is added to the product of the rows of x, by the kernel that makes it where that can; no gradient flows
        through it. Raises ValueError if x does not fit the weight.
        """
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        self.check(x)
        x_TK = x.reshape(-1, self.in_features)
        if plain(x) and not (self.trained and torch.is_grad_enabled()):
            y = kernels.multiply(x_TK, self.packed, added=added)
        else:  # not `kernels.apply`: it parses the key, which torch.compile cannot trace
            y = torch.ops.lrec.matmul(x_TK, self.op_tensors(), self.key, False)
            y = y if added is None else added.add_to(y)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def check(self, x: Tensor) -> None:
        """Raises ValueError if x has another number of columns than the weight."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} columns, but the packed layer has {self.in_features} inputs")

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A frozen `nn.Linear` of the decoded weight and the bias, in `dtype` (the layer's own if None)."""
        dtype = dtype or self.dtype
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.packed.unpack().to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=False)
        return dense.train(self.training)

    def _shape_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class PackedEmbedding(PackedModule, nn.Embedding):
    """y = W[ids] with W (V, H) packed: only the rows asked for are decoded."""

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float32):
        """Takes over the tensors of `packed`. Raises ValueError for a format whose single rows cannot be decoded."""
        if packed.name() != "uniform":
            raise ValueError(f"embeddings are packed in the uniform format, not in {packed.name()}")
        V, H = packed.shape
        super().__init__(V, H, device="meta")
        self._hold(packed, dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids of any shape to (..., H) in `dtype`. Raises IndexError for an id that is no row."""
        # An op of its own, since torch.compile cannot trace how a Packed is built.
        rows = torch.ops.lrec.rows(input_ids.flatten(), self.op_tensors(), self.key).to(self.dtype)
        return rows.view(*input_ids.shape, self.embedding_dim)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A frozen `nn.Embedding` of the decoded weight, in `dtype` (the layer's own if None)."""
        weight = self.packed.unpack().to(dtype or self.dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True).train(self.training)

    def _shape_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class TiedLinear(PackedLinear):
    """An output head y = x W^T + b whose W is that of a `PackedEmbedding`.

    It asks the embedding for its tensors and holds none: there is one copy in memory and in every file, and nothing
    that could come apart when a model is moved, saved or loaded.
    """

    def __init__(self, source: PackedEmbedding, bias: Tensor | None = None):
        super().__init__(source.packed, bias, source.dtype)
        for name in self.spec["tensors"]:
            del self._buffers[name]
        # In a list, so that the embedding does not become a module of this one.
        self._source = [source]

    @property
    def qweight(self) -> Tensor:
        """The embedding's."""
        return self._source[0].qweight

    def forward(self, x: Tensor) -> Tensor:
        """As a `PackedLinear`, on the embedding's device."""
        return super().forward(x.to(self.qweight.device))

    def op_tensors(self) -> list[Tensor]:
        """The embedding's."""
        return self._source[0].op_tensors()


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """The packed layers of a model by name; a head that shares the embeddings' tensors is not one of its own."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    return {name: module for name, module in modules.items() if not isinstance(module, TiedLinear)}


def replace(model: nn.Module, name: str, packed: Packed) -> PackedModule:
    """Puts a packed layer in the place of the linear layer or embedding of that name, and returns it; a bias stays."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        layer = PackedEmbedding(packed, module.weight.dtype)
    else:
        layer = PackedLinear(packed, None if module.bias is None else module.bias.detach(), module.weight.dtype)
    model.set_submodule(name, layer)
    return layer


def plain(x: Tensor) -> bool:
    """Whether the op's body serves in its place: x is `undisturbed` and asks for no gradient.

    A token of a 135M model makes 210 products, and passing through the op takes 11 us each, as much as multiplying.
    """
    return undisturbed(x) and not (x.requires_grad and torch.is_grad_enabled())


def undisturbed(x: Tensor) -> bool:
    """Whether x holds data and nobody traces or intercepts."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
