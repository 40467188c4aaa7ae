"""The entries of `lrec compare`: METHOD[:BITS][:setting=value...], and lists of them that go by a name.

A setting is one of the method, of the pass or of preprocessing. An entry with `train=` is trained after it is
quantized, and may carry settings of `lrec.learning` and of the trainer too; one that both sides have (scale_bits)
holds for both. What decides how much is learned from what is the comparison's own, and the same for all.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from lrec import logbook, lora_bits, options, registry, trained
from lrec.blocks import PassSettings
from lrec.formats.uniform import groups
from lrec.learning import Learning
from lrec.restore import Preprocess

# How a trained entry is trained unless it says otherwise: every token once, in as many steps as there are windows.
TRAINER = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "save_strategy": "no"}
OURS = ("output_dir", "seed", "max_steps", "num_train_epochs", "eval_steps", "resume_from_checkpoint")
# Sides (N, K) of the linears of a model's blocks, by name.
Sides = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Entry:
    """One method of the list: what it is called there, the settings given for quantizing and, where it is trained, for
    training, and all settings that these come to."""

    label: str
    given: dict[str, object]
    settings: dict[str, object]
    training: dict[str, object] | None = None

    @property
    def folder(self) -> str:
        """A file name that no entry with other settings has."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9=_-]+', '_', self.label)[:80]}-{digest[:8]}"

    @property
    def base(self) -> "Entry":
        """What is quantized, the same for all entries that differ in training alone."""
        if self.training is None:
            return self
        method, bits, more = parted(self.label)
        kept = [part for part in more if part.partition("=")[0].replace("-", "_") in self.given]
        settings = {name: value for name, value in self.settings.items() if name != "training"}
        return Entry(":".join([method, *([] if bits is None else [bits]), *kept]), self.given, settings)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained."""
        return self.training is not None and "adapters" in trained.kinds_of(self.settings["training"]["train"])

    @property
    def folds(self) -> bool:
        """Whether all that is trained goes into the packed weights exactly."""
        return self.training is not None and (not self.adapted or self.settings["training"]["lora_pool"])


def labels(methods: str) -> list[str]:
    """The entries of a list: a comma parts them where the name of a method, or of a list, follows."""
    return re.split(rf",(?=(?:{'|'.join(known())})(?:[:,]|$))", methods)


def known() -> tuple[str, ...]:
    """What an entry may begin with."""
    return (*registry.names("quantizers"), *LISTS)


def expand(label: str, sides: Callable[[], Sides]) -> list[str]:
    """The entries that a label stands for: itself, or if it names a list, those of the list for a model of these
    sides, each with the settings that follow the name. Raises ValueError for a width that the list does not have."""
    name, bits, more = parted(label)
    if name not in LISTS:
        return [label]
    if bits not in WIDTHS:
        raise ValueError(
            f"methods, {label!r}: {name} needs a width; allowed: {', '.join(f'{name}:{n}' for n in WIDTHS)}"
        )
    rest = "".join(f":{part}" for part in more)
    return [f"{entry}{rest}" for entry in LISTS[name](int(bits), sides())]


def parted(label: str) -> tuple[str, str | None, list[str]]:
    """The method of an entry, its bits, and its settings as they stand there. Raises ValueError for a list of entries
    that `labels` has not parted, since it holds an unknown method."""
    head, *more = re.split(r":(?=[\w-]+=)", label)
    if stray := re.search(r",([^,:]*)", head):
        raise ValueError(f"methods, {label!r}: {registry.nearest(stray[1], known(), 'quantizer')}")
    method, colon, bits = head.partition(":")
    return method, bits if colon else None, more


def read_entry(label: str, init_rank: int, training: dict[str, object] | None = None) -> Entry:
    """METHOD[:BITS][:setting=value...] with every setting that it comes to.

    init_rank: that of entries that neither say one nor start adapters from the closed form, which needs their own;
    training: what all that are trained have in common. Raises ValueError that begins with the entry, for an unknown
    method or setting, for a value that is refused, and for one that is to be trained without `training`.
    """
    method, bits, more = parted(label)
    given = {} if bits is None else {"bits": bits}
    given |= {name.replace("-", "_"): value for name, _, value in (part.partition("=") for part in more)}
    try:
        if "train" not in given:
            given = {"init_rank": init_rank} | given
            return Entry(label, {"method": method} | given, quantizing(method, given))
        if training is None:
            raise ValueError("train= needs --training_tokens, how many tokens of the dataset all such entries see")
        return trained_entry(label, method, given, init_rank, training)
    except ValueError as error:
        raise ValueError(f"methods, {label!r}: {error}") from error


def quantizing(method: str, given: dict[str, object]) -> dict[str, object]:
    """All settings that those given for `lrec quantize` come to, and the method."""
    *resolved, before = options.fill(given, registry.find("quantizers", method), PassSettings, Preprocess)
    if before.preprocess != "none":
        resolved.append(before)
    return {"method": method} | {name: value for part in resolved for name, value in asdict(part).items()}


def trained_entry(label: str, method: str, given: dict, init_rank: int, training: dict) -> Entry:
    """An entry that is trained. Raises ValueError as `read_entry` does."""
    from lrec.trainer import LrecConfig

    if fixed := [name for name in given if name in OURS]:
        raise ValueError(
            f"{', '.join(fixed)} cannot be an entry's own: all are trained on the same windows in the same order, once "
            "(--training_tokens, --training_length, --seed)"
        )
    parts = (registry.find("quantizers", method), PassSettings, Preprocess, Learning, LrecConfig)
    *_, learning, config = options.fill(TRAINER | given | {"output_dir": "unused"}, *parts)
    kinds = trained.kinds_of(learning.train)
    starts = "adapters" in kinds and learning.lora_init == "closed_form"
    # Where no rank is named, that of the pass holds, or the ranks that it allocates up to that.
    rank = learning.lora_r if starts else init_rank
    given = ({} if rank is None else {"init_rank": rank}) | given
    of_training = {*options.field_types(Learning), *options.field_types(LrecConfig)}
    of_quantizing = {name for part in parts[:3] for name in options.field_types(part)}
    before = {name: value for name, value in given.items() if name in of_quantizing}
    after = TRAINER | {name: value for name, value in given.items() if name in of_training}
    own = {name for cls in LrecConfig.__mro__ if cls.__module__.startswith("lrec.") for name in cls.__annotations__}
    taught = {name: value for name, value in logbook.asked(config).items() if name in {*own, *after} - {*OURS}}
    settings = quantizing(method, before) | {"training": learning.learning() | taught | training}
    return Entry(label, {"method": method} | before, settings, after)


def check_rank(entry: Entry, sides: Sides) -> None:
    """Raises ValueError for adapters of a rank that is larger than a layer they are put on."""
    targets, rank = (entry.settings["training"][name] for name in ("lora_target_modules", "lora_r"))
    rank = rank or 0  # none: the pass says which, and checks it
    reached = [name for name in sides if targets == "all-linear" or name.rpartition(".")[2] in targets.split(",")]
    small = [f"{name} {sides[name]}" for name in reached if rank > min(sides[name])]
    if small:
        most = min(min(sides[name]) for name in reached)
        raise ValueError(
            f"methods, {entry.label!r}: lora_r = {rank} is larger than {', '.join(small[:4])}; allowed: up to {most}"
        )


WIDTHS = ("2", "3", "4")


def layouts(bits: int, sides: Sides) -> list[str]:
    """Six ways, one of them with two kinds of adapters, to spend the bytes that 16-bit scales of groups of 64 take at
    this width, each with what it offers to train: those scales; groups of 128 and adapters of the rank that the rest
    pays, in bfloat16 or int8; rows without groups and outliers of their own; 8-bit scales and zeros; 8-bit scales and
    zeros of groups of 128 and int8 adapters; groups of 128 and more bits for the layers that need them most.

    The ranks are 22, 45 and 50 in Llama-7B, and 2, 5 and 6 where sides are 576, as an adapter costs more there.
    """
    room = grid_bits(sides, 64, 16 + bits)
    plain, eight = (room - grid_bits(sides, 128, each) for each in (16 + bits, 8 + 8))
    per_weight = bits + room / sum(N * K for N, K in sides.values())
    adapters = "correct_stream=true:train=adapters:lora_r"
    return [
        f"gptq:{bits}:group_size=64:scale_bits=16:train=scales",
        f"gptq:{bits}:group_size=128:{adapters}={paid_rank(sides, plain, 16)}",
        f"gptq:{bits}:group_size=128:{adapters}={paid_rank(sides, plain, 8)}:lora_bits=8",
        f"icquant:{bits}:train=scales",
        f"gptq:{bits}:group_size=64:zero_point=float:scale_bits=8:train=scales,zeros",
        f"gptq:{bits}:group_size=128:zero_point=float:scale_bits=8:{adapters}={paid_rank(sides, eight, 8)}:lora_bits=8",
        f"gptq:{bits}:group_size=128:target_bpw={per_weight:.4f}:scale_bits=16:train=scales",
    ]


def grid_bits(sides: Sides, group_size: int, bits: int) -> int:
    """Bits of all grids, if scale and zero of a group take `bits` together."""
    return sum(N * groups(K, group_size) * bits for N, K in sides.values())


def paid_rank(sides: Sides, room: int, width: int) -> int:
    """The largest rank, 1 or more, whose adapters, stored in `width` bits, fit into so many bits."""
    return max(1, room // sum(8 * lora_bits.pair_bytes(shape, 1, width) for shape in sides.values()))


LISTS: dict[str, Callable[[int, Sides], list[str]]] = {"layouts": layouts}
