"""What a training step keeps in memory, as settings beside trl's own.

Each says what it gives up. They add up; none changes what is learned, but for the rounding of bfloat16 adapters.
"""

import json
import os
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import TrainerCallback
from trl import SFTConfig

from lrec import registry
from lrec.cpu_embeddings import PLACES
from lrec.integrations.checkpointing import PARTS, split_blocks

# How accelerate can shard a training, by its own name, and what it needs.
SHARDING = {"FSDP": "give each process a GPU", "DEEPSPEED": "start several processes, without --cpu"}


@dataclass
class StepConfig(SFTConfig):
    """trl's SFTConfig with the settings of this file. Raises ValueError for values that exclude each other."""

    checkpointing: str = field(
        default="auto",
        metadata={
            "help": "What a block keeps for backward: none = all; block = its input; split = its attention's output "
            "too, so that half of it runs again at a time, which pays with offload_checkpoints; auto = block, or none "
            "without gradient_checkpointing.",
            "choices": ["auto", *PARTS],
        },
    )
    offload_checkpoints: bool = field(
        default=False, metadata={"help": "Keep checkpoints in pinned CPU memory until backward; needs a GPU."}
    )
    embeddings: str = field(
        default="device",
        metadata={"help": "Where the token embeddings' table lies: device, or cpu.", "choices": list(PLACES)},
    )
    fused_backward: bool = field(
        default=False,
        metadata={"help": "Apply and free each gradient as backward makes it; not with clipping or accumulation."},
    )

    def __post_init__(self):
        self._settle_checkpointing()
        self._check_choices()
        self._check_sharding()
        super().__post_init__()

    @property
    def checkpointed_parts(self) -> str:
        """`checkpointing` with auto resolved: none, block or split."""
        if self.checkpointing != "auto":
            return self.checkpointing
        return "block" if self.gradient_checkpointing else "none"

    def check_machine(self, accelerator: Accelerator) -> None:
        """Raises ValueError for settings that this device or number of processes cannot serve."""
        optim, on_cpu = self.optim.value, accelerator.device.type == "cpu"
        rules = {
            "offload_checkpoints moves checkpoints from a GPU to CPU memory, but this is a CPU: leave it out": (
                self.offload_checkpoints and on_cpu
            ),
            f"optim={optim} moves its state between a GPU and CPU memory, but this is a CPU: use adamw_8bit": (
                "paged" in optim and on_cpu
            ),
            "fused_backward applies gradients before processes can average them: train in one process": (
                self.fused_backward and accelerator.num_processes > 1
            ),
        }
        wrong = [rule for rule, broken in rules.items() if broken]
        # accelerate turns to plain data-parallel processes, or one alone, and does not say so.
        wrong += [
            f"{kind} was asked for, but accelerate does not shard so over what was started here "
            f"({accelerator.num_processes} x {accelerator.device.type}): {wants}, or leave {kind} out for plain "
            "data-parallel processes, each of which holds the packed weights"
            for kind, wants in SHARDING.items()
            if parse_flag_from_env(f"ACCELERATE_USE_{kind}") and accelerator.distributed_type != kind
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    def _check_sharding(self) -> None:
        launched = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if launched else "0"
        if stage == "3" or (self.deepspeed and HfDeepSpeedConfig(self.deepspeed).is_zero3()):
            raise ValueError(
                "ZeRO-3 shards parameters, but packed weights are buffers, which it copies to every process, and the "
                "loss reads the head between forward passes, when ZeRO-3 holds none of it: use ZeRO-2, or plain "
                "data-parallel processes, since packed weights take an eighth of what ZeRO-3 was made for"
            )
        if (launched or self.deepspeed) and not torch.accelerator.is_available():
            # accelerate leaves DeepSpeed out where it is told of a CPU; transformers must be told, for gloo.
            os.environ.pop("ACCELERATE_USE_CPU", None)
            self.use_cpu = True

    def _settle_checkpointing(self) -> None:
        if self.checkpointing != "auto":
            self.gradient_checkpointing = self.activation_checkpointing = self.checkpointing != "none"
        if self.gradient_checkpointing:
            given = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
            kwargs = {"use_reentrant": False} | (json.loads(given) if isinstance(given, str) else given)
            kwargs |= {"offload": True} if self.offload_checkpoints else {}
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs = kwargs

    def _check_choices(self) -> None:
        choices = {"checkpointing": ("auto", *PARTS), "embeddings": PLACES}
        unknown = [
            registry.nearest(getattr(self, name), allowed, f"value of {name}")
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        checkpoints, fused = bool(self.gradient_checkpointing), self.fused_backward
        reentrant = checkpoints and self.gradient_checkpointing_kwargs["use_reentrant"]
        rules = {
            "offload_checkpoints needs checkpoints: set checkpointing to block or split": (
                self.offload_checkpoints and not checkpoints
            ),
            "activation_offloading without checkpoints would move the packed weights too: set checkpointing to block": (
                self.activation_offloading and not checkpoints
            ),
            "checkpointing=split and fused_backward need use_reentrant=False in gradient_checkpointing_kwargs": (
                reentrant and (fused or self.checkpointing == "split")
            ),
            "fused_backward never holds all gradients, so they cannot be clipped: set max_grad_norm to 0": (
                fused and self.max_grad_norm
            ),
            "fused_backward applies each gradient at once: set gradient_accumulation_steps to 1, and a larger "
            "per_device_train_batch_size": fused and self.gradient_accumulation_steps != 1,
            "fused_backward cannot scale the loss of fp16: use bf16": fused and self.fp16,
        }
        wrong = unknown + [rule for rule, broken in rules.items() if broken]
        if wrong:
            raise ValueError("; ".join(wrong))


class SplitBlocks(TrainerCallback):
    """Splits the blocks of a model when training begins, if its settings say so."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """See `TrainerCallback`."""
        # transformers has just set its checkpoint function, which the parts of a block then use.
        if args.checkpointing == "split":
            split_blocks(model)
