"""Memory over the time of a run, sampled beside it: what `lrec report` draws against the predicted parts."""

import threading
import time
import weakref
from collections.abc import Callable

import psutil
import torch

SAMPLE_S = 0.1
MOST_POINTS = 240


class MemoryCurve:
    """Samples, from the making of this object on, the bytes in use above those of that moment: the resident set on a
    CPU, on a GPU what torch has allocated there.

    A thread reads them ten times a second and keeps the largest of each interval. When there are `MOST_POINTS` of
    them neighbours are joined, so that a night's run takes no more room than a minute's.
    """

    def __init__(self, device: torch.device):
        self.device = device.type
        self.points: list[tuple[float, int]] = []
        self._stopped = threading.Event()
        weakref.finalize(self, self._stopped.set)
        sampling = (self.points, used(device), self._stopped)
        self._thread = threading.Thread(target=sample, args=sampling, name="lrec-memory", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends the sampling, as the end of the object does."""
        self._stopped.set()
        self._thread.join()

    def told(self) -> dict:
        """`seconds` since the start, and the most `bytes` in use up to each since the one before; ends the sampling."""
        self.end()
        seconds, sizes = zip(*self.points, strict=True)
        return {"device": self.device, "seconds": list(seconds), "bytes": list(sizes)}


def used(device: torch.device) -> Callable[[], int]:
    """Tells the bytes in use above those of now, each time it is called."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    process = psutil.Process()
    before = process.memory_info().rss
    return lambda: process.memory_info().rss - before


def sample(points: list[tuple[float, int]], used: Callable[[], int], stopped: threading.Event) -> None:
    """Appends (seconds, most bytes) to `points` until it is told to stop, the last interval's included."""
    start, interval_s, most = time.monotonic(), SAMPLE_S, used()
    last, ended = 0.0, False
    while not ended:
        ended = stopped.wait(SAMPLE_S)
        now, most = time.monotonic() - start, max(most, used())
        if ended or now - last >= interval_s:
            points.append((round(now, 2), most))
            last, most = now, 0
        if len(points) == MOST_POINTS:
            points[:] = [(b[0], max(a[1], b[1])) for a, b in zip(points[::2], points[1::2], strict=True)]
            interval_s *= 2
