"""The text that a model is quantized with, and which part of it is this process's."""

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from lrec import processes


@dataclass(frozen=True)
class Calibration:
    """The text a model is quantized with: `input_ids` (samples, length), and what to call it in reports."""

    input_ids: Tensor
    about: dict = field(default_factory=dict)

    def own(self, batch_size: int) -> slice:
        """The windows of this process: whole batches, so that they run as they would in a single one.

        Raises ValueError if there are fewer batches than processes."""
        num_batches, several = -(-len(self.input_ids) // batch_size), processes.count()
        if num_batches < several:
            raise ValueError(
                f"{num_batches} batches of {batch_size} calibration windows cannot be divided among {several} "
                "processes: take more windows (--num_samples), a smaller batch_size, or fewer processes"
            )
        batches = processes.own(num_batches)
        return slice(batches.start * batch_size, batches.stop * batch_size)

    def sha256(self) -> str:
        """Identity of the windows."""
        return hashlib.sha256(self.input_ids.numpy().tobytes()).hexdigest()
