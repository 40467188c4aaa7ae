"""Token embeddings that stay in CPU memory while the model runs elsewhere: a batch needs a few rows of the table.

The table of Llama-3 8B is 1 GB in bfloat16; 512 tokens need 4 MB of it. It is frozen, so only rows travel, one way.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from lrec.head import output_layer
from lrec.nn import PackedEmbedding

PLACES = ("device", "cpu")


class OnCPU:
    """Mixed into an embedding's class: the table is a buffer that never leaves the CPU, rows go to `device`, which is
    where the module was, or has been moved to since."""

    device: torch.device

    def forward(self, input_ids: Tensor) -> Tensor:
        """What the embedding's own class makes of the tokens, on the CPU, then moved to `device`."""
        return super().forward(input_ids.to("cpu")).to(self.device)

    def _apply(self, fn, recurse=True):
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.device))
        self.device = probe.device
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), recurse)


@functools.cache
def _on_cpu(cls: type) -> type:
    return type(f"{cls.__name__}OnCPU", (OnCPU, cls), {})


def keep_on_cpu(model: nn.Module) -> None:
    """Moves the table of a model's token embeddings to CPU memory, under the name it had in the state dict.

    Values, dtype and state dict do not change; the table is a buffer from now on, so it is never trained, and the
    model's first parameter is one of its blocks'. Warns and does nothing if the head uses the same table, which the
    device then needs anyway. Raises ValueError if the embedding is no `nn.Embedding`, is packed, or is trained.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, OnCPU):
        return
    if isinstance(embedding, PackedEmbedding):
        raise ValueError("embeddings=cpu moves a table of full precision, but this model's is packed; leave it out")
    if not isinstance(embedding, nn.Embedding) or embedding.weight.requires_grad:
        raise ValueError(
            f"embeddings=cpu needs a frozen nn.Embedding, but the model's is a {type(embedding).__name__}"
            f"{' that is trained' if isinstance(embedding, nn.Embedding) else ''}; use embeddings=device"
        )
    if getattr(output_layer(model), "weight", None) is embedding.weight:
        warnings.warn(
            "embeddings=cpu saves nothing here: the head is tied to the embeddings and needs their table on the "
            "device, so rows are looked up there and no second copy is made",
            stacklevel=2,
        )
        return
    table = embedding._parameters.pop("weight").detach()
    # The class changes and the module stays, as in torch.nn.utils.parametrize: hooks and own arithmetic live on.
    embedding.__class__ = _on_cpu(type(embedding))
    embedding.device = table.device
    for name, buffer in embedding.named_buffers(recurse=False):
        embedding._buffers[name] = buffer.cpu()
    embedding.register_buffer("weight", table.cpu())
