"""One dial, `--effort quick|standard|max`: how much time quantizing and correcting may take.

A level is a set of settings, of which it sets those that the user has not set and that the run has. What it changes is
this, and nothing else:

                    quick       standard     max
    calibration     32 windows  128 windows  256 windows
    bits            as given    half a bit more on average, spent where it saves most (`--target_bpw`), in the others
    training        28 672      131 072      262 144 tokens
    held-out text   not used    the best of ten evaluations is kept, in the other two

In all three the uniform methods store scales and float zeros in 8 bits, and these are what learns: no adapter has to
be carried. With other methods adapters, scales and zeros learn, whichever there are. Widths are spread only where
groups and grid are left as they are. Windows have the length that the run says; a method or recipe without such a
setting keeps its own.

Measured: SmolLM2-135M at 2 bits by recipes/lrec_smollm2_135m.py on two cores of an AMD EPYC (2026-11-28),
evaluations and export included. quick took 8 min 39 s and came to a KL of 1.19 at 2.25 bits per weight; standard took
53 min, 27 of them quantizing on one core alone, and came to 0.66 at 2.50. max has not been timed.
"""

import errno
from pathlib import Path
from typing import Literal

import torch

from lrec import load, machine, memory, options, pass_memory, shapes
from lrec.quantizers import UniformQuantizer

Level = Literal["quick", "standard", "max"]
QUANTIZE = {"quick": {"num_samples": 32}, "standard": {"num_samples": 128}, "max": {"num_samples": 256}}
FLOAT_GRID = {"zero_point": "float", "scale_bits": 8}
UNIFORM = FLOAT_GRID | {"init_rank": 0, "train": "scales,zeros"}
OTHERS = {"train": "all"}
SPREAD_BITS = 0.5  # stored bits per weight above the width itself: half of them are the float grid's in groups of 64
TRAINING_TOKENS = {"quick": 28_672, "standard": 131_072, "max": 262_144}
EVALUATIONS = {"quick": 0, "standard": 10, "max": 10}


def spend(values: dict[str, object], *parts) -> dict[str, object]:
    """The values with those that their `effort` chooses, for the settings of these parts (see `options.fill`) that it
    has; unchanged without one. Raises ValueError for a level there is not."""
    if values.get("effort") in (None, "none"):
        return values
    level = options.parse("effort", values["effort"], Level)
    classes = [part if isinstance(part, type) else type(part) for part in parts]
    known = {name for cls in classes for name in options.field_types(cls)}
    uniform = next((part for part, cls in zip(parts, classes, strict=True) if issubclass(cls, UniformQuantizer)), None)
    chosen = QUANTIZE[level] | (OTHERS if uniform is None else UNIFORM | spread(level, values, uniform))
    if "symmetric" in values:
        chosen.pop("zero_point", None)  # a symmetric grid has none
    return {name: value for name, value in chosen.items() if name in known} | values


def spread(level: Level, values: dict[str, object], quantizer: UniformQuantizer | type) -> dict[str, object]:
    """The stored bits per weight to meet, unless the level is quick or it is said how bits are spent."""
    said = {"target_bpw", "bits_map", "group_size", "per_tensor", "symmetric", *FLOAT_GRID} & values.keys()
    bits = options.parse("bits", values.get("bits", quantizer.bits), int)
    if level == "quick" or said or bits == 8 or quantizer.group_size != UniformQuantizer.group_size:
        return {}
    return {"target_bpw": bits + SPREAD_BITS}


def steps(level: Level, tokens_per_step: int) -> dict[str, int]:
    """Settings of the trainer for a level: optimizer steps, and of evaluations and checkpoints if it has some."""
    total = max(1, TRAINING_TOKENS[level] // tokens_per_step)
    evaluations = EVALUATIONS[level]
    return {"max_steps": total} | ({"eval_steps": max(1, total // evaluations)} if evaluations else {})


def check_fits(level: Level, model: str, tokens: dict[str, int], bits: int, device: str, output_dir: Path) -> None:
    """Refuses a quantizing pass that memory or disk cannot hold; `tokens` are those of calibration, by level.

    Raises MemoryError with the largest level that would fit, or OSError (no space left) with the bytes it takes."""
    config, where = shapes.config_of(model), load.device_of(device)
    setup = memory.Setup(bits=bits, dtype=load.dtype_of("auto", where), device=where.type)
    free = machine.free_bytes(where)
    needs = {name: pass_memory.quantizing(config, setup, count).peak_bytes for name, count in tokens.items()}
    if needs[level] > free:
        fits = [name for name, needed in needs.items() if needed <= free]
        would = f"it fits with --effort {fits[-1]}" if fits else "no effort fits: take a machine with more memory"
        raise MemoryError(
            f"--effort {level} needs {needs[level] / 1e9:.2f} GB to quantize {model}, but {free / 1e9:.2f} GB are "
            f"free; {would}"
        )
    written = packed_bytes(config, setup)
    if written > (left := machine.free_disk_bytes(output_dir)):
        raise OSError(
            errno.ENOSPC,
            f"about {written / 1e9:.2f} GB will be written and {left / 1e9:.2f} GB are free at {output_dir}: "
            "free some, choose another output_dir or fewer --bits",
        )


def packed_bytes(config, setup: memory.Setup) -> int:
    """About what a packed model takes on disk, scales in groups of 64 and factors of rank 32 included."""
    from lrec import anatomy

    model = shapes.skeleton(config, torch.float32)
    linears = [linear for block in anatomy.find_blocks(model).modules for linear in anatomy.linears(block).values()]
    codes = sum(linear.weight.numel() for linear in linears) * (setup.bits + 0.5) / 8
    factors = sum(2 * 32 * (linear.in_features + linear.out_features) for linear in linears)
    return int(codes + factors + pass_memory.stored_bytes(model, setup))
