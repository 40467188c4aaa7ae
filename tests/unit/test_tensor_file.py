"""Files written part by part are those that safetensors writes, byte for byte."""

import pytest
import torch
from safetensors.torch import load_file, save

from lrec import checkpoint, tensor_file


def test_the_bytes_are_those_of_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {f"of.{name}": (torch.randn(3, 5) * 9).to(dtype) for dtype, name in tensor_file.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.empty(0, 7), 'a "name" é': torch.arange(4)}
    metadata = {"format": "pt"}
    assert b"".join(tensor_file.parts(tensors, metadata)) == save(tensors, metadata=metadata)
    turned = tensors | {"turned": torch.arange(12.0).view(3, 4).t()[1:], "frozen": torch.nn.Parameter(torch.ones(2))}
    checkpoint.write_tensors(tmp_path / "file.safetensors", turned, {"more": "said"})
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == turned.keys() and all(torch.equal(found[name], turned[name]) for name in turned)


def test_a_dtype_that_is_not_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64 are not stored; allowed: torch"):
        checkpoint.write_tensors(tmp_path / "file.safetensors", {"c": torch.ones(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())
