"""`lrec train --objective sft`: a task learned by an adapter on a packed model, alone or on top of what corrects it.

    lrec train --objective sft --model Q --adapter A --dataset rows.jsonl --output_dir T

No teacher is needed. With --adapter the correction stays as it is, active and frozen, and a second adapter learns the
task: `T` holds that one as any peft repository, and in `T/correction` the first, where peft saves it too, so that
`--adapter T` is both wherever lrec takes an adapter. `--stack continue` trains the correction itself further.
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn

from lrec import (
    assembly,
    checkpoint,
    conversations,
    evaluate,
    load,
    lock,
    logbook,
    lora_bits,
    memory,
    processes,
    ranks,
    stream,
    text,
)
from lrec.correction import Train, evaluations, history
from lrec.losses import IGNORE
from lrec.memory_curve import MemoryCurve
from lrec.meter import Meter
from lrec.options import setting
from lrec.teacher import LiveTeacher, check_tokenizers
from lrec.trainer import LrecConfig, LrecTrainer


@dataclass
class FinetuneConfig(LrecConfig):
    """LrecConfig with the loss of a task: cross-entropy with the rows' own tokens.

    With a `kl_weight` above 0 the KL to a teacher is added, which keeps the model near what it was.
    """

    kl_weight: float = field(default=0.0, metadata={"help": "Weight of the divergence between teacher and student."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the rows' tokens."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The peak learning rate of the adapter."})


@dataclass(frozen=True, kw_only=True)
class Finetune(Train):
    """`lrec train --objective sft`: an adapter that learns the rows of a task."""

    dataset: str = field(
        metadata={"help": "rows of messages, of prompt and completion, or of text: a .jsonl or .parquet file, a Hub id"}
    )
    objective: Literal["kl", "sft"] = setting("sft", "kl: say what the teacher says; sft: learn the rows of a task")
    adapter: str | None = setting(None, "adapter to build on, which corrects the model (none: the packed model alone)")
    stack: Literal["new", "continue"] = setting(
        "new", "a new adapter on top of --adapter, which is frozen; or go on training that one, by its rank and targets"
    )
    num_samples: int | None = setting(None, "number of rows, a seeded random choice (none: all)")
    max_length: int = setting(1024, "tokens of a row, or with --packing of as many rows as fit; the rest is cut off")
    eval_dataset: str | None = setting(
        None, "held-out rows: their loss is told before and after, and with --eval_steps keeps the best"
    )
    eval_samples: int | None = setting(None, "number of them, spaced evenly (none: all)")
    lora_init: Literal["auto", "closed_form", "zero"] = setting(
        "auto", "start from the factors stored with the packed model, or from zero (auto: zero if on an adapter)"
    )

    def run(self, config: FinetuneConfig) -> dict:
        """Trains under `config`; the report. Raises ValueError if the parts do not fit together."""
        settled = replace(self, lora_init=self.settled_init()) if self.lora_init == "auto" else self
        return settled.learn(config)

    @lock.alone
    def learn(self, config: FinetuneConfig) -> dict:
        """`run`, where `lora_init` is settled."""
        from datasets import Dataset

        if self.train != "adapters":
            raise ValueError(f"a task is learned by an adapter, not by {self.train}: leave --train out")
        self.check_free(config)
        config.max_length = self.max_length
        tokenizer = load.tokenizer(self.model)
        use_template(tokenizer, config.chat_template_path)
        ids, labels = self.rows(tokenizer, config)
        held = self.held_rows(tokenizer, config)
        if self.lean_malloc:
            stream.lean_malloc()
        meter = Meter(load.device_of(self.device))
        curve = MemoryCurve(meter.device)
        model = self.trainable(self.base(config), config.gradient_checkpointing)
        trainer = LrecTrainer(
            model=model,
            args=config,
            teacher=self.live_teacher(tokenizer, config),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
            eval_dataset=Dataset.from_dict({"input_ids": held[0], "labels": held[1]}) if config.eval_steps else None,
        )
        before = held and evaluate.rows_quality(model.eval(), *held)["loss"]
        result = trainer.train(resume_from_checkpoint=self.start_from(config.resume_from_checkpoint))
        self.settle(model)
        if self.lora_bits == 16:  # of 8 every product takes what is stored already
            as_stored(model)
        trainer.save_model(self.output_dir)
        learned = sum(label != IGNORE for row in labels for label in row[1 : self.max_length])
        report = self.report(model, result, history(trainer)) | evaluations(trainer)
        report |= {"num_rows": len(ids), "num_target_tokens": learned}
        if held:
            after = evaluate.rows_quality(model.eval(), *held)["loss"]
            report |= {"held_out_loss_before": before, "held_out_loss": after}
        curve.end()  # what follows is no part of the training
        longest = self.max_length if config.packing else min(self.max_length, max(map(len, ids)))
        told = memory.told(replace(self, max_length=longest), model, trainer.teacher, config, meter)
        report |= self.built_on() | told
        if trainer.is_world_process_zero():
            self.finish(report)
            logbook.write(self.output_dir, "train", [self, config], curve)
        processes.wait()
        return report

    def rows(self, tokenizer, config: FinetuneConfig) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and labels of the rows to learn. Raises ValueError if they are cut off before anything to be learned."""
        learn = config.completion_only_loss is not False
        # Cut to max_length by trl, which knows more than one way.
        ids, labels = conversations.read(self.dataset, tokenizer, self.num_samples, self.seed, None, learn)
        if all(label == IGNORE for row in labels for label in row[1 : self.max_length]):
            raise ValueError(
                f"no row of {self.dataset} has anything to be learned in its first {self.max_length} tokens: raise "
                "max_length"
            )
        return ids, labels

    def held_rows(self, tokenizer, config: FinetuneConfig) -> tuple[list[list[int]], list[list[int]]] | None:
        """Ids and labels of the rows to measure on, if any are named. Raises ValueError for evaluations without."""
        if self.eval_dataset is None:
            if config.eval_steps:
                raise ValueError(
                    "--eval_steps keeps the best checkpoint by --eval_dataset, but none is given; give one"
                )
            return None
        learn = config.completion_only_loss is not False
        return conversations.read(self.eval_dataset, tokenizer, self.eval_samples, None, self.max_length, learn)

    def live_teacher(self, tokenizer, config: FinetuneConfig) -> LiveTeacher | None:
        """The teacher in memory, if the loss asks one. Raises ValueError for a teacher that is missing or not asked."""
        if self.teacher_cache or self.teacher_targets != "live":
            raise ValueError("a cache holds windows, not rows of a task: leave teacher_cache and teacher_targets out")
        if config.objective().needs_teacher != bool(self.teacher):
            raise ValueError(
                f"{'no' if not self.teacher else 'a'} teacher, with kl_weight = {config.kl_weight} and hidden_weight = "
                f"{config.hidden_weight}: to stay near a teacher give --teacher and --kl_weight, else neither"
            )
        if not self.teacher:
            return None
        check_tokenizers(load.tokenizer(self.teacher), tokenizer)
        return LiveTeacher(load.model(self.teacher, None, self.device, self.dtype))

    def settled_init(self) -> str:
        """What `auto` comes to."""
        stored = (text.model_path(self.model) / assembly.LOWRANK).exists()
        return "closed_form" if stored and self.adapter is None and not self.lora_pool else "zero"

    def adapted(self, base):
        """The base under what it is built on, and the adapter to be trained."""
        import torch
        from peft import PeftModel

        if self.adapter is None:
            return super().adapted(base)
        if self.built_on_grids():
            base = load.with_adapter(base, self.adapter)
            return super().adapted(base)
        if self.stack == "continue":
            model = load.with_adapter(base, self.adapter)
            load.activate(model, model.active_adapters, learning="default")
            return self.in_precision(model)
        if self.lora_init == "closed_form":
            raise ValueError(f"{self.adapter} corrects the model already: start what is on top with --lora_init zero")
        if checkpoint.correction_of(load.adapter_path(self.adapter)):
            raise ValueError(
                f"{self.adapter} is itself on top of another: go on training it (--stack continue), or make one "
                "adapter of both first (lrec export --format adapter)"
            )
        model = PeftModel.from_pretrained(base, self.adapter, adapter_name=checkpoint.CORRECTION)
        torch.manual_seed(self.seed)
        model.add_adapter("default", self.peft_config(model))
        ranks.check(model)
        load.activate(model, [checkpoint.CORRECTION, "default"], learning="default")
        return self.in_precision(model)

    def correction(self) -> Path | None:
        """The frozen adapter below the trained one."""
        if self.adapter is None or self.built_on_grids():
            return None
        return Path(self.adapter) if self.stack == "new" else checkpoint.correction_of(Path(self.adapter))

    def built_on_grids(self) -> bool:
        """Whether what corrects the model is scales and zeros alone. Raises ValueError if that is to be continued."""
        alone = not (load.adapter_path(self.adapter) / "adapter_config.json").is_file()
        if alone and self.stack == "continue":
            raise ValueError(f"{self.adapter} holds scales and zeros, no adapter to go on with: use --stack new")
        return alone

    def built_on(self) -> dict:
        """What the stamp says of what the new adapter is on top of, or goes on from."""
        below = self.correction()
        grids = checkpoint.read_stamp(Path(self.adapter)).get("base_tensors_sha256") if self.adapter else None
        found = {"objective": self.objective}
        found |= {"correction_sha256": checkpoint.adapter_hash(below)} if below else {}
        found |= {"base_tensors_sha256": grids} if grids else {}
        return found | ({"continued_from": self.adapter} if self.adapter and self.stack == "continue" else {})

    def finish(self, report: dict) -> None:
        """Leaves the adapter and its stamp in `output_dir`, and beside them the correction, byte for byte."""
        place = Path(self.output_dir)
        lora_bits.store(place / checkpoint.ADAPTER_WEIGHTS, self.lora_bits)
        if self.adapter and (Path(self.adapter) / checkpoint.BASE_TENSORS).exists():
            shutil.copyfile(Path(self.adapter) / checkpoint.BASE_TENSORS, place / checkpoint.BASE_TENSORS)
        if below := self.correction():
            shutil.rmtree(place / checkpoint.CORRECTION, ignore_errors=True)
            (place / checkpoint.CORRECTION).mkdir()
            for pattern in ("adapter_*", checkpoint.ADAPTER_STAMP, checkpoint.BASE_TENSORS):
                for path in below.glob(pattern):
                    shutil.copyfile(path, place / checkpoint.CORRECTION / path.name)
        checkpoint.write_json(place / checkpoint.ADAPTER_STAMP, report)


def use_template(tokenizer, path: str | None) -> None:
    """Gives the tokenizer the chat template in a file. Raises ValueError for anything else, as the name of a model: its
    template could bring tokens that a packed model has no room for."""
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"--chat_template_path {path} is no file; it must be that of a .jinja template")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")


def as_stored(model: nn.Module) -> None:
    """Rounds what was trained to bfloat16, in which it is stored, so that what is measured is what will be loaded."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.data.bfloat16())
