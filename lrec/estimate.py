"""`lrec estimate`: will it fit, and what would make it fit."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

import torch

from lrec import load, memory, pass_memory, shapes
from lrec.capture import CaptureSettings
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
    train: str = setting("adapters", "what learns: adapters, scales, zeros, codes by commas, or all (but codes)")
    reconstruct_epochs: int = setting(0, "as `lrec quantize` is told: above 0, blocks are trained when quantizing")
    reconstruct_reach: float = setting(0.0, "as `lrec quantize` is told: above 0, their codes are trained too")
    match_upstream: float = setting(0.0, "as `lrec quantize` is told: above 0, the full model's states go beside")
    end_loss_hessian: bool = setting(False, "as `lrec quantize` is told: a backward pass of the full model comes first")
    lora_r: int = setting(16, "rank of the adapters on all linears")
    batch_size: int = setting(1, "windows in a micro-batch")
    max_length: int = setting(512, "tokens in a window")
    lora_bits: int = setting(16, "bits in which adapters are stored: with 8, products see them rounded")
    lora_dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the adapters")
    checkpointing: Literal["none", "block", "split"] = setting("block", "what a block keeps, see `lrec train`")
    offload_checkpoints: bool = setting(False, "checkpoints lie in CPU memory until backward; on a GPU")
    embeddings: Literal["device", "cpu"] = setting("device", "where the token embeddings' table lies")
    quantize_embeddings: int | None = setting(None, "bits of embeddings and head: 8 or 4 (none: as they are)")
    fused_backward: bool = setting(False, "each gradient is applied and freed as backward makes it")
    stream_weights: bool = setting(False, "packed weights stay on disk and visit one block at a time")
    optim: str = setting("adamw_torch", "optimizer, by the name that transformers gives it")
    calibration_tokens: int = setting(65536, "tokens of calibration text when quantizing")
    sweep_tokens: int = setting(CaptureSettings.sweep_tokens, "tokens that pass the teacher at once when caching")
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
            "quantize": pass_memory.quantizing(config, setup, self.calibration_tokens).parts,
            "cache": pass_memory.caching(config, setup, self.sweep_tokens).parts,
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
        dtypes = ("dtype", "stored_dtype", "lora_dtype")
        same = {name: getattr(self, name) for name in names if name not in dtypes}
        if self.offload_checkpoints and (self.checkpointing == "none" or self.device == "cpu"):
            raise ValueError("offload_checkpoints moves checkpoints from a GPU: it needs cuda, and checkpointing")
        if self.stream_weights and self.checkpointing == "none":
            raise ValueError("stream_weights needs checkpointing block or split: else backward holds every block")
        place = torch.device(self.device)
        return memory.Setup(
            **same,
            optimizer=self.optim,
            dtype=load.dtype_of(self.dtype, place),
            stored_dtype=load.dtype_of(self.stored_dtype, place),
            lora_dtype=load.dtype_of(self.lora_dtype, place),
        )

    def card(self, limit: int, needed: int, changed: list[tuple[str, int]]) -> dict:
        """Whether training, which needs so many bytes, fits into `limit`, and with which flag if not as it is."""
        return {
            "card": f"{limit // 10**9} GB",
            "fits": needed <= limit,
            "would_fit_with": "" if needed <= limit else remedy(limit, changed) or "no single flag",
        }

    def changes(self, setup: memory.Setup) -> list[tuple[str, dict]]:
        """What could be changed, and how `lrec train` (or `lrec quantize`) spells it; what costs least comes first."""
        gpu, packed = setup.device == "cuda", bool(setup.quantize_embeddings)
        offers = [
            (setup.checkpointing == "none", "--checkpointing block", {"checkpointing": "block"}),
            (gpu and setup.embeddings == "device" and not packed, "--embeddings cpu", {"embeddings": "cpu"}),
            (not setup.fused_backward, "--fused_backward true --max_grad_norm 0", {"fused_backward": True}),
            (gpu and re.fullmatch("adamw(_torch.*)?", setup.optimizer), "--optim adamw_8bit",
             {"optimizer": "adamw_8bit"}),
            (setup.lora_dtype == torch.float32, "--lora_dtype bfloat16", {"lora_dtype": torch.bfloat16}),
            (gpu and not setup.offload_checkpoints, "--checkpointing split --offload_checkpoints true",
             {"checkpointing": "split", "offload_checkpoints": True}),
            (not packed and setup.embeddings == "device", "--quantize_embeddings 8 of lrec quantize",
             {"quantize_embeddings": 8}),
            (setup.batch_size > 1, "--per_device_train_batch_size 1", {"batch_size": 1}),
            *((setup.max_length // n >= 128, f"--max_length {setup.max_length // n}",
               {"max_length": setup.max_length // n}) for n in (2, 4)),
            *((r < setup.lora_r, f"--lora_r {r}", {"lora_r": r}) for r in (16, 8)),
            (not setup.stream_weights, "--stream_weights" + " --checkpointing block" * (setup.checkpointing == "none"),
             {"stream_weights": True, "checkpointing": setup.checkpointing.replace("none", "block")}),
        ]  # fmt: skip
        return [(flag, change) for offered, flag, change in offers if offered]

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
