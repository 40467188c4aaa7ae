"""Codebook weights on the CPU in native code: the 4, 8 or 16 levels of a run of columns stand in one or two registers,
where a permutation looks codes up; scales are multiplied into the levels, not into the weights.
"""

from functools import cache

import torch

from lrec.formats.codebook import dynamic_levels
from lrec.kernels.native import NativeKernel, structure


class CodebookCPU(NativeKernel):
    """The decoded values are those of `Codebook.unpack`, bit for bit."""

    format = "codebook"

    structure = structure(
        "group_size block_size bits row_step group_step", "qweight levels", "table scale scale_scale scale_offset"
    )

    @classmethod
    def numbers(cls, spec: dict) -> dict[str, int]:
        """Steps from one row's or group's table to the next, 0 where one serves all; the levels of 8-bit scales."""
        *tables, L = spec["tensors"]["table"][1]
        steps = {"group_step": L if len(tables) == 2 else 0, "row_step": L * tables[1] if len(tables) == 2 else L}
        return (steps if tables else {"group_step": 0, "row_step": 0}) | {"levels": levels().data_ptr()}


@cache
def levels() -> torch.Tensor:
    """float32 (256,): `dynamic_levels`, kept for as long as views point at it."""
    return torch.tensor(dynamic_levels(), dtype=torch.float32)
