"""A safetensors file part by part, as it is written: safetensors' own `save` holds all tensors twice more."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

# The names that the format gives to dtypes, in the order in which safetensors lets tensors stand.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def parts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Length and header, then each tensor's bytes; one that is not contiguous, or not on the CPU, is copied alone.

    Raises ValueError for a dtype that is not written here.
    """
    if odd := {str(t.dtype) for t in tensors.values() if t.dtype not in DTYPES}:
        raise ValueError(f"tensors of {', '.join(sorted(odd))} are not stored; allowed: {', '.join(map(str, DTYPES))}")
    rank = {dtype: i for i, dtype in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header, end = {"__metadata__": metadata}, 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield memoryview(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
