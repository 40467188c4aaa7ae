"""What a measurement was made on and with, and how much memory this process has used."""

import os
import platform
import re
import shutil
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


def free_bytes(device) -> int:
    """Bytes that a torch device has left: of a CPU's memory what Linux calls available, elsewhere all there is, and no
    more than a container's limit leaves."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    found = [about()["memory_bytes"]]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found += [int(n) * 1024 for n in re.findall(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.M)]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        found.append(int(most) - int(used.read_text()))
    return max(0, min(found))


def free_disk_bytes(path: Path) -> int:
    """Bytes that may still be written at a path, which need not exist yet."""
    absolute = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (absolute, *absolute.parents) if place.exists())).free


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
