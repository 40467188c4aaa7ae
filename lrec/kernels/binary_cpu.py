"""Binary weights on the CPU in native code: the planes' bits are brought together to codes, which are looked up in the
2^P levels of their group.
"""

from lrec.kernels.native import NativeKernel, structure


class BinaryCPU(NativeKernel):
    """The decoded values are those of `Binary.unpack`, bit for bit."""

    format = "binary"

    structure = structure("group_size planes", "qweight", "alpha offset")

    @classmethod
    def numbers(cls, spec: dict) -> dict[str, int]:
        """The number of planes."""
        return {"planes": spec["tensors"]["qweight"][1][1]}
