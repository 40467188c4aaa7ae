"""Embeddings and head kept in the dtype they are stored in, while the blocks between them compute in a wider one.

A checkpoint's ends are bfloat16; widening them to float32 for a computation in float32 doubles the largest unpacked
tensors of the model and changes no value. Here the rows that a batch needs are widened, and the head by slices.
"""

import torch
from torch import Tensor, nn

from lrec.head import Head, output_layer


class StoredLinear(nn.Linear):
    """A frozen `nn.Linear` whose weight is cast to float32, or to x's dtype if wider, slice by slice."""

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., K) to (..., N) in x's dtype; not differentiable, since only the loss trains through a head.

        Equal to casting the whole weight first.
        """
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        return Head(weight, bias).logits(x.detach().flatten(0, -2)).unflatten(0, x.shape[:-1]).to(x.dtype)


def keep_stored(model: nn.Module, stored: torch.dtype) -> nn.Module:
    """The same frozen model with input embeddings and head in dtype `stored` (meta tensors too), tied if they were.

    What the embeddings give out is cast to the dtype they had. Raises ValueError if the model has no output layer.
    """
    embedding, head = model.get_input_embeddings(), output_layer(model)
    compute = embedding.weight.dtype
    if compute == stored:
        return model
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach().to(stored), requires_grad=False)
    embedding.register_forward_hook(lambda module, args, out: out.to(compute))
    narrow = StoredLinear(head.in_features, head.out_features, bias=False, device="meta")
    narrow.weight = embedding.weight if tied else nn.Parameter(head.weight.detach().to(stored), requires_grad=False)
    narrow.bias = head.bias
    model.set_output_embeddings(narrow.train(head.training))
    return model
