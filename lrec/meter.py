"""How much memory a run really took: resident bytes of the process on a CPU, the allocator's counters on a GPU."""

import gc
from pathlib import Path

import torch

from lrec import machine
from lrec.stream import trim

CLEAR = Path("/proc/self/clear_refs")


class Meter:
    """Peak memory from the making of this object on, above what was in use then (interpreter, libraries, data).

    On a CPU that is the resident set, with freed memory handed back first (elsewhere than on Linux: above the peak so
    far); on a GPU what torch allocated, without the context, which is in `device_total_bytes`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        trim()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.start = 0
        else:
            if CLEAR.exists():
                CLEAR.write_text("5")  # brings the peak so far down to what is in use now, see proc(5)
            self.start = machine.peak_bytes(device)

    def peak(self) -> int:
        """Peak bytes since the start."""
        return machine.peak_bytes(self.device) - self.start

    def report(self) -> dict:
        """The peak and, on a GPU, what the allocator reserved for it and what all processes use of the device."""
        found = {"measured_peak_bytes": self.peak()}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            found |= {"reserved_bytes": torch.cuda.max_memory_reserved(self.device), "device_total_bytes": total - free}
        return found
