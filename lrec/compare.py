"""Methods side by side on one model and text: bits, bytes, quality on held-out text, seconds and peak memory.

    lrec compare --model smollm2 --dataset wikipedia:train --test_dataset wikipedia:test --output_dir C \\
        --methods rtn:2,gptq:2:group_size=128,nf4,icquant:2:inner=kmeans

An entry is METHOD[:BITS][:setting=value...], with any setting of the method, of the pass or of preprocessing; commas
part entries.
Each is quantized by `lrec quantize` in a process of its own, so that time and peak memory are that method's, and
measured here against the full-precision model, whose final hidden states are kept in memory. `compare.json` is written
after every method, and calling again goes on from it: a finished row is run again only if its settings or lrec's
version changed; another model, text or precision is refused; rows that are not named any more stay. A method that
fails is a row that says why, and is tried again by the next call.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from lrec import (
    __version__,
    checkpoint,
    documents,
    evaluate,
    foreign,
    load,
    lock,
    machine,
    options,
    picture,
    registry,
    text,
)
from lrec.blocks import PassSettings
from lrec.evaluate import States
from lrec.options import setting
from lrec.progress import Progress
from lrec.restore import Preprocess
from lrec.runs import Place, Text, total_bytes

RESULTS = "compare.json"
FULL = "full precision"
COLUMNS = ("method", "bits_per_weight", "total_bytes", "perplexity", "kl", "top1_agreement", "seconds", "peak_bytes")
# `lrec quantize` in a process that ends with its parent, so that no orphan writes where a later call goes on.
QUANTIZE = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
from lrec.cli import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Entry:
    """One method of the list: what it is called there, the settings given, and all settings that these come to."""

    label: str
    given: dict[str, object]
    settings: dict[str, object]

    @property
    def folder(self) -> str:
        """A file name that no entry with other settings has."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9=_-]+', '_', self.label)[:80]}-{digest[:8]}"


