"""Bytes that quantizing, caching a teacher and training will take, part by part, before anything is allocated.

Everything follows from a configuration and the settings of a run. Sizes of weights are read off the model's skeleton;
what a block keeps and needs is rehearsed on fake tensors (`lrec.rehearsal`); what remains is arithmetic. A step has
four moments at which memory may be fullest; each is a sum of named parts, and the peak is the largest of the sums:

    loss             kept activations, the loss's buffers
    last block       kept activations, the block's backward, the gradient that the loss gave
    first block      the block's backward, all gradients of the adapters
    optimizer step   all gradients, the optimizer's temporaries

Weights, adapters and the optimizer's states are there at all times. A new setting is a change of one term.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lrec import anatomy, losses, shapes
from lrec.ends import keep_stored
from lrec.head import SLICE_WEIGHTS, output_layer
from lrec.kernels import native, reference
from lrec.nn import PackedLinear
from lrec.rehearsal import Kept, rehearse
from lrec.stream import MMAP_BYTES

CUDA_CONTEXT_BYTES = 500_000_000  # context, cuBLAS workspace and loaded kernels: in nvidia-smi, in no torch counter
# Python's objects for a linear under an adapter: 6.4 MB for the 210 of SmolLM2, CPython 3.11, peft 0.21.
MODULE_BYTES = 30_000
# Bytes of optimizer state per trained parameter; what is not listed is taken for Adam, 8.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "lion_32bit": 4, "lion_8bit": 1, "adamw_bnb_8bit": 2,
               "adamw_8bit": 2, "paged_adamw_8bit": 2}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a training run decides its memory. Dtypes are those of computation and of stored embeddings and head."""

    bits: int = 2
    group_size: int = 128
    lora_r: int = 16
    target_modules: str | list[str] = "all-linear"
    batch_size: int = 1
    max_length: int = 512
    gradient_checkpointing: bool = True
    stream_weights: bool = False
    optimizer: str = "adamw"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    loss_chunk_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    stored_dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes: `moment` is when memory is fullest, `parts` what it holds then."""

    moment: str
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def training(config, setup: Setup) -> Prediction:
    """A training step of a model of this configuration, targets cached. Raises ValueError for settings that no layer
    of it can have."""
    model = adapted_skeleton(config, setup)
    blocks = rehearsed(model, setup)
    always = weights(model, setup)
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    always |= {"adapters": adapters, "optimizer": trained * STATE_BYTES.get(setup.optimizer, 8)}
    if setup.device == "cpu":
        small = [p for p in model.parameters() if p.requires_grad and _bytes(p) < MMAP_BYTES]
        always |= {"modules": _num_adapted(model) * MODULE_BYTES, "freed gradients": sum(map(_bytes, small))}
    tokens, hidden_size = setup.batch_size * setup.max_length, output_layer(model).in_features
    width = setup.dtype.itemsize
    if setup.kl_weight:
        always["targets"] = tokens * hidden_size * torch.bfloat16.itemsize
    kept = "checkpoints" if setup.gradient_checkpointing else "activations"
    # The embeddings' output, the final norm's, and what that one keeps in float32.
    states = sum(block.kept for block in blocks) + tokens * hidden_size * (2 * width + 4)
    loss_grad = tokens * hidden_size * width
    kernel = kernel_bytes(setup.device)
    first, last = blocks[0], blocks[-1]
    own = adapters // len(blocks)
    moments = {
        "loss": {kept: states, "loss": loss_bytes(output_layer(model), config, setup) + loss_grad},
        "last block": {kept: states, "block": last.backward - own, "loss": loss_grad, "gradients": own,
                       "kernel": kernel},
        "first block": {kept: first.kept, "block": first.backward - own, "gradients": adapters, "kernel": kernel},
        "optimizer step": {"gradients": adapters, "temporaries": adapters if setup.device == "cuda" else 0},
    }  # fmt: skip
    if setup.gradient_checkpointing:
        widest = max(block.forward for block in blocks)
        moments["forward"] = {kept: states, "block": widest, "kernel": kernel}
    for parts in moments.values():
        # glibc keeps the small gradients' memory for the next step, where they then are.
        parts["freed gradients"] = max(0, always.get("freed gradients", 0) - parts.get("gradients", 0))
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Prediction(moment, {name: n for name, n in (always | moments[moment]).items() if n})


def quantizing(config, setup: Setup, calibration_tokens: int) -> dict[str, int]:
    """Parts of the block-by-block pass: one block, hidden states of all calibration tokens, statistics of its widest
    input (Hessian, its inverse and its factor), and what the solver holds of its largest weight in float32."""
    model = shapes.skeleton(config, setup.dtype)
    blocks = anatomy.find_blocks(model).modules
    sizes = [sum(p.numel() for p in block.parameters()) * setup.dtype.itemsize for block in blocks]
    linears = anatomy.linears(blocks[0]).values()
    widest = max(linear.in_features for linear in linears)
    largest = max(linear.weight.numel() for linear in linears)
    inputs = {linear.in_features for linear in linears}
    return {
        "block": max(sizes),
        "hidden states": calibration_tokens * output_layer(model).in_features * setup.dtype.itemsize,
        # Each group of linears that share an input has a Hessian until its turn comes.
        "statistics": 4 * (sum(k * k for k in inputs) + 2 * min(inputs) ** 2) + 3 * 4 * widest**2,
        "solver": 4 * 4 * largest,
    }


def caching(config, setup: Setup) -> dict[str, int]:
    """Parts of streaming the teacher: two blocks of it, a micro-batch's hidden states and the block's forward."""
    model = shapes.skeleton(config, setup.dtype)
    blocks = anatomy.find_blocks(model).modules
    width = setup.dtype.itemsize
    sizes = sorted(sum(p.numel() for p in block.parameters()) * width for block in blocks)
    tokens = setup.batch_size * setup.max_length
    widest = max(max(m.in_features, m.out_features) for m in anatomy.linears(blocks[0]).values())
    return {
        "two blocks": sum(sizes[-2:]),
        "embeddings": _bytes(model.get_input_embeddings().weight),
        "hidden states": 2 * tokens * output_layer(model).in_features * width,
        "forward": 4 * tokens * widest * width,
    }


def adapted_skeleton(config, setup: Setup) -> nn.Module:
    """The model of a configuration on the meta device, its blocks' linears packed and under adapters.

    A configuration of a packed model says how each layer is packed; else it is `bits` and `group_size`.
    """
    from peft import LoraConfig, get_peft_model

    from lrec import prepare_model_for_training

    model = keep_stored(shapes.skeleton(config, setup.dtype), setup.stored_dtype)
    shapes.pack_empty(model, config, setup.bits, setup.group_size)
    model = prepare_model_for_training(model, use_gradient_checkpointing=setup.gradient_checkpointing)
    lora = LoraConfig(r=setup.lora_r, target_modules=setup.target_modules, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, low_cpu_mem_usage=True).train()


def rehearsed(model: nn.Module, setup: Setup) -> list[Kept]:
    """What each block keeps and needs; the skeleton's tensors become fake ones."""
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        return rehearse(model, torch.ones(setup.batch_size, setup.max_length, dtype=torch.int64))


