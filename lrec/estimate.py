"""`lrec estimate`: will it fit, and what would make it fit."""

import dataclasses
import re
from dataclasses import dataclass, field

import torch

from lrec import load, memory, shapes
from lrec.options import setting

CARDS_GB = (4, 6, 8, 12, 16, 24)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`lrec estimate`: bytes of quantizing, caching the teacher and training, part by part, before any is spent."""

    model: str = field(metadata={"help": f"{', '.join(shapes.SHAPES)}, a config.json, a model directory or a Hub id"})
    gpu: str | None = setting(None, "memory it must fit into, 6GB say; if it does not, exit code 3 and what to change")
    num_layers: int | None = setting(None, "blocks of the model (none: all)")
    bits: int = setting(2, "bits of a code, for a model that is not packed yet")
    group_size: int = setting(128, "columns that share a scale and a zero")
    lora_r: int = setting(16, "rank of the adapters on all linears")
    batch_size: int = setting(1, "windows in a micro-batch")
    max_length: int = setting(512, "tokens in a window")
    gradient_checkpointing: bool = setting(True, "keep only what enters a block, and run it again in backward")
    stream_weights: bool = setting(False, "packed weights stay on disk and visit one block at a time")
    optim: str = setting("adamw_torch", "optimizer, by the name that transformers gives it")
    calibration_tokens: int = setting(65536, "tokens of calibration text when quantizing")
    device: str = setting("cuda", "cuda or cpu: which kernels run, and whether there is a CUDA context")
    dtype: str = setting("auto", "auto (float32 on a CPU, else bfloat16), float32, bfloat16")
    stored_dtype: str = setting("bfloat16", "dtype that embeddings and head are stored in")

    def run(self) -> dict:
        """The three peaks and their parts, and the cards that training fits on with the smallest change it needs.

        Raises MemoryError, with that change, if it does not fit into `gpu`; ValueError for a size that makes no sense.
        """
        limit = None if self.gpu is None else size_of(self.gpu)
        config = shapes.config_of(self.model, self.num_layers)
        setup = self.setup()
        trained = memory.training(config, setup)
        context = memory.CUDA_CONTEXT_BYTES if setup.device == "cuda" else 0
        needs = {
            "quantize": memory.quantizing(config, setup, self.calibration_tokens),
            "cache": memory.caching(config, setup),
            "train": trained.parts,
        }
        needed, changed = trained.peak_bytes + context, []
        if needed > min(limit or 10**13, CARDS_GB[0] * 10**9):
            changed = [
                (flag, memory.training(config, dataclasses.replace(setup, **change)).peak_bytes + context)
                for flag, change in self.changes(setup)
            ]
        if limit is not None and needed > limit:
            raise MemoryError(self.advice(limit, trained, context, remedy(limit, changed)))
        return {
            "model": self.model,
            "fullest_at": trained.moment,
            **{f"{verb}_peak_bytes": sum(parts.values()) + context for verb, parts in needs.items()},
            "of_which_cuda_context_bytes": context,
            "cards": [self.card(gb * 10**9, needed, changed) for gb in CARDS_GB],
            "parts": [
                {"run": verb, "part": name, "bytes": n} for verb, parts in needs.items() for name, n in parts.items()
            ],
        }

    def setup(self) -> memory.Setup:
        """The run as the memory model knows it. Raises ValueError for a device or dtype there is no estimate for."""
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device {self.device!r} has no estimate; allowed: cuda, cpu")
        names = [f.name for f in dataclasses.fields(memory.Setup) if hasattr(self, f.name)]
        same = {name: getattr(self, name) for name in names if name not in ("dtype", "stored_dtype")}
        place = torch.device(self.device)
        return memory.Setup(
            **same,
            optimizer=self.optim,
            dtype=load.dtype_of(self.dtype, place),
            stored_dtype=load.dtype_of(self.stored_dtype, place),
        )

    def card(self, limit: int, needed: int, changed: list[tuple[str, int]]) -> dict:
        """Whether training, which needs so many bytes, fits into `limit`, and with which flag if not as it is."""
        return {
            "card": f"{limit // 10**9} GB",
            "fits": needed <= limit,
            "would_fit_with": "" if needed <= limit else remedy(limit, changed) or "no single flag",
        }

    def changes(self, setup: memory.Setup) -> list[tuple[str, dict]]:
        """What could be changed, and how it is said on the command line; those that cost least come first."""
        changes = []
        if not setup.gradient_checkpointing:
            changes.append(("--gradient_checkpointing true", {"gradient_checkpointing": True}))
        if setup.optimizer.startswith("adamw") and setup.device == "cuda" and "8bit" not in setup.optimizer:
            changes.append(("--optim adamw_bnb_8bit", {"optimizer": "adamw_bnb_8bit"}))
        if setup.batch_size > 1:
            changes.append(("--per_device_train_batch_size 1", {"batch_size": 1}))
        halves = [setup.max_length // n for n in (2, 4) if setup.max_length // n >= 128]
        changes += [(f"--max_length {n}", {"max_length": n}) for n in halves]
        changes += [(f"--lora_r {r}", {"lora_r": r}) for r in (16, 8) if r < setup.lora_r]
        if not setup.stream_weights and setup.gradient_checkpointing:
            changes.append(("--stream_weights", {"stream_weights": True}))
        return changes

    def advice(self, limit: int, trained: memory.Prediction, context: int, flag: str | None) -> str:
        """What is needed, what takes most, and which flag makes it fit."""
        most = sorted(trained.parts.items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{name} {n / 1e9:.2f} GB" for name, n in most)
        return (
            f"{self.model} needs {(trained.peak_bytes + context) / 1e9:.2f} GB to train, {context / 1e9:.1f} GB of it "
            f"the CUDA context, but --gpu has {limit / 1e9:.2f} GB; most of it is {told}; "
            + (f"it fits with {flag}" if flag else "no single flag makes it fit; combine those of --help")
        )


def remedy(limit: int, changed: list[tuple[str, int]]) -> str | None:
    """The first of the flags, given with the bytes that each leaves to need, that makes training fit."""
    return next((flag for flag, needed in changed if needed <= limit), None)


def size_of(text: str) -> int:
    """Bytes of a size such as 6GB, 6 GiB, 512MB; a bare number is in GB.

    Raises ValueError for anything else, and for sizes that no device has (below 256 MB or above 10 TB).
    """
    units = {"": 10**9, "gb": 10**9, "g": 10**9, "gib": 2**30, "mb": 10**6, "m": 10**6, "mib": 2**20, "tb": 10**12}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if not found or found[2] not in units:
        raise ValueError(f"--gpu {text!r} is no size; give it as 6GB, 6GiB or 512MB")
    size = int(float(found[1]) * units[found[2]])
    if not 256 * 10**6 <= size <= 10**13:
        raise ValueError(f"--gpu {text!r} is {size} bytes, but a device has between 256 MB and 10 TB; give it as 6GB")
    return size
