"""One run in a directory at a time.

The lock is the operating system's, on a file beside the directory (`.NAME.lock`), so it ends with the process that
holds it, however that ends, and a file left behind by a killed run locks nothing. The file says who holds it.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lrec import processes


@contextmanager
def held(directory: str | Path) -> Iterator[None]:
    """Inside, no other process gets in for this directory. Raises ValueError that says who is in, if somebody is.

    Of a run in several processes the first one holds the lock for all.
    """
    if not processes.is_main():
        yield
        return
    directory = Path(directory).absolute()
    path = directory.with_name(f".{directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{directory} is being written by {_holder(path)}; wait for it, stop it, or choose another output_dir"
        ) from error
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "command": " ".join(sys.argv)[:200]}))
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who has opened it before finds it gone, and makes another
        lock.release()


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text())
        return f"process {told['pid']} ({told['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # just now it is being written
        return "another process"


def alone(run: Callable) -> Callable:
    """A method `run` that holds the lock of `self.output_dir` while it works."""

    @functools.wraps(run)
    def locked(self, *args, **kwargs):
        with held(self.output_dir):
            return run(self, *args, **kwargs)

    return locked
