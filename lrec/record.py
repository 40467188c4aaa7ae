"""Measured quality, kept beside the weights that it was measured on.

`lrec evaluate --record` writes it and a model card tells it. The file names the weights by their hash, so that what was
measured on others is never told of these.
"""

from pathlib import Path

from lrec import checkpoint, documents

FILE = "lrec_evaluation.json"
# What makes two measurements the same one, made again.
SAME = ("dataset", "num_samples", "max_length", "teacher")


def weights_sha256(directory: Path) -> str:
    """The identity of a model's weight files, or of an adapter's."""
    adapter = directory / "adapter_model.safetensors"
    return checkpoint.file_hash(adapter) if adapter.exists() else checkpoint.fingerprint(directory)


def rows(directory: Path) -> list[dict]:
    """What was measured on the weights that are there now, oldest first; empty if nothing was."""
    if not (directory / FILE).exists():
        return []
    kept = checkpoint.read_json(directory / FILE, documents.Record)
    return kept["rows"] if kept["weights_sha256"] == weights_sha256(directory) else []


def add(directory: Path, row: dict) -> None:
    """Keeps a measurement, in the place of an earlier one of the same text and teacher."""
    kept = [old for old in rows(directory) if any(old.get(key) != row.get(key) for key in SAME)]
    value = {"weights_sha256": weights_sha256(directory), "rows": [*kept, row]}
    checkpoint.write_json(directory / FILE, value)
