"""Bytes that training will take, part by part, before anything is allocated.

Everything follows from a configuration and the settings of a run. Sizes of weights are read off the model's skeleton;
what a block keeps and needs is rehearsed on fake tensors (`lrec.rehearsal`); what remains is arithmetic. A step has
a few moments at which memory may be fullest; each is a sum of named parts, and the peak is the largest of the sums:

    forward          checkpoints, one block at work (with checkpoints only)
    loss             kept activations, the loss's buffers
    last block       kept activations, the block's backward, the gradient that the loss gave
    first block      the block's backward, all gradients of the adapters
    optimizer step   all gradients, the optimizer's temporaries

Weights, adapters and the optimizer's states are there at all times. A new setting is a change of one term.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrec import anatomy, lora_bits, losses, shapes, trained
from lrec.ends import keep_stored
from lrec.head import SLICE_WEIGHTS, output_layer
from lrec.kernels import native, reference
from lrec.nn import PackedLinear, PackedModule, TiedLinear
from lrec.rehearsal import Kept, rehearse
from lrec.stream import MMAP_BYTES

CUDA_CONTEXT_BYTES = 500_000_000  # context, cuBLAS workspace and loaded kernels: in nvidia-smi, in no torch counter
# Python's objects for a linear under an adapter: 6.4 MB for the 210 of SmolLM2, CPython 3.11, peft 0.21.
MODULE_BYTES = 30_000
# Bytes of optimizer state per trained parameter; what is not listed is taken for Adam in float32, 8.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4,
               "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop_bnb_8bit": 1,
               "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # fmt: skip
EIGHT_BIT_PARAMETERS = 4096  # bitsandbytes keeps float32 states of smaller tensors


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a training run decides its memory. Dtypes are those of computation, of stored embeddings and head, and
    of adapters; `checkpointing` is none, block or split; `own_teacher_head` means a cached teacher whose head is not
    the student's."""

    bits: int = 2
    group_size: int = 128
    quantize_embeddings: int | None = None
    train: str = "adapters"
    reconstruct_epochs: int = 0
    reconstruct_reach: float = 0.0
    match_upstream: float = 0.0
    end_loss_hessian: bool = False
    lora_r: int = 16
    target_modules: str | list[str] = "all-linear"
    lora_dtype: torch.dtype = torch.float32
    lora_bits: int = 16
    rank_pattern: dict[str, int] = field(default_factory=dict)
    batch_size: int = 1
    max_length: int = 512
    checkpointing: str = "block"
    offload_checkpoints: bool = False
    embeddings: str = "device"
    stream_weights: bool = False
    optimizer: str = "adamw"
    fused_backward: bool = False
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    loss_chunk_tokens: int | None = None
    own_teacher_head: bool = False
    dtype: torch.dtype = torch.float32
    stored_dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.max_length


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
    blocks = rehearse(model, setup.batch_size, setup.max_length, setup.fused_backward)
    trained = [p for p in model.parameters() if p.requires_grad]
    always = weights(model, setup) | standing(model, trained, setup)
    moments = step_moments(model, blocks, sum(map(_bytes, trained)), setup)
    if setup.fused_backward:
        del moments["optimizer step"]
    for name, parts in moments.items():
        if name == "optimizer step" or (setup.fused_backward and "block" in name):
            parts["temporaries"] = update_bytes(trained, setup)
        # glibc keeps the small gradients' memory for the next step, where they then are.
        parts["freed gradients"] = max(0, always.get("freed gradients", 0) - parts.get("gradients", 0))
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Prediction(moment, {name: n for name, n in (always | moments[moment]).items() if n})


def standing(model: nn.Module, trained: list[Tensor], setup: Setup) -> dict[str, int]:
    """What is there at all times besides frozen weights: adapters, their optimizer's states, a batch's targets."""
    parts = {"adapters": sum(map(_bytes, trained)), "optimizer": sum(state_bytes(p, setup.optimizer) for p in trained)}
    if setup.device == "cpu":
        parts["modules"] = sum(isinstance(module, PackedModule) for module in model.modules()) * MODULE_BYTES
        if not setup.fused_backward:
            parts["freed gradients"] = sum(_bytes(p) for p in trained if _bytes(p) < MMAP_BYTES)
    if setup.kl_weight:
        parts["targets"] = setup.tokens * output_layer(model).in_features * torch.bfloat16.itemsize
    return parts


