"""What others can load: one target a file, each an `Export` that writes a directory from base and adapter."""

import shutil
from pathlib import Path

from lrec import registry


class Export:
    """One export target. `write` fills an empty directory; the caller makes it appear whole or not at all."""

    @classmethod
    def write(cls, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """Writes the files and returns what to report. Raises ValueError if the target cannot hold the model."""
        raise NotImplementedError


Base = Export


def export(format: str, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
    """Writes one export into a new directory, which appears only when it is complete.

    Raises ValueError for an unknown format, a directory that is not empty, or a model the target cannot hold.
    """
    target = registry.find("export", format)
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
        "format": format,
        "output_dir": str(output_dir),
        "total_bytes": sum(p.stat().st_size for p in output_dir.iterdir()),
    } | report
