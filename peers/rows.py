"""Which rows there are, and all that each depends on.

A label is PEER:BITS, PEER:BITS:lora_r=16, a label of `ours.ROWS`, or `full precision`. What is made for a row lies in
runs/peers under a name with a digest of its settings, so that a finished row is not made again until these change.
"""

import hashlib
import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from peers import PEERS, WIDTHS, ours

MODEL = "smollm2"
WORK = Path("runs/peers")
FULL = "full precision"
TEST = {"dataset": "wikipedia:test", "num_samples": 24, "max_length": 512}
TRAIN = {"dataset": "wikipedia:train", "num_samples": 64, "max_length": 256}
# What a peer that takes text may learn its rounding from.
CALIBRATION = TRAIN | {"num_samples": 128}
SEED = 0
# On every linear that is quantized.
LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
# The loss, rate and schedule are `lrec train`'s own defaults: KL(teacher || student), 1e-3, cosine.
TRAINING = {
    "max_steps": TRAIN["num_samples"],
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
    "logging_steps": 8,
    "save_strategy": "no",
    "seed": SEED,
}
CACHE = (
    f"cache --model {MODEL} --dataset {TRAIN['dataset']} --num_samples {TRAIN['num_samples']} "
    f"--max_length {TRAIN['max_length']} --seed {SEED}"
)


@dataclass(frozen=True)
class Label:
    """A row's name taken apart. Raises ValueError for one that names no row."""

    text: str

    def __post_init__(self):
        if not (self.text == FULL or self.own or re.fullmatch(rf"({'|'.join(PEERS)}):\d(:lora_r=\d+)?", self.text)):
            known = ", ".join([FULL, *(row.label for row in ours.ROWS), *(f"{peer}:BITS" for peer in PEERS)])
            raise ValueError(f"{self.text!r} names no row; rows are {known}, and PEER:BITS:lora_r={LORA['r']}")

    @property
    def own(self) -> ours.Ours | None:
        """The row of lrec's that it names, if any."""
        return next((row for row in ours.ROWS if row.label == self.text), None)

    @property
    def peer(self) -> ModuleType | None:
        """The peer's file, if it is a peer's."""
        name = self.text.partition(":")[0]
        return importlib.import_module(f"peers.{name}") if name in PEERS else None

    @property
    def bits(self) -> int:
        """The width of a peer's row."""
        return int(self.text.split(":")[1])

    @property
    def absent(self) -> str | None:
        """Why a peer has no such row, if it has none."""
        if not self.peer:
            return None
        return self.peer.ABSENT.get(self.bits) or (getattr(self.peer, "NO_LORA", None) if self.base else None)

    @property
    def base(self) -> "Label | None":
        """Of a row with adapters, the row without."""
        return Label(self.text.partition(":lora")[0]) if ":lora" in self.text else None

    @property
    def settings(self) -> dict:
        """All that the row depends on; another digest is another row."""
        found = {"label": self.text, "model": MODEL, "test": TEST}
        if self.own:
            return found | {"commands": list(self.own.commands("OUT", "CACHE").values()), "cache": CACHE}
        if self.peer:
            found |= {"peer": self.peer.SETTINGS, "calibration": CALIBRATION | {"seed": SEED}}
        return found | ({"lora": LORA, "training": TRAINING, "cache": CACHE} if self.base else {})

    @property
    def place(self) -> Path:
        """Its folder."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return WORK / f"{re.sub(r'[^A-Za-z0-9=_]+', '-', self.text)}-{digest}"

    @property
    def row(self) -> Path:
        """The file that holds the finished row."""
        return self.place / "row.json"


def labels() -> list[Label]:
    """All rows, the quick ones first."""
    *quick, slow = PEERS
    base = [f"{peer}:{bits}" for peer in quick for bits in WIDTHS]
    tuned = [f"{slow}:{bits}" for bits in WIDTHS]
    names = [FULL, *base, *(row.label for row in ours.ROWS), *map(with_lora, base), *tuned, *map(with_lora, tuned)]
    found = [Label(name) for name in names]
    return [label for label in found if not (label.base and label.base.absent)]


def with_lora(name: str) -> str:
    """The label of a peer's row with adapters on it."""
    return f"{name}:lora_r={LORA['r']}"
