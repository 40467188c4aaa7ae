"""Correction: a LoRA on the quantized model, trained until it says what the full-precision model says.

trl owns the loop, the data and the checkpoints; here is only what differs from supervised fine-tuning: the loss, which
asks a teacher for targets and never makes the logits of a batch, and the refusal to go on from a loss or a gradient
that is not finite. Text, conversations, packing and data sets of ready `input_ids` work as in trl's SFTTrainer, which
also sends an anonymous usage count unless HF_HUB_DISABLE_TELEMETRY=1 or HF_HUB_OFFLINE=1.
"""

import contextlib
import math
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from lrec import trained
from lrec.cpu_embeddings import keep_on_cpu
from lrec.head import Head, output_layer, verify_head
from lrec.load import activate
from lrec.losses import DIVERGENCES, IGNORE, Objective, divergence, shift_labels
from lrec.optimizers import OneByOne
from lrec.step import SplitBlocks, StepConfig
from lrec.teacher import LiveTeacher, Teacher, final_hidden
from lrec.training_progress import TrainingProgress
from lrec.training_state import StateFiles
from lrec.watch import AlreadyTrained, DivergedError, Watch, first_not_finite, kept_best


@dataclass
class LrecConfig(StepConfig):
    """trl's SFTConfig with the loss and `lrec.step`'s settings of memory added, and defaults that suit 2-bit models.

    `loss_type` and `label_smoothing_factor` have no meaning here. bf16 autocast is on where a GPU supports it, and off
    on CPUs. Raises ValueError for a loss that is out of range, see `lrec.losses.Objective`.
    """

    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence between teacher and student."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy with the data's own tokens."})
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the relative squared distance between the last hidden states."}
    )
    hidden_anneal: bool = field(default=False, metadata={"help": "Lower hidden_weight linearly to zero by the end."})
    temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits in the divergence."})
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "KL(teacher || student), KL(student || teacher), or jsd.", "choices": list(DIVERGENCES)},
    )
    beta: float = field(default=0.5, metadata={"help": "The teacher's share in the mixture of jsd."})
    loss_chunk_tokens: int | None = field(
        default=None, metadata={"help": "Tokens whose logits are made at once (none: 12 MB of them)."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "The peak learning rate of the adapters."})
    scales_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "That of trained scales and zeros, as a share of their size (root mean square) per step."},
    )
    codes_reach: float = field(default=1.0, metadata={"help": "How far trained codes can move in all steps together."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate's schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up, in steps, or below 1 as a share of them."})
    patience: int | None = field(
        default=3, metadata={"help": "Stop after so many evaluations in a row without a better one (none: never)."}
    )
    resume_from_checkpoint: bool | str | None = field(
        default=None, metadata={"help": "Go on from the last checkpoint in output_dir (true), or from one by its path."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Packed weights are buffers: broadcasting sends all of them every step."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # transformers' word for no tracker, which a flag or a file gives as no value.
        self.report_to = self.report_to or "none"
        if self.eval_steps:
            self._evaluate_and_keep_best()
        with warnings.catch_warnings():
            # trl's own default of gradient_checkpointing goes by a name that transformers 5.23 warns about.
            warnings.filterwarnings("ignore", ".*checkpointing.*deprecated", FutureWarning)
            super().__post_init__()
        self.objective()

    def _evaluate_and_keep_best(self) -> None:
        # A checkpoint at every evaluation; of them the best is kept, and the last to go on from.
        self.eval_strategy = self.save_strategy = "steps"
        self.save_steps, self.load_best_model_at_end, self.greater_is_better = self.eval_steps, True, False
        self.metric_for_best_model = "eval_kl" if self.kl_weight else "eval_loss"
        self.save_total_limit = self.save_total_limit or 1

    def objective(self) -> Objective:
        """The part of this that is the loss, as it is at the first step."""
        weights = {name: getattr(self, name) for name in ("kl_weight", "ce_weight", "hidden_weight")}
        if self.hidden_anneal and not self.kl_weight + self.ce_weight:
            raise ValueError("hidden_anneal leaves no loss at the end; give kl_weight or ce_weight above 0 beside it")
        return Objective(self.divergence, self.beta, self.temperature, **weights, chunk_tokens=self.loss_chunk_tokens)


class LrecTrainer(StateFiles, SFTTrainer):
    """trl's SFTTrainer with the loss of `lrec.losses` per target token, against a teacher.

    model: a peft model, or a model with `peft_config`; teacher: a `Teacher`, or a model, which becomes a live one; None
    only for kl_weight = hidden_weight = 0. All else as in SFTTrainer. Logs `kl`, `ce` and `hidden`, means over tokens,
    where they have a weight.

    Raises ValueError for a model without trainable adapters, with a trained head, or with another vocabulary than the
    teacher's; and during training, before anything is saved, when a loss or a gradient is not finite.
    """

    _tag_names: ClassVar[list[str]] = ["lrec", "trl", "peft"]
    _name = "LREC"

    def __init__(
        self,
        model: nn.Module,
        args: LrecConfig | None = None,
        teacher: Teacher | nn.Module | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else LrecConfig("lrec-adapter")
        if teacher is None and args.objective().needs_teacher:
            raise ValueError(
                "kl_weight or hidden_weight > 0 needs teacher=, the full-precision model or its cache; pass it, or set "
                "both to 0"
            )
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics needs logits, which are never made; use lrec.evaluate on the trained model"
            )
        TrainingProgress.in_main_alone()
        super().__init__(model, args, **kwargs)
        args.check_machine(self.accelerator)
        self.add_callback(Watch())
        TrainingProgress.take_over(self)
        self.add_callback(SplitBlocks())
        if args.patience and args.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(args.patience))
        # Counts target tokens over a whole optimizer step for any model, whatever its forward accepts.
        self.model_accepts_loss_kwargs = True
        self.objective = args.objective()
        self._check_trainable()
        if args.embeddings == "cpu":
            keep_on_cpu(self.model)
        verify_head(self.model, Head.of(self.model))
        self.teacher = LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        if self.teacher is not None:
            self._check_vocabulary()
            ready = isinstance(self.train_dataset, Dataset) and "input_ids" in self.train_dataset.column_names
            self.teacher.check(self.objective, self.train_dataset["input_ids"] if ready else [])
            if ready and isinstance(self.eval_dataset, Dataset):
                self.teacher.check(self.objective, self.eval_dataset["input_ids"])
            self.teacher.to(self.accelerator.device)

    def train(self, *args, **kwargs) -> TrainOutput:
        """As transformers does it; one that diverges ends with the best checkpoint, one that is done makes no step."""
        start, told = time.monotonic(), {}
        try:
            with contextlib.suppress(AlreadyTrained):
                return super().train(*args, **kwargs)
        except DivergedError as error:
            told = kept_best(error, self.state.best_model_checkpoint)
        if self.state.best_model_checkpoint:
            self._load_best_model()
        losses = [row["loss"] for row in self.state.log_history if "loss" in row]
        told["train_runtime"] = time.monotonic() - start
        return TrainOutput(self.state.global_step, sum(losses) / max(len(losses), 1), told)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean of L over target tokens: those of the whole optimizer step if `num_items_in_batch` tells them."""
        objective, batch = self.objective, {name: value for name, value in inputs.items() if name != "labels"}
        if self.args.hidden_anneal:
            left = max(0.0, 1 - self.state.global_step / max(self.state.max_steps, 1))
            objective = replace(objective, hidden_weight=left * objective.hidden_weight)
        targets = self.teacher.targets(batch) if objective.needs_teacher else None
        hidden = final_hidden(model, **batch).flatten(0, 1)
        total = divergence(hidden, Head.of(self.model), targets, shift_labels(inputs["labels"]), objective)
        means = self._record(total, batch)
        if num_items_in_batch is None:
            loss = total.loss / max(total.num_tokens, 1)
        else:
            loss = total.loss / torch.as_tensor(num_items_in_batch, device=total.loss.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                # The count is over all processes, and DDP averages gradients over them.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, means) if return_outputs else loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer that `optim` names; trained scales and zeros have rates of their own. It steps one parameter at
        a time, see `lrec.optimizers`, if gradients are applied in backward or adapters are in bfloat16."""
        optimizer = super().create_optimizer(model)
        reach, steps = self.args.codes_reach, self.state.max_steps
        own = trained.parameter_groups(self.model, self.args.scales_learning_rate, reach, steps)
        taken = {id(p) for group in own for p in group["params"]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        for group in own:
            optimizer.add_param_group(group)
        if self.args.fused_backward or any(
            p.dtype == torch.bfloat16 for p in self.model.parameters() if p.requires_grad
        ):
            self.optimizer = OneByOne(optimizer)
            if self.args.fused_backward:
                self.optimizer.fuse()
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        # Of a base without adapters only what was trained is saved.
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            trained.save(self.model, Path(output_dir or self.args.output_dir))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not isinstance(self.model, PeftModel):
            trained.load(self.model, Path(resume_from_checkpoint))
            return
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        names = self.model.active_adapters
        if len(names) > 1:
            # transformers makes one adapter active, and takes it for the trained one.
            self.model.set_adapter("default")
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if len(names) > 1:
            activate(self.model, names, learning="default")
        # peft widens adapters that it loads to float32.
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As trl does; with fused_backward there is no norm of all gradients to tell."""
        if self.args.fused_backward:
            logs.pop("grad_norm", None)
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: logits are never made. Rows that fill up the last batch of several processes do not count."""
        inputs, loader = self._prepare_inputs(inputs), self.accelerator.gradient_state
        if loader.end_of_dataloader and loader.remainder > 0:
            own = loader.remainder - self.accelerator.process_index * self.args.eval_batch_size
            inputs["labels"][max(own, 0) :] = IGNORE
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _record(self, total, batch: dict[str, Tensor]) -> dict[str, float]:
        mode = "train" if self.model.training else "eval"
        seen = total.kl.new_tensor([total.num_tokens, batch["input_ids"].numel()])
        parts = torch.stack([total.kl, total.ce, total.hidden, *seen])
        *sums, num_tokens, num_seen = self.accelerator.reduce(parts).tolist()
        if not math.isfinite(sum(sums)):
            raise DivergedError(self._where_not_finite(batch))
        if mode == "eval":
            # The mean over an evaluation is one of tokens, not of batches, however many processes share these.
            before = self._evaluated if self._metrics[mode] else [0.0] * 4
            self._evaluated = [a + b for a, b in zip(before, (*sums, num_tokens), strict=True)]
            *sums, num_tokens = self._evaluated
        terms = {name: value / max(num_tokens, 1) for name, value in zip(("kl", "ce", "hidden"), sums, strict=True)}
        means = {name: value for name, value in terms.items() if getattr(self.objective, f"{name}_weight")}
        for name, value in means.items():
            self._metrics[mode][name] = [*(self._metrics[mode][name] if mode == "train" else ()), value]
        self._total_train_tokens += int(num_seen) // self._tp_size if mode == "train" else 0
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return means

    def _where_not_finite(self, batch: dict[str, Tensor]) -> str:
        models = {"the model": self.model, "the teacher": getattr(self.teacher, "model", None)}
        found = [(who, name) for who, m in models.items() if m is not None and (name := first_not_finite(m, batch))]
        where = (
            f"the first output that is not finite is that of {found[0][1]} in {found[0][0]}" if found else "in the loss"
        )
        return (
            f"the loss is not finite at step {self.state.global_step + 1}: {where}; training stopped and nothing was "
            "saved since the last checkpoint. If it is the first step, check the weights; else lower learning_rate"
        )

    def _check_trainable(self) -> None:
        if any(p.requires_grad for p in output_layer(self.model).parameters()):
            raise ValueError(
                "the head is trainable, but only adapters, scales and zeros are: pass peft_config=, or freeze the base"
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("nothing is trainable: pass peft_config=, or a peft model loaded with is_trainable=True")

    def _check_vocabulary(self) -> None:
        vocab_size = Head.of(self.model).weight.shape[0]
        if self.teacher.vocab_size != vocab_size:
            raise ValueError(
                f"the teacher has {self.teacher.vocab_size} logits and the model {vocab_size}; "
                "use the model that this one was quantized from"
            )