def weights(model: nn.Module, setup: Setup) -> dict[str, int]:
    """Bytes of the frozen weights: packed (streamed ones: the two largest blocks'), embeddings, head, all else."""
    packed = [
        sum(m.packed.nbytes for m in block.modules() if isinstance(m, PackedLinear))
        for block in anatomy.find_blocks(model).modules
    ]
    embedding, head = model.get_input_embeddings(), output_layer(model)
    rest = [p for p in model.parameters() if not p.requires_grad]
    ends = _bytes(embedding.weight), 0 if _tied(model) else _bytes(head.weight)
    others = sum({id(p): _bytes(p) for p in rest}.values()) - _bytes(embedding.weight) - _bytes(head.weight)
    return {
        "packed weights": sum(sorted(packed)[-2:]) if setup.stream_weights else sum(packed),
        "embeddings": ends[0],
        "head": ends[1],
        "norms": others,
    }


def loss_bytes(head: nn.Linear, config, setup: Setup) -> int:
    """What `lrec.losses` needs at once: the buffers of a chunk, the gradient in the hidden states, and the slice of a
    head in half precision that is cast to float32, with its product."""
    V, H = head.out_features, head.in_features
    tokens = setup.batch_size * setup.max_length
    rows = min(setup.loss_chunk_tokens or max(16, losses.CHUNK_LOGITS // V), tokens)
    capped = getattr(config.get_text_config(), "final_logit_softcapping", None) is not None
    # student and spare always, teacher for a KL, ce for a cross-entropy, slope for a soft cap
    buffers = 2 + bool(setup.kl_weight) + bool(setup.ce_weight) + capped
    step = max(1, SLICE_WEIGHTS // H)
    slice_bytes = 4 * step * (H + rows) if head.weight.dtype != torch.float32 else 0
    return 4 * buffers * rows * V + tokens * H * setup.dtype.itemsize + 3 * 4 * rows * H + slice_bytes


def kernel_bytes(device: str) -> int:
    """Workspace of a product with a packed weight beside its input and output."""
    if device == "cpu" and native.missing() is None:
        return 4 * native.PANEL_WEIGHTS
    return 4 * 4 * reference.SLICE_WEIGHTS  # codes, their float32 values, the scaled ones and a cast


def told(run, model: nn.Module, teacher, config, meter) -> dict:
    """Predicted and measured peak bytes of a training that has run: its `Train`, peft model, teacher, LrecConfig and
    `Meter`. A live teacher's weights are a part."""
    base = model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype
    setup = Setup(
        lora_r=run.lora_r,
        target_modules=run.targets(),
        batch_size=config.per_device_train_batch_size,
        max_length=run.max_length,
        gradient_checkpointing=config.gradient_checkpointing,
        stream_weights=run.stream_weights,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        kl_weight=config.kl_weight,
        ce_weight=config.ce_weight,
        loss_chunk_tokens=config.loss_chunk_tokens,
        dtype=dtype,
        stored_dtype=dtype,
        device=meter.device.type,
    )
    measured = meter.report()
    parts = training(base.config, setup).parts
    live = getattr(teacher, "model", None)
    if live is not None:
        parts["teacher"] = sum(map(_bytes, live.parameters()))
    return {"predicted_peak_bytes": sum(parts.values()), **measured, "parts": rows(parts)}


def rows(parts: dict[str, int]) -> list[dict]:
    """Parts as rows of a report."""
    return [{"part": name, "bytes": n} for name, n in parts.items()]


def _num_adapted(model: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def _tied(model: nn.Module) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()
