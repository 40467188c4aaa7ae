"""What an export was made of, kept beside it in a file of its own.

The formats of other tools have no place for the base, its quality and how it was quantized, which a model card tells;
and with the hash of each weight file, no card is ever pushed with weights it does not speak of.
"""

from pathlib import Path
from typing import Any

import lrec
from lrec import checkpoint, documents

FILE = "lrec_export.json"
WEIGHTS = ("*.safetensors", "*.gguf")


class Exported(documents.Manifest):
    """lrec_export.json."""

    format: str
    lrec: str
    method: str | None
    settings: dict[str, Any] | None
    meta: documents.Meta
    bits: list[documents.Count]
    evaluation: list[documents.Evaluated]
    export: dict[str, Any]


def write(directory: Path, format: str, quantization: dict, measured: list[dict], found: dict) -> None:
    """Writes it beside complete weights.

    quantization: that of the packed model's config. measured: what was measured of that model, with its adapter if
    that went in. found: what the export reported.
    """
    about = {key: quantization.get(key) for key in ("method", "settings", "meta")}
    about["meta"] = about["meta"] or {}
    specs = [entry["spec"] for entry in quantization.get("layers") or []]
    files = {path.name: checkpoint.file_entry(path) for path in weight_files(directory)}
    value = {
        "format_version": checkpoint.FORMAT_VERSION,
        "lrec": lrec.__version__,
        "format": format,
        **about,
        "bits": sorted({spec["bits"] for spec in specs if "bits" in spec}),
        "evaluation": measured,
        "export": found,
        "files": files,
    }
    checkpoint.write_json(directory / FILE, value)


def read(directory: Path) -> Exported:
    """What was written. Raises ValueError for weights that are damaged, or others than those it was written for."""
    told = documents.read(directory / FILE, Exported)
    checkpoint.verify_files(directory, told, weight_files(directory), FILE)
    return told


def weight_files(directory: Path) -> list[Path]:
    """All of a directory's files of weights, of any tool's format."""
    return sorted(path for pattern in WEIGHTS for path in directory.glob(pattern))