def step_moments(model: nn.Module, blocks: list[Kept], gradients: int, setup: Setup) -> dict[str, dict[str, int]]:
    """The moments at the top of this file, each with its parts; `gradients` are the bytes of all adapters' ones."""
    hidden = setup.tokens * output_layer(model).in_features
    kept = "activations" if setup.checkpointing == "none" else "checkpoints"
    # Offloaded, a block's own are there while it runs, and the next one's come in meanwhile.
    blocks_kept = 2 * max(b.kept for b in blocks) if setup.offload_checkpoints else sum(b.kept for b in blocks)
    # The embeddings' output, the final norm's, and what that one keeps in float32.
    states = blocks_kept + hidden * (2 * setup.dtype.itemsize + 4)
    loss_grad = hidden * setup.dtype.itemsize
    kernel = kernel_bytes(setup.device)
    first, last = blocks[0], blocks[-1]
    if setup.fused_backward:
        gradients = 0  # the one that is alive is in the block's backward
    own = gradients // len(blocks)
    moments = {
        "loss": {kept: states, "loss": loss_bytes(model, setup) + loss_grad},
        "last block": {kept: states, "block": last.backward - own, "loss": loss_grad, "gradients": own,
                       "kernel": kernel},
        "first block": {kept: first.kept, "block": first.backward - own, "gradients": gradients, "kernel": kernel},
        "optimizer step": {"gradients": gradients},
    }  # fmt: skip
    if kept == "checkpoints":
        moments["forward"] = {kept: states, "block": max(block.forward for block in blocks), "kernel": kernel}
    return moments


