"""Training steps on a model of a known shape with random packed weights: the memory they take, part by part, beside
what `lrec estimate` says of them, and their speed."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lrec import embeddings, load, memory, offload, shapes
from lrec.bench import keep
from lrec.ends import keep_stored
from lrec.head import Head
from lrec.integrations.checkpointing import split_blocks
from lrec.losses import Objective, Targets, divergence, shift_labels
from lrec.meter import Meter
from lrec.optimizers import OneByOne
from lrec.options import setting
from lrec.stream import lean_malloc
from lrec.teacher import final_hidden


@dataclass(frozen=True, kw_only=True)
class ShapeStep:
    """`lrec bench step --shape`: peak memory and tokens per second of training steps without a model's weights."""

    shape: str = field(metadata={"help": f"{', '.join(shapes.SHAPES)}, a config.json, or a model directory"})
    num_layers: int | None = setting(None, "blocks of the shape (none: all)")
    bits: int = setting(2, "bits of a code")
    group_size: int = setting(128, "columns that share a scale and a zero")
    lora_r: int = setting(16, "rank of the adapters on all linears")
    tokens: int = setting(512, "tokens in a step, one window")
    loss: Literal["kl", "ce"] = setting("kl", "KL to random hidden states through the frozen head, or cross-entropy")
    lora_dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the adapters")
    checkpointing: Literal["none", "block", "split"] = setting("block", "what a block keeps, see `lrec train`")
    fused_backward: bool = setting(False, "each gradient is applied and freed as backward makes it")
    quantize_embeddings: int | None = setting(None, "bits of embeddings and head: 8 or 4 (none: as they are)")
    stream_weights: bool = setting(False, "packed weights stay on disk and visit one block at a time")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "optimizer of the adapters")
    stored_dtype: str = setting("bfloat16", "dtype that embeddings and head are stored in")
    num_steps: int = setting(2, "steps; from the second on the optimizer has its states")
    device: str = setting("auto", "auto (first GPU, else CPU), cpu, cuda")
    dtype: str = setting("auto", "auto (float32 on a CPU, else bfloat16), float32, bfloat16")
    output: str | None = setting(None, "JSON file to which the report is added")

    def run(self) -> dict:
        """Peak bytes, seconds of the fastest step, and the loss of the last, which must be finite."""
        device = load.device_of(self.device)
        if device.type == "cpu":
            lean_malloc()
        dtype = load.dtype_of(self.dtype, device)
        if self.stream_weights and self.checkpointing == "none":
            raise ValueError("stream_weights needs checkpointing block or split: else backward holds every block")
        config = shapes.config_of(self.shape, self.num_layers)
        if self.stream_weights and self.quantize_embeddings:
            raise ValueError("quantize_embeddings is measured with weights in memory: leave stream_weights out")
        predicted = memory.training(config, self.setup(device, dtype))
        # Code that runs for the first time is read from disk: that is the libraries' memory, not the step's.
        self.steps(shapes.config_of("smollm2-135m", 1), device, dtype, tokens=16)
        meter = Meter(device)
        start = time.perf_counter()
        seconds, loss = self.steps(config, device, dtype, self.tokens)
        measured = meter.report()
        report = {
            "shape": self.shape,
            "loss": loss,
            "step_s": round(min(seconds), 3),
            "tokens_per_s": round(self.tokens / min(seconds), 2),
            "seconds": round(time.perf_counter() - start, 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
            **measured,
            "predicted_peak_bytes": predicted.peak_bytes,
            "predicted_over_measured": round(predicted.peak_bytes / measured["measured_peak_bytes"], 3),
            "fullest_at": predicted.moment,
            "parts": memory.rows(predicted.parts),
        }
        return keep(self.output, "step", report)

    def setup(self, device: torch.device, dtype: torch.dtype) -> memory.Setup:
        """The same run as the memory model knows it."""
        return memory.Setup(
            bits=self.bits,
            group_size=self.group_size,
            lora_r=self.lora_r,
            max_length=self.tokens,
            checkpointing=self.checkpointing,
            lora_dtype=load.dtype_of(self.lora_dtype, device),
            fused_backward=self.fused_backward,
            quantize_embeddings=self.quantize_embeddings,
            stream_weights=self.stream_weights,
            optimizer=self.optimizer,
            kl_weight=float(self.loss == "kl"),
            ce_weight=float(self.loss == "ce"),
            dtype=dtype,
            stored_dtype=load.dtype_of(self.stored_dtype, device),
            device=device.type,
        )

    def steps(self, config, device: torch.device, dtype: torch.dtype, tokens: int) -> tuple[list[float], float]:
        """Builds the model and makes the steps; seconds of each, and the last loss."""
        model = shapes.skeleton(config, dtype)
        if not self.quantize_embeddings:
            model = keep_stored(model, load.dtype_of(self.stored_dtype, device))
        model = self.adapted(self.packed(model, config, device))
        optimizer = self.stepper(model)
        text_config = config.get_text_config()
        ids = torch.randint(0, text_config.vocab_size, (1, tokens), device=device)
        hidden = torch.randn(tokens, text_config.hidden_size, dtype=torch.bfloat16, device=device)
        head = Head.of(model)
        objective = Objective(kl_weight=float(self.loss == "kl"), ce_weight=float(self.loss == "ce"))
        seconds = []
        for _ in range(self.num_steps):
            start = time.perf_counter()
            student = final_hidden(model, ids).flatten(0, 1)
            total = divergence(student, head, Targets(hidden, head), shift_labels(ids), objective)
            (total.loss / total.num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds, total.loss.item() / total.num_tokens

    def stepper(self, model) -> torch.optim.Optimizer:
        """The optimizer of the adapters, as the trainer makes it."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.optimizer](trained, lr=1e-4)
        if self.fused_backward or self.lora_dtype == "bfloat16":
            optimizer = OneByOne(optimizer)
        if self.fused_backward:
            optimizer.fuse()
        return optimizer

    def packed(self, model, config, device: torch.device):
        """The skeleton with random packed weights, in memory or in a temporary directory that they visit from."""
        if not self.stream_weights:
            model = shapes.packed_model(model, self.bits, self.group_size, device)
            if self.quantize_embeddings:
                embeddings.pack(model, self.quantize_embeddings)
            return model
        directory = tempfile.TemporaryDirectory()
        files = shapes.packed_files(model, config, self.bits, self.group_size, Path(directory.name))
        model.lrec_offload = offload.attach(model, files, device), directory
        return shapes.fill(model, torch.Generator().manual_seed(0), device)

    def adapted(self, base):
        """The base under fresh adapters on all linears, in training mode."""
        from peft import LoraConfig, get_peft_model

        from lrec import prepare_model_for_training

        torch.manual_seed(0)
        base = prepare_model_for_training(base, use_gradient_checkpointing=self.checkpointing != "none")
        lora = LoraConfig(r=self.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, lora).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, self.lora_dtype))
        if self.checkpointing == "split":
            split_blocks(model)
        return model
