"""How much memory a run really took: resident bytes of the process on a CPU, the allocator's counters on a GPU."""

import gc
import re
from pathlib import Path

import torch

from lrec.stream import trim

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Peak memory from the making of this object on, above what was in use then (interpreter, libraries, data).

    On a CPU that is the resident set (Linux only; None elsewhere), with freed memory handed back first; on a GPU what
    torch allocated and reserved, without the context, which `device_total` has.
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
            self.start = resident("VmRSS")
            if CLEAR.exists():
                CLEAR.write_text("5")  # resets VmHWM, see proc(5)

    def peak(self) -> int | None:
        """Peak bytes since the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        now = resident("VmHWM")
        return None if now is None else now - self.start

    def report(self) -> dict:
        """The peak and, on a GPU, what the allocator reserved for it and what all processes use of the device."""
        found = {"measured_peak_bytes": self.peak()}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            found |= {"reserved_bytes": torch.cuda.max_memory_reserved(self.device), "device_total_bytes": total - free}
        return found


def resident(name: str) -> int | None:
    """Bytes of a line of /proc/self/status: VmRSS is in use now, VmHWM was at the most. None where there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.M) if STATUS.exists() else None
    return int(found[1]) * 1024 if found else None
