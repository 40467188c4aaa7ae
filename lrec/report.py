"""What can be told of a packed model from its files alone: what it holds, and which kernels would run it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lrec import anatomy, checkpoint, documents, formats, kernels, registry, text
from lrec.options import setting

# What `lrec explain` asks for: rows of x, and whether for a gradient. A token, a batch of them, a prompt, a step.
ASKED_ROWS = ((1, False), (16, False), (64, False), (1024, False), (16, True), (1024, True))


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """`lrec inspect`: bits, bytes and layers of a packed model."""

    model: str = field(metadata={"help": "packed model"})

    def run(self) -> dict:
        """Totals of the blocks, bytes of the whole, and a row per packed layer, embeddings and head included."""
        directory = text.model_path(self.model)
        config = packed_config(directory)
        rows = []
        for entry in config["layers"]:
            spec = entry["spec"]
            stored = sum(_bytes(dtype, shape) for dtype, shape in spec["tensors"].values())
            rows += [layer_row(name, spec, stored) for name in entry["modules"]]
        inside = [row for row in rows if anatomy.in_block(row["name"])]
        weights = sum(row["shape"][0] * row["shape"][1] for row in inside)
        if not weights:
            raise ValueError(f"{directory / 'config.json'} names no packed layer of a block; quantize the model again")
        dense = dense_block_weights(directory, {row["name"] for row in inside})
        meta = config.get("meta", {})
        return {
            "model": str(directory),
            "method": config.get("method"),
            "base_model": meta.get("base_model"),
            "packed_sha256": meta.get("packed_sha256"),
            "bits_per_weight": 8 * sum(row["bytes"] for row in inside) / weights,
            "total_bytes": checkpoint.weights_bytes(directory),
            "quantized_share": weights / (weights + dense),
            "num_layers": len(inside),
            "layers": sorted(rows, key=lambda row: by_numbers(row["name"])),
        }


@dataclass(frozen=True, kw_only=True)
class Explain:
    """`lrec explain`: the kernel that serves each kind of layer, and why each faster one stands aside."""

    model: str = field(metadata={"help": "packed model"})
    device: str = setting("auto", "device to explain for")
    dtype: str = setting("auto", "dtype of the activations")
    activation_bits: int | None = setting(None, "8: activations are rounded, as by LREC_ACTIVATION_BITS=8")

    def run(self) -> dict:
        """A row per kind of layer, number of rows and direction."""
        from lrec import load

        kernels.round_activations(self.activation_bits)
        device = load.device_of(self.device)
        dtype = load.dtype_of(self.dtype, device)
        rows = []
        for entry in packed_config(text.model_path(self.model))["layers"]:
            for num_rows, transpose in ASKED_ROWS:
                call = kernels.Call(device.type, dtype, num_rows, transpose)
                name, aside = kernels.explain(call, entry["spec"])
                chosen = registry.find("kernels", name).chosen(call, entry["spec"])
                rows.append(
                    {
                        "format": entry["spec"]["format"],
                        "shape": entry["spec"]["shape"],
                        "layers": len(entry["modules"]),
                        "rows": num_rows,
                        "direction": "backward" if transpose else "forward",
                        "kernel": name,
                        "chosen": chosen or "",
                        "stood_aside": "; ".join(f"{k}: {v}" for k, v in aside.items()),
                    }
                )
        return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "layers": rows}


def table(rows: list[dict]) -> list[str]:
    """Rows as lines of aligned columns."""
    text = [
        [f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()]
        for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]
    ]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in text]


def packed_config(directory: Path) -> dict:
    """The quantization config of a packed model. Raises ValueError if the model is not packed by lrec."""
    config = checkpoint.read_json(directory / "config.json", documents.Quantized).get("quantization_config") or {}
    if config.get("quant_method") != "lrec":
        raise ValueError(
            f"{directory} is not packed by lrec (quant_method {config.get('quant_method')!r}); "
            "make one with `lrec quantize`"
        )
    documents.check(config, documents.PackedConfig, directory / "config.json")
    config["layers"] = config.get("layers") or []
    for entry in config["layers"]:
        formats.check_spec(entry["spec"])
    return config


def by_numbers(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them, layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def layer_row(name: str, spec: dict, stored: int) -> dict:
    """One layer: name, format, settings, shape, bits per weight, bytes."""
    settings = {k: v for k, v in spec.items() if k not in ("format", "shape", "tensors")}
    weights = spec["shape"][0] * spec["shape"][1]
    return {
        "name": name,
        "format": spec["format"],
        "settings": json.dumps(settings),
        "shape": spec["shape"],
        "bits_per_weight": 8 * stored / weights,
        "bytes": stored,
    }


def dense_block_weights(directory: Path, packed: set[str]) -> int:
    """Number of matrix weights in the blocks that are stored unpacked, from the file headers alone."""
    path = next(iter(packed)).split(".")
    depth = next(i for i, part in enumerate(path) if part.isdigit())
    prefix = ".".join(path[:depth]) + "."
    total = 0
    for file in checkpoint.weight_files(directory):
        with checkpoint.open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is not a dict)
                shape = tensors.get_slice(key).get_shape()
                if key.startswith(prefix) and key.rpartition(".")[0] not in packed and len(shape) >= 2:
                    total += torch.Size(shape).numel()
    return total


def _bytes(dtype: str, shape: list[int]) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize
