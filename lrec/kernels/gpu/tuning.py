"""What was measured on this GPU: the Config of each shape, and from how many rows of x slabs are faster.

`lrec bench kernels --device cuda` measures and records it under ~/.cache/lrec/gpu.json, by device and triton version,
with the date. Nothing is measured while a model runs: what is not recorded there has a default, and `lrec explain` says
so.
"""

import json
import os
from dataclasses import astuple
from datetime import date
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

import torch

from lrec.kernels.gpu import tiling
from lrec.kernels.gpu.tiling import Config, Weight

# By bits a code; where tiles hold few rows of x, the weight is read again for the next ones.
DEFAULT_CROSSOVER = {1: 16, 2: 64, 3: 16, 4: 64, 8: 64}


def path() -> Path:
    """The file of measurements of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrec" / "gpu.json"


def device() -> str:
    """What measurements hold for: the GPU and the compiler."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, triton {metadata.version('triton')}"


@lru_cache(maxsize=4096)
def config(weight: Weight, num_rows: int) -> Config:
    """The fastest Config that was measured for this shape on this device, or else the default."""
    found = _measured(path(), device()).get("configs", {}).get(shape_class(weight, num_rows))
    return Config(*found) if found else tiling.default(weight, num_rows)


def crossover(weight: Weight) -> tuple[int, str]:
    """Up to how many rows of x the fused product serves, and where that was measured, in words."""
    measured = _measured(path(), device())
    rows = measured.get("crossover_rows", {}).get(kind(weight))
    if rows is None:
        return DEFAULT_CROSSOVER[
            weight.bits
        ], "not measured on this GPU; `lrec bench kernels --device cuda` measures it"
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


def kind(weight: Weight) -> str:
    """A format and its width: what a crossover holds for."""
    return f"{weight.format} {weight.bits * weight.planes}-bit"


def shape_class(weight: Weight, num_rows: int) -> str:
    """What a Config holds for: format, width, group, shape, and rows up to a power of two."""
    N, K = weight.shape
    return f"{kind(weight)} g{weight.group_size} {N}x{K} rows {1 << max(0, num_rows - 1).bit_length()}"


@cache
def _measured(file: Path, device_name: str) -> dict:
    return _read(file).get(device_name, {})


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); remove it, and what was measured is measured again") from error
