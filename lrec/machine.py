"""What a measurement was made on and with, and how much memory this process has used."""

import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

from lrec import __version__

LIBRARIES = ("torch", "transformers")


def about() -> dict:
    """Processor, cores this process may use, threads of torch, memory, and the first GPU if there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads(), "system": platform.system()}
    if hasattr(os, "sysconf"):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Of lrec, of Python and of the libraries whose version changes numbers."""
    return {"lrec": __version__, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def peak_bytes(device) -> int:
    """The most memory this process has held at once on a torch device, a GPU's being what torch allocated there.

    On Linux from /proc: `getrusage` there counts what the parent held when it started this process.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
