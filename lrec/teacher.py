"""Where the student's targets come from: what the full-precision model makes of the same tokens.

A `Teacher` answers one call, `targets(batch)`, with an object that the loss can ask for a divergence. The trainer
cannot tell whether a model ran just now, as in `LiveTeacher`, or whether hidden states or some logits of these tokens
were read from disk, as in `CachedTeacher`, which finds them by the batch's `input_ids`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec.cache import TargetCache, tokenizer_mark
from lrec.formats import Packed
from lrec.head import Head, head_input, verify_head
from lrec.losses import Objective, Targets
from lrec.topk import Sampled, TopK, unpack_ids

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

    def check(self, objective: Objective, windows: Sequence[list[int]]) -> None:
        """Raises ValueError, before training starts, if it cannot serve this objective on these windows of ids."""

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


class CachedTeacher(Teacher):
    """Targets that `lrec cache` wrote: hidden states, or a few logits of each token.

    student: the model to be trained. If its head is the teacher's, bit for bit, it serves for both, and the cache's
    own copy stays on disk. Raises ValueError if the cache is unfinished or was altered.
    """

    def __init__(self, cache: TargetCache | Path, student: nn.Module | None = None):
        self.cache = cache if isinstance(cache, TargetCache) else TargetCache(cache)
        self.kind, self.vocab_size = self.cache.about["kind"], self.cache.about["vocab_size"]
        self.student, self.head = student, None
        if self.kind == "hidden":
            head = self.cache.head()
            if student is None or not same_head(head, Head.of(student)):
                self.student, self.head = None, head

    def targets(self, batch: dict[str, Tensor]) -> Targets | TopK:
        """See `Teacher.targets`. Raises ValueError for a window that is not in the cache."""
        stored = {name: tensor.flatten(0, 1) for name, tensor in self.cache.read(batch["input_ids"]).items()}
        if self.kind == "hidden":
            # The student's head is looked up anew each time: moving a model to a device gives it other tensors.
            head = Head.of(self.student) if self.head is None else self.head
            if stored["hidden"].shape[-1] != head.weight.shape[1]:
                raise ValueError(f"{self.cache.directory} has hidden states that its head does not take; make it anew")
            return Targets(stored["hidden"].to(head.weight.device), head)
        ids = unpack_ids({name: stored[name] for name in stored if name.startswith("ids")})
        if ids.shape != stored["values"].shape or int(ids.max()) >= self.vocab_size or int(ids.min()) < 0:
            raise ValueError(f"{self.cache.directory} names tokens that are none of {self.vocab_size}; make it anew")
        return {"topk": TopK, "sampled": Sampled}[self.kind](stored["values"], ids, stored["lse"])

    def check(self, objective: Objective, windows: Sequence[list[int]]) -> None:
        """See `Teacher.check`."""
        if self.kind != "hidden" and objective.hidden_weight:
            raise ValueError(
                f"hidden_weight > 0 needs hidden states, but {self.cache.directory} holds logits ({self.kind}); "
                "set it to 0, or make a cache with --what hidden"
            )
        if self.kind != "hidden" and objective.kl_weight:
            {"topk": TopK, "sampled": Sampled}[self.kind].check(objective)
        missing = self.cache.missing(windows)
        if missing:
            raise ValueError(
                f"{missing} of {len(windows)} training windows are not in {self.cache.directory}; train on the "
                "windows it was made of: the same dataset, num_samples, max_length and seed"
            )

    def to(self, device: torch.device) -> "CachedTeacher":
        """Moves the head, if it is not the student's."""
        self.head = None if self.head is None else self.head.to(device)
        return self


def same_head(stored: Head, live: Head) -> bool:
    """Whether a model's head has the stored weights and equation, in whatever dtype the model was loaded."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        parts = zip(a.split(1024), b.split(1024), strict=True)
        return a.shape == b.shape and all(torch.equal(x.to(y.device, y.dtype), y) for x, y in parts)

    if isinstance(live.weight, Packed):
        return False
    equation = (stored.softcap, stored.scale) == (live.softcap, live.scale)
    return equation and same(stored.weight, live.weight) and same(stored.bias, live.bias)


def open_cache(directory: str | Path, tokenizer, teacher_sha256: str | None) -> TargetCache:
    """The complete cache in a directory, made with this tokenizer by the teacher of this fingerprint (None: any).

    Raises ValueError if it is another's, unfinished or altered.
    """
    cache = TargetCache(directory)
    if teacher_sha256 is not None and cache.about["teacher_sha256"] != teacher_sha256:
        raise ValueError(
            f"{directory} is the cache of another teacher, {cache.about['teacher']} (weights "
            f"{cache.about['teacher_sha256'][:12]}, wanted {teacher_sha256[:12]}); make one from the model that the "
            "student was quantized from, or name the cache's teacher with --teacher"
        )
    if cache.about["tokenizer"] != tokenizer_mark(tokenizer):
        raise ValueError(
            f"{directory} was made with another tokenizer, of {cache.about['tokenizer']['size']} tokens, than the "
            f"student's, of {len(tokenizer)}; make a cache of the model that the student was quantized from"
        )
    return cache


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
