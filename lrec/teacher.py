"""Where the student's targets come from: what the full-precision model makes of the same tokens.

A `Teacher` answers one call, `targets(batch)`, with an object that the loss can ask for a divergence. The trainer
cannot tell whether a model ran just now, as in `LiveTeacher`, or whether hidden states or the largest logits of these
tokens were read from disk: a cache finds them by the batch's `input_ids`.
"""

import torch
from torch import Tensor, nn

from lrec.head import Head, head_input, verify_head
from lrec.losses import Targets

PROBE = "The quick brown fox, 2^10 = 1024; été, Ελλάδα, 東京.\n\tdef f(x): return x[::-1]  # 🙂"


def final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs) -> Tensor:
    """What the output layer is given, (B, L, H), for all positions; logits are made for the last one only.

    Runs the whole model, wrappers of peft and DistributedDataParallel included, so that all their hooks run;
    `inputs` go to its forward. Differentiable. Raises ValueError if the model does not run its output layer once.
    """
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    with head_input(model, last_only=True) as seen:
        model(input_ids=input_ids, **{"use_cache": False, **inputs})
    if len(seen) != 1:
        raise ValueError(
            f"{type(model).__name__} ran its output layer {len(seen)} times in one forward, but 1 is supported; "
            "load it with AutoModelForCausalLM"
        )
    return seen[0]


class Teacher:
    """What a trainer asks. A subclass answers `targets`; the other methods have a default that does nothing."""

    vocab_size: int

    def targets(self, batch: dict[str, Tensor]) -> Targets:
        """Targets of all B*L positions of a batch, which holds `input_ids` (B, L) and what else the model is given."""
        raise NotImplementedError

    def to(self, device: torch.device) -> "Teacher":
        """Moves what must stand on the student's device, and returns itself."""
        return self


class LiveTeacher(Teacher):
    """The model in memory, in evaluation mode, without gradients.

    Raises ValueError if its head is not found, or does not make the model's own logits.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        verify_head(model, Head.of(model))
        self.vocab_size = Head.of(model).weight.shape[0]

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> Targets:
        """See `Teacher.targets`."""
        self.model.eval()
        hidden = final_hidden(self.model, **{name: value for name, value in batch.items() if name != "labels"})
        return Targets(hidden.flatten(0, 1), Head.of(self.model))

    def to(self, device: torch.device) -> "LiveTeacher":
        """Moves the model unless accelerate has already spread it over devices."""
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)
        return self


def check_tokenizers(teacher, student) -> None:
    """Raises ValueError unless both tokenizers have as many tokens and split a probe text (words, digits, accents,
    scripts, code, an emoji) into the same ids: a KL between different vocabularies means nothing."""
    sizes = len(teacher), len(student)
    ids = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (teacher, student)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        first = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        raise ValueError(
            f"the teacher's tokenizer has {sizes[0]} tokens and the student's {sizes[1]}, and a probe text "
            f"{'gives the same ids' if ids[0] == ids[1] else f'gives other ids from token {first} on'}; "
            "the student must be made from this teacher: name the model it was quantized from"
        )