@dataclass(frozen=True, kw_only=True)
class Compare(Text, Place):
    """`lrec compare`: a table of methods on one model and text."""

    model: str = field(metadata={"help": "full-precision model: local directory, Hub id, or a data/ script (smollm2)"})
    methods: str = field(
        metadata={"help": "entries METHOD[:BITS][:setting=value...] parted by commas: rtn:2,gptq:2:group_size=128,nf4"}
    )
    test_dataset: str = field(metadata={"help": "held-out text, named as --dataset is"})
    output_dir: str = field(metadata={"help": "directory of compare.json and the picture; calling again goes on there"})
    num_samples: int | None = setting(32, "calibration windows")
    test_samples: int | None = setting(24, "held-out windows of max_length, spaced evenly over the text")
    seed: int = setting(0, "of the choice of calibration windows")
    init_rank: int = setting(0, "rank of the adapter factors to store with each model; they are not compared")
    keep_models: bool = setting(False, "keep the packed models, in output_dir/packed")

    @lock.alone
    def run(self) -> dict:
        """Runs what the table lacks and returns it; `failed` is the number of rows that are an error.

        Raises ValueError before anything runs for an entry that cannot be read, with the nearest right name, and for
        results in output_dir that are of another model, text or precision.
        """
        entries = {label: read_entry(label, self.init_rank) for label in labels(self.methods)}
        path = Path(self.output_dir) / RESULTS
        rows = self.finished(path, entries)
        todo = [entry for entry in entries.values() if entry.label not in rows]
        if todo or FULL not in rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.measure(todo, rows, path)
        return self.table(entries, rows, path)

    def table(self, entries: Collection[str], rows: dict[str, dict], path: Path) -> dict:
        """What is told of the rows, those of this call first; draws the picture beside the results."""
        order = [FULL, *entries, *(label for label in rows if label not in entries and label != FULL)]
        shown = [{name: rows[label].get(name) for name in COLUMNS} for label in order]
        errors = [{"method": label, "error": rows[label]["error"]} for label in order if "error" in rows[label]]
        about = {"results": str(path), "picture": picture.draw(shown[1:], path.parent), "failed": len(errors)}
        return about | {"rows": shown, "errors": errors}

    def common(self) -> dict:
        """What all rows of one table agree in."""
        names = ("model", "dataset", "num_samples", "max_length", "seed", "test_dataset", "test_samples")
        device = load.device_of(self.device)
        return {name: getattr(self, name) for name in names} | {
            "base_sha256": checkpoint.fingerprint(text.model_path(self.model)),
            "device": device.type,
            "dtype": str(load.dtype_of(self.dtype, device)).removeprefix("torch."),
        }

    def finished(self, path: Path, entries: dict[str, Entry]) -> dict[str, dict]:
        """The rows of earlier calls that hold, by label: of this lrec, without error, with the settings of now."""
        if not path.exists():
            return {}
        found, now = checkpoint.read_json(path, documents.Comparison), self.common()
        changed = [f"{name} = {value!r}" for name, value in found["settings"].items() if now.get(name) != value]
        if changed:
            raise ValueError(f"{path} holds results for {', '.join(changed)}; choose another output_dir or remove it")
        return {
            row["method"]: row
            for row in found["rows"]
            if row["versions"].get("lrec") == __version__
            and "error" not in row
            and (row["method"] not in entries or row["settings"] == entries[row["method"]].settings)
        }

    def measure(self, todo: list[Entry], rows: dict[str, dict], path: Path) -> None:
        """Evaluates full precision, then each entry; adds their rows and writes the table after every one."""
        test = Text(dataset=self.test_dataset, num_samples=self.test_samples, max_length=self.max_length)
        ids = test.input_ids(load.tokenizer(self.model), None)
        common, made_on = self.common(), {"machine": machine.about(), "versions": machine.versions()}

        def add(label: str, settings: dict, found: dict) -> None:
            stamp = {"settings": settings, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
            rows[label] = {"method": label, **found, **stamp, **made_on}
            checkpoint.write_json(path, {"settings": common, "rows": list(rows.values())})

        full = load.model(self.model, None, self.device, self.dtype)
        teacher = evaluate.states(full, ids, desc=FULL).kept()
        del full
        if FULL not in rows:
            bits = stored_bits(text.model_path(self.model))
            size = {"bits_per_weight": bits, "total_bytes": total_bytes(self.model, None)}
            add(FULL, {}, size | evaluate.quality(teacher, ids, teacher))
        told = Progress(todo, "compare", "method")
        for entry in told:
            told.set_postfix_str(entry.label)
            packed = path.parent / "packed" / entry.folder
            try:
                found = self.result(entry, packed, ids, teacher)
            except (ValueError, RuntimeError, MemoryError) as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            add(entry.label, entry.settings, found)
            if "error" not in found and not self.keep_models:
                shutil.rmtree(packed)
                packed.with_suffix(".json").unlink()
                packed.with_suffix(".log").unlink()

    def result(self, entry: Entry, packed: Path, ids: Tensor, teacher: States) -> dict:
        """Quantizes one entry into `packed` and evaluates it: quality, size, seconds, peak bytes."""
        report = self.quantize(entry, packed)
        found = {name: report[name] for name in ("bits_per_weight", "seconds", "peak_bytes")}
        model = load.model(str(packed), None, self.device, self.dtype)
        quality = evaluate.quality(evaluate.states(model, ids, desc=entry.label), ids, teacher)
        return found | {"total_bytes": total_bytes(str(packed), None)} | quality

    def quantize(self, entry: Entry, packed: Path) -> dict:
        """The report of `lrec quantize`, run in a process of its own; it goes on where an earlier call stopped.

        Raises ValueError with the last line that the process said, if it fails; all that it said is in a log.
        """
        told, log = packed.with_suffix(".json"), packed.with_suffix(".log")
        if told.exists():
            return checkpoint.read_json(told)
        if (packed / checkpoint.MANIFEST).exists():
            shutil.rmtree(packed)  # finished, but the call ended before it could note the seconds and bytes
        names = ("model", "dataset", "num_samples", "max_length", "seed", "device", "dtype")
        values = {name: getattr(self, name) for name in names} | entry.given | {"output_dir": packed}
        flags = [f"--{name}={'none' if value is None else value}" for name, value in values.items()]
        flags += ["--trust_remote_code"] if foreign.trusted() else []
        command = [sys.executable, "-c", QUANTIZE, "quantize", "--json", *flags]
        packed.parent.mkdir(exist_ok=True)
        with log.open("w") as stderr:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        if done.returncode:
            last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise ValueError(f"{last} ({ended}; {log} tells more)")
        report = json.loads(done.stdout)
        checkpoint.write_json(told, report)
        return report


def labels(methods: str) -> list[str]:
    """The entries of a list: commas part them, but not the rules of a bits_map, which are PATTERN=BITS."""
    return re.split(r",(?!re:)(?=\w*(?:[:,]|$))", methods)


def read_entry(label: str, init_rank: int) -> Entry:
    """METHOD[:BITS][:setting=value...] with every setting that it comes to.

    Raises ValueError that begins with the entry, for an unknown method or setting and for a value that is refused.
    """
    head, *parts = re.split(r":(?=[\w-]+=)", label)
    method, colon, bits = head.partition(":")
    given = {"init_rank": init_rank} | ({"bits": bits} if colon else {})
    for part in parts:
        name, _, value = part.partition("=")
        given[name.replace("-", "_")] = value
    try:
        *resolved, before = options.fill(given, registry.find("quantizers", method), PassSettings, Preprocess)
    except ValueError as error:
        raise ValueError(f"methods, {label!r}: {error}") from error
    if before.preprocess != "none":
        resolved.append(before)
    settings = {name: value for part in resolved for name, value in asdict(part).items()}
    return Entry(label, {"method": method} | given, {"method": method} | settings)


def stored_bits(directory: Path) -> float:
    """Bits of a weight of a dense model, as its first tensor of two dimensions or more is stored."""
    for file in checkpoint.weight_files(directory):
        with checkpoint.open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is not a dict)
                if len(tensors.get_slice(key).get_shape()) >= 2:
                    return 8.0 * tensors.get_tensor(key).element_size()
    raise ValueError(f"{directory} holds no matrix; it is no language model")
