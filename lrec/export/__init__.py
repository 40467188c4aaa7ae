"""What others can load: one target a file, each an `Export` that writes a directory from base and adapter.

A target is a frozen dataclass whose fields are its settings. Before an export appears it can be checked: loaded again
by the tool it is for, where that is installed, its logits are compared with those of base and adapter.
"""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import export_record, load, lock, record, registry
from lrec.report import packed_config

PROBE = "The capital of France is Paris, and 17 times 3 is 51. In the beginning there was nothing but"


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export target. `write` fills an empty directory; the caller makes it appear whole or not at all."""

    # Packages that must be there to read the export, and the relative error of logits that is then allowed.
    readers: ClassVar[tuple[str, ...]] = ("transformers",)
    tolerance: ClassVar[float] = 1e-3
    # Whether another tool's format leaves no room for what it was made of, so that this goes into a file beside it.
    recorded: ClassVar[bool] = True

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """Writes the files and returns what to report. Raises ValueError if the target cannot hold the model."""
        raise NotImplementedError

    def absent(self) -> list[str]:
        """Packages without which `logits` cannot read the export."""
        return [name for name in self.readers if importlib.util.find_spec(name) is None]

    def logits(self, output_dir: Path, model_dir: Path, ids: Tensor) -> Tensor:
        """What the export's own reader makes of `ids` (1, L): (1, L, V). `model_dir` is the base."""
        return load.model(str(output_dir), None, "cpu", "float32")(ids).logits


Base = Export


def find(name: str) -> type[Export]:
    """The target of this name, with hyphens or underscores. Raises ValueError naming the nearest if there is none."""
    return registry.find("export", name.replace("-", "_"))


def export(target: Export, model_dir: Path, adapter_dir: Path | None, output_dir: Path, checked: bool = False) -> dict:
    """Writes one export into a new directory, which appears only when it is complete and, if asked for, checked.

    Raises ValueError for a directory that is not empty, or a model the target cannot hold.
    """
    with lock.held(output_dir):
        return _export(target, Path(model_dir), adapter_dir and Path(adapter_dir), Path(output_dir), checked)


def _export(target: Export, model_dir: Path, adapter_dir: Path | None, output_dir: Path, checked: bool) -> dict:
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty; choose another output_dir or remove it (nothing was changed)")
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        report = target.write(model_dir, adapter_dir, partial)
        if checked:
            report |= check(target, model_dir, adapter_dir, partial)
        if target.recorded:
            measured = record.rows(adapter_dir or model_dir)
            name = registry.name_of(type(target))
            export_record.write(partial, name, packed_config(model_dir), measured, report)
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


@torch.no_grad()
def check(target: Export, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
    """How far the export's logits, by its own reader, are from ours, and who read it; or which readers are not here.

    Raises ValueError if they are further apart than the target's tolerance.
    """
    if absent := target.absent():
        return {"checked": f"no: {', '.join(absent)} not installed"}
    ids = load.tokenizer(str(model_dir))(PROBE, return_tensors="pt").input_ids
    expected = load.model(str(model_dir), adapter_dir and str(adapter_dir), "cpu", "float32")(ids).logits
    found = target.logits(output_dir, model_dir, ids)
    error = float((found - expected).norm() / expected.norm())
    if not error <= target.tolerance:
        raise ValueError(
            f"the export, read again by {', '.join(target.readers)}, gives logits {error:.3g} from ours (allowed: "
            f"{target.tolerance:g}); nothing was written"
        )
    return {"checked": f"by {', '.join(target.readers)}", "logits_error": error}
