"""`lrec train`: an adapter on a packed model, trained until both say what the full-precision model says."""

import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lrec import (
    anatomy,
    assembly,
    checkpoint,
    checkpoints,
    documents,
    load,
    lock,
    logbook,
    lora_bits,
    memory,
    offload,
    processes,
    ranks,
    stream,
    text,
    trained,
)
from lrec.cache import TargetCache
from lrec.capture import Capture, CaptureSettings
from lrec.learning import Learning
from lrec.memory_curve import MemoryCurve
from lrec.meter import Meter
from lrec.options import setting
from lrec.runs import Place, Text
from lrec.teacher import CachedTeacher, LiveTeacher, check_tokenizers, open_cache

WORKING_CACHE = "teacher_cache"  # in the adapter's directory while it is trained


@dataclass(frozen=True, kw_only=True)
class Train(Learning, Text, Place):
    """`lrec train`: a LoRA, scales and zeros that correct the quantization error, trained by KL to the teacher."""

    model: str = field(metadata={"help": "packed model"})
    objective: Literal["kl", "sft"] = setting("kl", "kl: say what the teacher says; sft: learn the rows of a task")
    output_dir: str = field(metadata={"help": "new directory for the adapter"})
    teacher: str | None = setting(None, "the full-precision model it was made from")
    teacher_cache: str | None = setting(None, "what `lrec cache` made of that model and these windows, in its place")
    teacher_targets: Literal["live", "hidden", "topk"] = setting(
        "live", "without a cache: the teacher in memory, or first cached in output_dir and then away"
    )
    eval_dataset: str | None = setting(
        None, "held-out text to keep the best checkpoint by, every --eval_steps (none: windows of the dataset)"
    )
    eval_samples: int = setting(8, "held-out windows")
    seed: int = setting(0, "of the choice and order of windows and of the adapters")
    stream_weights: bool = setting(False, "packed weights stay on disk and visit the device one block at a time")
    lean_malloc: bool = setting(
        False, "on a CPU, hand freed tensors back at once: a fraction of the memory, for fresh pages each time"
    )

    @lock.alone
    def run(self, config) -> dict:
        """Trains under `config`, a LrecConfig; the report. Raises ValueError if the parts do not fit together."""
        import torch
        from datasets import Dataset

        from lrec.trainer import LrecTrainer

        trained.kinds_of(self.train)
        self.check_free(config)
        tokenizer = load.tokenizer(self.model)
        if self.teacher:
            check_tokenizers(load.tokenizer(self.teacher), tokenizer)
        ids, held_out = self.held_out(tokenizer, self.windows(tokenizer, config), config)
        cache = self.cached(tokenizer, torch.cat([ids, held_out]))
        if self.lean_malloc:
            stream.lean_malloc()
        meter = Meter(load.device_of(self.device))
        curve = MemoryCurve(meter.device)
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
            eval_dataset=Dataset.from_dict({"input_ids": held_out.tolist()}) if len(held_out) else None,
        )
        result = trainer.train(resume_from_checkpoint=self.start_from(config.resume_from_checkpoint))
        self.settle(model)
        trainer.save_model(self.output_dir)
        report = self.report(model, result, history(trainer)) | evaluations(trainer)
        curve.end()  # what follows is no part of the training
        report |= memory.told(self, model, teacher, config, meter)
        if trainer.is_world_process_zero():
            if "adapters" in trained.kinds_of(self.train):
                lora_bits.store(Path(self.output_dir) / checkpoint.ADAPTER_WEIGHTS, self.lora_bits)
            checkpoint.write_json(Path(self.output_dir) / checkpoint.ADAPTER_STAMP, report)
            logbook.write(self.output_dir, "train", [self, config], curve)
            shutil.rmtree(Path(self.output_dir) / WORKING_CACHE, ignore_errors=True)
        processes.wait()
        return report

    def check_free(self, config) -> None:
        """Raises ValueError for an output_dir that holds something, unless training is to go on there."""
        found = processes.from_main(lambda: {path.name for path in Path(self.output_dir).glob("*")}) - {WORKING_CACHE}
        if found and not config.resume_from_checkpoint:
            raise ValueError(
                f"{self.output_dir} is not empty; choose another output_dir, remove it (nothing was changed), "
                "or go on from its last checkpoint with --resume_from_checkpoint true"
            )

    def settle(self, model) -> None:
        """Brings what was trained into the form in which it is stored."""
        from lrec import pooling

        trained.settle(model, self.scale_bits)
        if self.lora_pool:
            pooling.settle(model)

    def start_from(self, resume: bool | str | None) -> str | None:
        """The checkpoint to go on from: for true, the last whole one, since a killed run may leave half of one; with
        none yet training starts anew, and says so."""
        if not isinstance(resume, bool) or not resume:
            if resume:
                checkpoints.check_checkpoint(Path(resume))
            return resume or None
        whole = processes.from_main(lambda: checkpoints.whole_checkpoints(Path(self.output_dir)))
        if not whole:
            warnings.warn(f"{self.output_dir} has no whole checkpoint yet: training starts anew", stacklevel=2)
            return None
        checkpoints.check_checkpoint(whole[-1])
        return str(whole[-1])

    def held_out(self, tokenizer, ids, config) -> tuple:
        """Training windows and held-out ones; none of these unless there are evaluations. Warns if they share text.

        Raises ValueError for evaluations without steps between them, or for too few windows to hold some out."""
        if self.eval_dataset is not None and not config.eval_steps:
            raise ValueError("--eval_dataset is read every --eval_steps, but none are given; give some")
        if not config.eval_steps:
            return ids, ids[:0]
        if self.eval_dataset is None:
            if len(ids) <= self.eval_samples:
                raise ValueError(
                    f"{len(ids)} windows of {self.dataset} leave none to train on beside {self.eval_samples} held out; "
                    "take more text, shorter windows, fewer --eval_samples, or name --eval_dataset"
                )
            return ids[: -self.eval_samples], ids[-self.eval_samples :]
        held_out = replace(self, dataset=self.eval_dataset, num_samples=self.eval_samples).input_ids(tokenizer, None)
        text.warn_overlap(ids, held_out, f"{self.dataset} (training)", f"{self.eval_dataset} (held out)")
        return ids, held_out

    def windows(self, tokenizer, config):
        """The training windows; where they must be cached first, no more of them than the steps will see."""
        ids = self.input_ids(tokenizer, self.seed)
        seen = config.max_steps * config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        if self.teacher_cache or self.teacher_targets == "live" or self.num_samples or not 0 < seen < len(ids):
            return ids
        held_out = self.eval_samples if config.eval_steps and self.eval_dataset is None else 0
        return replace(self, num_samples=min(seen + held_out, len(ids))).input_ids(tokenizer, self.seed)

    def cached(self, tokenizer, ids) -> TargetCache | None:
        """The teacher's cache, made now if `teacher_targets` says so; None if the teacher is to be in memory.

        Raises ValueError if there is neither a teacher nor a cache, or if the cache is another teacher's.
        """
        if not self.teacher and not self.teacher_cache:
            raise ValueError("missing --teacher, the full-precision model, or --teacher_cache, what it said")
        if self.teacher_cache:
            path = text.model_path(self.model) / "config.json"
            config = checkpoint.read_json(path, documents.Quantized).get("quantization_config") or {}
            made_of = (documents.check(config, documents.PackedConfig, path).get("meta") or {}).get("base_sha256")
            if self.teacher:
                made_of = checkpoint.fingerprint(text.model_path(self.teacher))
            return open_cache(self.teacher_cache, tokenizer, made_of)
        if self.teacher_targets == "live":
            return None
        place = Path(self.output_dir) / WORKING_CACHE
        settings = CaptureSettings(what=self.teacher_targets)
        Capture.of(self.teacher, ids, place, settings, self.device, self.dtype).run()
        return TargetCache(place)

    def base(self, config):
        """The packed model; with `stream_weights` its packed weights stay in their files."""
        if not self.stream_weights:
            return load.model(self.model, None, self.device, self.dtype)
        return offload.load_for_training(self.model, self.device, self.dtype, config.gradient_checkpointing)

    def lora_shape(self) -> dict:
        """Where new adapters go, of which rank and scaled how, as peft's LoraConfig takes it."""
        return ranks.shape(self, text.model_path(self.model))

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
        from peft import get_peft_model

        from lrec import lowrank, pooling

        torch.manual_seed(self.seed)
        model = get_peft_model(base, self.peft_config(base))
        ranks.check(model)
        if self.lora_pool:
            if self.lora_init == "closed_form":
                raise ValueError("the stored factors are no pooled ones: with --lora_pool start from --lora_init zero")
            pooling.pool(model)
        if self.lora_init == "closed_form":
            factors = text.model_path(self.model) / assembly.LOWRANK
            if not factors.exists():
                raise ValueError(
                    f"{self.model} holds no {assembly.LOWRANK} to start from; use --lora_init zero, quantize with "
                    f"--init_rank {model.peft_config['default'].r}, or --train scales,zeros"
                )
            lowrank.initialise(model, lowrank.load(factors))
        return self.in_precision(model)

    def peft_config(self, model):
        """New adapters as these settings describe them."""
        from peft import LoraConfig

        shape = self.lora_shape()
        return LoraConfig(
            **shape,
            exclude_modules=anatomy.unpacked(model) if shape["target_modules"] == "all-linear" else None,
            lora_dropout=self.lora_dropout,
            task_type="CAUSAL_LM",
        )

    def in_precision(self, model):
        """The model with what it trains in `lora_dtype`, and seen as `lora_bits` store it."""
        import torch

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, self.lora_dtype))
        if self.lora_bits == 8:
            lora_bits.start(model)
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
            **(
                {"lora_r": model.peft_config["default"].r, "lora_bits": self.lora_bits, "lora_init": self.lora_init}
                if "adapters" in kinds
                else {}
            ),
            "dataset": self.dataset,
            "num_steps": result.global_step,
            "loss": result.training_loss,
            "seconds": round(result.metrics["train_runtime"], 2),
            "torch": torch.__version__,
            **({"diverged": result.metrics["diverged"]} if "diverged" in result.metrics else {}),
            "history": history,
        }


def history(trainer) -> list[dict]:
    """What the trainer logged of its loss, a row each time."""
    told = ("step", "loss", "kl", "ce", "hidden", "learning_rate")
    return [{k: row[k] for k in told if k in row} for row in trainer.state.log_history if "loss" in row]


def evaluations(trainer) -> dict:
    """What the trainer found on held-out text, a row each time, if anything."""
    told = ("step", "eval_loss", "eval_kl")
    rows = [{k: row[k] for k in told if k in row} for row in trainer.state.log_history if "eval_loss" in row]
    return {"evaluations": rows} if rows else {}
