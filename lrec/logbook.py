"""What a run was asked, on what it ran and how its memory went, kept beside what it made: `lrec report` tells it."""

import dataclasses
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from lrec import checkpoint, machine
from lrec.memory_curve import MemoryCurve

FILE = "lrec_run.json"


def write(directory: str | Path, verb: str, settings: list, curve: MemoryCurve) -> None:
    """Writes the run's file into its output directory, and ends the curve. Settings of a run are dataclasses."""
    told = {
        "verb": verb,
        "finished": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "settings": {name: value for part in settings for name, value in asked(part).items()},
        "machine": machine.about(),
        "versions": machine.versions(),
        "memory": curve.told(),
    }
    checkpoint.write_json(Path(directory) / FILE, told)


def read(directory: Path) -> dict:
    """What `write` wrote; empty for a run of an lrec that wrote none."""
    return checkpoint.read_json(directory / FILE) if (directory / FILE).exists() else {}


def asked(settings) -> dict[str, object]:
    """The numbers, texts and switches of a dataclass that are set. Of one that extends a library's (trl's has 150
    fields), what is lrec's own or was changed."""
    theirs = {
        f.name: f.default
        for cls in type(settings).__mro__
        if dataclasses.is_dataclass(cls) and cls.__module__.partition(".")[0] != "lrec"
        for f in dataclasses.fields(cls)
    }
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {
        name: value
        for name, value in plain.items()
        if isinstance(value, (bool, int, float, str)) and (name not in theirs or values[name] != theirs[name])
    }
