"""What was measured on this GPU: the Config of each shape, and from how many rows of x slabs are faster.

`lrec bench kernels --device cuda` measures and records it under ~/.cache/lrec/gpu.json, by device and triton version,
with the date. Nothing is measured while a model runs: what is not recorded there has a default, and `lrec explain` says
so.
"""

import json
import os
import warnings
from dataclasses import astuple, fields
from datetime import date
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

import torch

from lrec.kernels.gpu import tiling
from lrec.kernels.gpu.tiling import Config, Weight

# Where tiles hold few rows of x, the weight is read again for the next ones.
DEFAULT_GRADIENT_CROSSOVER = tiling.GRADIENT_COLUMNS


def path() -> Path:
    """The file of measurements of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrec" / "gpu.json"


def device() -> str:
    """What measurements hold for: the GPU and the compiler."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, triton {metadata.version('triton')}"


@lru_cache(maxsize=4096)
def config(weight: Weight, num_rows: int, transpose: bool = False) -> Config:
    """The fastest Config that was measured for this shape on this device, or else the default."""
    found = _measured(path(), device()).get("configs", {}).get(shape_class(weight, num_rows, transpose))
    default = tiling.default_gradient if transpose else tiling.default
    return Config(*found) if found else default(weight, num_rows)


def crossover(weight: Weight, transpose: bool = False) -> tuple[int, str]:
    """Up to how many rows of x the fused product serves, and where that was measured, in words."""
    measured = _measured(path(), device())
    rows = measured.get("crossover_rows", {}).get(kind(weight, transpose))
    if rows is None:
        default = DEFAULT_GRADIENT_CROSSOVER[weight.bits] if transpose else weight.default_crossover
        return default, "not measured on this GPU; `lrec bench kernels --device cuda` measures it"
    return rows, f"measured on {device()} on {measured['date']}"


def record(configs: dict[str, Config], crossover_rows: dict[str, int]) -> Path:
    """Adds measurements made today on this device to the file; returns its path."""
    file, everything = path(), _read(path())
    mine = everything.setdefault(device(), {"configs": {}, "crossover_rows": {}})
    mine["date"] = date.today().isoformat()
    mine["configs"] |= {key: astuple(value) for key, value in configs.items()}
    mine["crossover_rows"] |= crossover_rows
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(everything, indent=1))
    partial.replace(file)
    forget()
    return file


def forget() -> None:
    """Reads the file again when it is next asked."""
    _measured.cache_clear()
    config.cache_clear()


def kind(weight: Weight, transpose: bool = False) -> str:
    """A format and its width, and whether gradients: what a crossover holds for."""
    return f"{weight.format} {weight.bits * weight.planes}-bit{' gradient' if transpose else ''}"


def shape_class(weight: Weight, num_rows: int, transpose: bool = False) -> str:
    """What a Config holds for: format, width, direction, group, tables, shape, and rows up to a power of two."""
    (N, K), tables = weight.shape, f" tables of {weight.table_size}" if weight.table_size else ""
    rows = 1 << max(0, num_rows - 1).bit_length()
    return f"{kind(weight, transpose)} g{weight.group_size}{tables} {N}x{K} rows {rows}"


@cache
def _measured(file: Path, device_name: str) -> dict:
    return _read(file).get(device_name, {})


def _read(file: Path) -> dict:
    """What the file holds, by device; nothing, and a warning, if that is not what `record` writes."""
    try:
        everything = json.loads(file.read_text())
        wrong = _wrong(everything)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # not UTF-8 and not JSON are ValueErrors too
        wrong = str(error)
    if wrong:
        warnings.warn(
            f"lrec: {file} does not hold measurements of kernels ({wrong}), so defaults serve; `lrec bench kernels "
            "--device cuda` measures anew and replaces it",
            stacklevel=2,
        )
        return {}
    return everything


def _wrong(everything) -> str | None:
    if not isinstance(everything, dict):
        return f"a {type(everything).__name__}, not an object"
    for name, mine in everything.items():
        if not (isinstance(mine, dict) and isinstance(mine.get("date"), str)):
            return f"no date for {name!r}"
        configs, rows = mine.get("configs", {}), mine.get("crossover_rows", {})
        if not (isinstance(configs, dict) and all(_is_config(value) for value in configs.values())):
            return f"configs of {name!r}"
        if not (isinstance(rows, dict) and all(type(value) is int and value >= 0 for value in rows.values())):
            return f"crossovers of {name!r}"
    return None


def _is_config(value) -> bool:
    """Whether a kernel can be launched so: powers of two in the ranges that `tiling` makes, whoever wrote them."""
    if not (isinstance(value, list) and len(value) == len(fields(Config)) and all(type(v) is int for v in value)):
        return False
    BN, KP, num_warps, num_stages, splits = value
    powers = all(v > 0 and v & (v - 1) == 0 for v in (BN, KP, num_warps))
    return powers and 16 <= BN <= 256 and 16 <= KP <= 64 and num_warps <= 8 and 1 <= num_stages <= 8 and splits >= 1
