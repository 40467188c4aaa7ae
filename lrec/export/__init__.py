"""What others can load: one target a file, each an `Export` that writes a directory from base and adapter.

A target is a frozen dataclass whose fields are its settings.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lrec import registry


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export target. `write` fills an empty directory; the caller makes it appear whole or not at all."""

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """Writes the files and returns what to report. Raises ValueError if the target cannot hold the model."""
        raise NotImplementedError


Base = Export


def find(name: str) -> type[Export]:
    """The target of this name, with hyphens or underscores. Raises ValueError naming the nearest if there is none."""
    return registry.find("export", name.replace("-", "_"))


def export(target: Export, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
    """Writes one export into a new directory, which appears only when it is complete.

    Raises ValueError for a directory that is not empty, or a model the target cannot hold.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty; choose another output_dir or remove it (nothing was changed)")
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        report = target.write(Path(model_dir), adapter_dir and Path(adapter_dir), partial)
        if output_dir.exists():
            output_dir.rmdir()
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "format": registry.name_of(type(target)),
        "output_dir": str(output_dir),
        "total_bytes": sum(p.stat().st_size for p in output_dir.iterdir()),
    } | report