def state_bytes(parameter: Tensor, optimizer: str) -> int:
    """Bytes of the optimizer's state of a parameter; 8-bit states come with a float32 scale per 256 and state."""
    per_parameter = STATE_BYTES.get(optimizer, 8)
    if not optimizer.endswith("8bit"):
        return per_parameter * parameter.numel()
    if parameter.numel() < EIGHT_BIT_PARAMETERS:
        return 4 * per_parameter * parameter.numel()
    return per_parameter * (parameter.numel() + 4 * -(-parameter.numel() // 256))


def update_bytes(trained: list[Tensor], setup: Setup) -> int:
    """Temporaries of an optimizer step: of all parameters where torch steps them together, as on a GPU; else of the
    largest: two for Adam, and in bfloat16 the widened parameter and gradient besides (`lrec.optimizers.OneByOne`)."""
    sizes, narrow = [4 * p.numel() for p in trained], setup.lora_dtype == torch.bfloat16
    if setup.device == "cuda" and not setup.fused_backward and not narrow:
        return sum(sizes)
    return max(sizes) * (4 if narrow else 2)


def adapted_skeleton(config, setup: Setup) -> nn.Module:
    """The model of a configuration on the meta device, its blocks' linears packed and what is trained trainable.

    A configuration of a packed model says how each layer is packed; else it is `bits`, `group_size` and
    `quantize_embeddings`.
    """
    from peft import LoraConfig, get_peft_model

    from lrec import prepare_model_for_training
    from lrec.integrations.checkpointing import split_blocks

    model = shapes.skeleton(config, setup.dtype)
    shapes.pack_empty(model, config, setup.bits, setup.group_size, setup.quantize_embeddings)
    if not isinstance(model.get_input_embeddings(), PackedModule):
        model = keep_stored(model, setup.stored_dtype)
    checkpointed = setup.checkpointing != "none"
    model = prepare_model_for_training(model, use_gradient_checkpointing=checkpointed)
    kinds = trained.kinds_of(setup.train)
    if "adapters" in kinds:
        shape = {"r": setup.lora_r, "rank_pattern": setup.rank_pattern, "target_modules": setup.target_modules}
        model = get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(setup.lora_dtype)
    if setup.lora_bits == 8:
        lora_bits.start(model)
    trained.start(model, kinds)
    if setup.checkpointing == "split":
        split_blocks(model)
    return model


def weights(model: nn.Module, setup: Setup) -> dict[str, int]:
    """Bytes of the frozen weights: packed (streamed ones: the two largest blocks'), embeddings, head, all else."""
    packed = [
        sum(_held(m) for m in block.modules() if isinstance(m, PackedLinear))
        for block in anatomy.find_blocks(model).modules
    ]
    embedding, head = model.get_input_embeddings(), output_layer(model)
    ends = {id(p) for module in (embedding, head) for p in module.parameters()}
    others = {id(p): _bytes(p) for p in model.parameters() if not p.requires_grad and id(p) not in ends}
    elsewhere = setup.embeddings == "cpu" and setup.device != "cpu" and not _tied(model)
    return {
        "packed weights": sum(sorted(packed)[-2:]) if setup.stream_weights else sum(packed),
        "embeddings": 0 if elsewhere else _held(embedding),
        "head": 0 if _tied(model) else _held(head),
        "teacher's head": head.in_features * head.out_features * 2 if setup.own_teacher_head else 0,
        "norms": sum(others.values()),
    }


def loss_bytes(model: nn.Module, setup: Setup) -> int:
    """What `lrec.losses` needs at once: the buffers of a chunk, the gradient in the hidden states, and the slice of a
    head in half precision that is cast to float32, with its product; or the product with a packed head."""
    head, config = output_layer(model), model.config.get_text_config()
    V, H = head.out_features, head.in_features
    rows = min(setup.loss_chunk_tokens or max(16, losses.CHUNK_LOGITS // V), setup.tokens)
    capped = getattr(config, "final_logit_softcapping", None) is not None
    # student and spare always, teacher for a KL, ce for a cross-entropy, slope for a soft cap
    buffers = 2 + bool(setup.kl_weight) + bool(setup.ce_weight) + capped
    if isinstance(head, PackedLinear):
        product = 4 * rows * V + kernel_bytes(setup.device)
    else:
        half = head.weight.dtype != torch.float32 or setup.own_teacher_head
        product = 4 * max(1, SLICE_WEIGHTS // H) * (H + rows) if half else 0
    return 4 * buffers * rows * V + setup.tokens * H * setup.dtype.itemsize + 3 * 4 * rows * H + product


def kernel_bytes(device: str) -> int:
    """Workspace of a product with a packed weight beside its input and output."""
    if device == "cpu" and native.missing() is None:
        return 4 * native.PANEL_WEIGHTS
    return 4 * 4 * reference.SLICE_WEIGHTS  # codes, their float32 values, the scaled ones and a cast


def told(run, model: nn.Module, teacher, config, meter) -> dict:
    """Predicted and measured peak bytes of a training that has run: its `Train`, peft model, teacher, LrecConfig and
    `Meter`. A live teacher's weights are a part."""
    base = trained.base_of(model)
    embedding = base.get_input_embeddings()
    dtype = embedding.dtype if isinstance(embedding, PackedModule) else embedding.weight.dtype
    of_run, lora = ("train", "lora_bits", "max_length", "stream_weights"), run.lora_shape()
    of_step = ("offload_checkpoints", "embeddings", "fused_backward", "kl_weight", "ce_weight", "loss_chunk_tokens")
    setup = Setup(
        **{name: getattr(run, name) for name in of_run},
        **{name: getattr(config, name) for name in of_step},
        lora_r=lora["r"],
        rank_pattern=lora["rank_pattern"],
        target_modules=lora["target_modules"],
        lora_dtype=getattr(torch, run.lora_dtype),
        batch_size=config.per_device_train_batch_size,
        checkpointing=config.checkpointed_parts,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        own_teacher_head=getattr(teacher, "head", None) is not None,
        dtype=dtype,
        stored_dtype=dtype,
        device=meter.device.type,
    )
    measured = meter.report()
    parts = training(base.config, setup).parts
    if frozen := sum(_bytes(p) for name, p in model.named_parameters() if ".lora_" in name and not p.requires_grad):
        parts["adapter below"] = frozen
    live = getattr(teacher, "model", None)
    if live is not None:
        parts["teacher"] = sum(map(_bytes, live.parameters()))
    if meter.device.type == "cpu" and not run.lean_malloc:
        measured["measured_with"] = (
            "glibc's heap, which keeps freed tensors; predicted are tensors in use, which --lean_malloc comes near to"
        )
    return {"predicted_peak_bytes": sum(parts.values()), **measured, "parts": rows(parts)}


def rows(parts: dict[str, int]) -> list[dict]:
    """Parts as rows of a report."""
    return [{"part": name, "bytes": n} for name, n in parts.items()]


def _held(module: nn.Module) -> int:
    if isinstance(module, PackedModule):
        return module.packed.nbytes - sum(_bytes(module._parameters[field]) for field in module.trained)
    return sum(map(_bytes, module.parameters()))


def _tied(model: nn.Module) -> bool:
    if isinstance(output_layer(model), TiedLinear):
        return True
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
