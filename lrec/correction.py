"""`lrec train`: an adapter on a packed model, trained until both say what the full-precision model says."""

import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lrec import assembly, checkpoint, load, memory, offload, stream, text, trained
from lrec.cache import TargetCache
from lrec.capture import Capture, CaptureSettings
from lrec.meter import Meter
from lrec.options import setting
from lrec.runs import Place, Text
from lrec.teacher import CachedTeacher, LiveTeacher, check_tokenizers, open_cache

WORKING_CACHE = "teacher_cache"  # in the adapter's directory while it is trained


@dataclass(frozen=True, kw_only=True)
class Train(Text, Place):
    """`lrec train`: a LoRA, scales and zeros that correct the quantization error, trained by KL to the teacher."""

    model: str = field(metadata={"help": "packed model"})
    output_dir: str = field(metadata={"help": "new directory for the adapter"})
    teacher: str | None = setting(None, "the full-precision model it was made from")
    teacher_cache: str | None = setting(None, "what `lrec cache` made of that model and these windows, in its place")
    teacher_targets: Literal["live", "hidden", "topk"] = setting(
        "live", "without a cache: the teacher in memory, or first cached in output_dir and then away"
    )
    train: str = setting("adapters", "what learns: adapters, scales, zeros, some of them parted by commas, or all")
    scale_bits: int | None = setting(
        None, "bits in which trained scales and zeros are stored at the end: 8 or 16 (none: as many as the base's)"
    )
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: int | None = setting(None, "LoRA alpha; the update is scaled by alpha / r (none: alpha = r)")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_target_modules: str = setting("all-linear", "all-linear, or comma-separated names")
    lora_init: Literal["closed_form", "zero"] = setting(
        "closed_form", "start from the factors stored with the packed model, or from zero"
    )
    lora_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the adapters; bfloat16 ones are updated with stochastic rounding"
    )
    seed: int = setting(0, "of the choice and order of windows and of the adapters")
    stream_weights: bool = setting(False, "packed weights stay on disk and visit the device one block at a time")
    lean_malloc: bool = setting(
        False, "on a CPU, hand freed tensors back at once: a fraction of the memory, for fresh pages each time"
    )

    def run(self, config) -> dict:
        """Trains under `config`, a LrecConfig; the report. Raises ValueError if the parts do not fit together."""
        from datasets import Dataset

        from lrec.trainer import LrecTrainer

        trained.kinds_of(self.train)
        found = {path.name for path in Path(self.output_dir).glob("*")} - {WORKING_CACHE}
        if found and not config.resume_from_checkpoint:
            raise ValueError(
                f"{self.output_dir} is not empty; choose another output_dir, remove it (nothing was changed), "
                "or go on from its last checkpoint with --resume_from_checkpoint true"
            )
        tokenizer = load.tokenizer(self.model)
        if self.teacher:
            check_tokenizers(load.tokenizer(self.teacher), tokenizer)
        ids = self.windows(tokenizer, config)
        cache = self.cached(tokenizer, ids)
        if self.lean_malloc:
            stream.lean_malloc()
        meter = Meter(load.device_of(self.device))
        base = self.base(config)
        if cache is None:
            teacher = LiveTeacher(load.model(self.teacher, None, self.device, self.dtype))
        else:
            teacher = CachedTeacher(cache, base)
        model = self.trainable(base, config.gradient_checkpointing)
        trainer = LrecTrainer(
            model=model,
            args=config,
            teacher=teacher,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        )
        result = trainer.train(resume_from_checkpoint=self.start_from(config.resume_from_checkpoint))
        trained.settle(model, self.scale_bits)
        trainer.save_model(self.output_dir)
        history = [
            {k: row[k] for k in ("step", "loss", "kl", "ce", "hidden", "learning_rate") if k in row}
            for row in trainer.state.log_history
            if "loss" in row
        ]
        report = self.report(model, result, history) | memory.told(self, model, teacher, config, meter)
        if trainer.is_world_process_zero():
            if "adapters" in trained.kinds_of(self.train):
                halve(Path(self.output_dir) / "adapter_model.safetensors")
            checkpoint.write_json(Path(self.output_dir) / checkpoint.ADAPTER_STAMP, report)
            shutil.rmtree(Path(self.output_dir) / WORKING_CACHE, ignore_errors=True)
        return report

    def start_from(self, resume: bool | str | None) -> str | None:
        """The checkpoint to go on from: for true, the last whole one, since a killed run may leave half of one; with
        none yet training starts anew, and says so."""
        if not isinstance(resume, bool) or not resume:
            return resume or None
        whole = whole_checkpoints(Path(self.output_dir))
        if not whole:
            warnings.warn(f"{self.output_dir} has no whole checkpoint yet: training starts anew", stacklevel=2)
            return None
        return str(whole[-1])

    def windows(self, tokenizer, config):
        """The training windows; where they must be cached first, no more of them than the steps will see."""
        ids = self.input_ids(tokenizer, self.seed)
        seen = config.max_steps * config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        if self.teacher_cache or self.teacher_targets == "live" or self.num_samples or not 0 < seen < len(ids):
            return ids
        return replace(self, num_samples=seen).input_ids(tokenizer, self.seed)

    def cached(self, tokenizer, ids) -> TargetCache | None:
        """The teacher's cache, made now if `teacher_targets` says so; None if the teacher is to be in memory.

        Raises ValueError if there is neither a teacher nor a cache, or if the cache is another teacher's.
        """
        from accelerate import PartialState

        if not self.teacher and not self.teacher_cache:
            raise ValueError("missing --teacher, the full-precision model, or --teacher_cache, what it said")
        if self.teacher_cache:
            config = checkpoint.read_json(text.model_path(self.model) / "config.json").get("quantization_config", {})
            made_of = config.get("meta", {}).get("base_sha256")
            if self.teacher:
                made_of = checkpoint.fingerprint(text.model_path(self.teacher))
            return open_cache(self.teacher_cache, tokenizer, made_of)
        if self.teacher_targets == "live":
            return None
        place = Path(self.output_dir) / WORKING_CACHE
        with PartialState().main_process_first():
            settings = CaptureSettings(what=self.teacher_targets)
            Capture.of(self.teacher, ids, place, settings, self.device, self.dtype).run()
        return TargetCache(place)

    def base(self, config):
        """The packed model; with `stream_weights` its packed weights stay in their files."""
        if not self.stream_weights:
            return load.model(self.model, None, self.device, self.dtype)
        return offload.load_for_training(self.model, self.device, self.dtype, config.gradient_checkpointing)

    def targets(self) -> str | list[str]:
        """The modules that get adapters, as peft takes them."""
        return "all-linear" if self.lora_target_modules == "all-linear" else self.lora_target_modules.split(",")

    def trainable(self, base, gradient_checkpointing: bool):
        """The base, prepared, with what `train` names ready to learn."""
        from lrec import prepare_model_for_training

        kinds = trained.kinds_of(self.train)
        model = prepare_model_for_training(base, use_gradient_checkpointing=gradient_checkpointing)
        if "adapters" in kinds:
            model = self.adapted(model)
        trained.start(model, kinds)
        return model

    def adapted(self, base):
        """The base under new trainable adapters, started as `lora_init` says."""
        import torch
        from peft import LoraConfig, get_peft_model

        from lrec import lowrank

        peft_config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.targets(),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(self.seed)
        model = get_peft_model(base, peft_config)
        if self.lora_init == "closed_form":
            factors = text.model_path(self.model) / assembly.LOWRANK
            if not factors.exists():
                raise ValueError(
                    f"{self.model} holds no {assembly.LOWRANK} to start from; "
                    f"use --lora_init zero, or quantize with --init_rank {self.lora_r}"
                )
            lowrank.initialise(model, lowrank.load(factors))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, self.lora_dtype))
        return model

    def report(self, model, result, history: list[dict]) -> dict:
        """What the adapter was made for and how: its stamp."""
        import torch

        kinds, changed = trained.kinds_of(self.train), trained.tensors(model)
        return {
            "base_model": self.model,
            "teacher": self.teacher or self.teacher_cache,
            "packed_sha256": checkpoint.packed_sha256(trained.base_of(model)),
            **({"base_tensors_sha256": checkpoint.tensors_hash(changed)} if changed else {}),
            "train": ",".join(kinds),
            **({"lora_r": self.lora_r, "lora_init": self.lora_init} if "adapters" in kinds else {}),
            "dataset": self.dataset,
            "num_steps": result.global_step,
            "loss": result.training_loss,
            "seconds": round(result.metrics["train_runtime"], 2),
            "torch": torch.__version__,
            "history": history,
        }


def whole_checkpoints(directory: Path) -> list[Path]:
    """The trainer's checkpoints in a directory, in order of their steps, without any that a killed run left half."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        try:
            # Written last.
            found[checkpoint.read_json(path / "trainer_state.json")["global_step"]] = path
        except ValueError:
            continue
    return [found[step] for step in sorted(found)]


def halve(path: Path) -> None:
    """Rewrites an adapter's file in bfloat16; peft trains adapters in float32, but what they correct is coarser."""
    import torch

    with checkpoint.open_tensors(path) as file:
        tensors = {key: file.get_tensor(key).to(torch.bfloat16) for key in file.keys()}  # noqa: SIM118
    checkpoint.write_tensors(path, tensors)
