"""Methods side by side on one model and text: bits, bytes, quality on held-out text, seconds and peak memory.

    lrec compare --model smollm2 --dataset wikipedia:train --test_dataset wikipedia:test --output_dir C \\
        --methods rtn:2,gptq:2:group_size=128,nf4,gptq:2:train=scales --training_tokens 16384

How entries are written: `lrec.compare_entries`. Each is quantized by `lrec quantize` in a process of its own, so that
time and peak memory are that method's, and measured here against the full-precision model, whose final hidden states
are kept in memory. One that is trained is measured before and after: `lrec train` learns from what `lrec cache` has
kept of the full-precision model, the same windows of the dataset for all, and what folds into the packed weights
exactly is folded, so that bits and bytes are what a user would keep. Adapters count beside the weights.

`compare.json` is written after every method, and calling again goes on from it: a finished row is run again only if
its settings or lrec's version changed; another model, text or precision is refused; rows that are not named any more
stay. A method that fails is a row that says why, and is tried again by the next call.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from torch import Tensor

from lrec import (
    __version__,
    apart,
    checkpoint,
    documents,
    evaluate,
    load,
    lock,
    machine,
    picture,
    shapes,
    text,
)
from lrec.compare_entries import Entry, check_rank, expand, labels, read_entry
from lrec.evaluate import States
from lrec.options import setting
from lrec.progress import Progress
from lrec.runs import Place, Text, total_bytes

RESULTS = "compare.json"
FULL = "full precision"
# What training adds is shown if anything was trained; `kl_quantized` is the KL before it.
TRAINING = ("kl_quantized", "training_tokens", "training_seconds")
COLUMNS = ("method", "bits_per_weight", "total_bytes", "perplexity", "kl", "top1_agreement", "seconds", "peak_bytes")
STAGES = ("packed", "trained", "folded")  # folders of what is made of an entry


@dataclass(frozen=True, kw_only=True)
class Compare(Text, Place):
    """`lrec compare`: a table of methods on one model and text."""

    model: str = field(metadata={"help": "full-precision model: local directory, Hub id, or a data/ script (smollm2)"})
    methods: str = field(
        metadata={
            "help": "entries METHOD[:BITS][:setting=value...] parted by commas: rtn:2,gptq:2:group_size=128,nf4; with "
            "train=scales, adapters ... (and settings of `lrec train`) measured after training; layouts:2 (or 3, 4) "
            "stands for layouts of about one size, all trained"
        }
    )
    test_dataset: str = field(metadata={"help": "held-out text, named as --dataset is"})
    output_dir: str = field(metadata={"help": "directory of compare.json and the picture; calling again goes on there"})
    num_samples: int | None = setting(32, "calibration windows")
    test_samples: int | None = setting(24, "held-out windows of max_length, spaced evenly over the text")
    training_tokens: int | None = setting(
        None, "tokens of the dataset that entries with train= learn from, once, the same for all"
    )
    training_length: int | None = setting(None, "tokens in a training window (none: max_length)")
    training_dtype: str | None = setting(None, "precision of training (none: dtype)")
    seed: int = setting(0, "of the choice of calibration and training windows and of their order")
    init_rank: int = setting(
        0, "rank of the adapter factors to store with each model, where no adapters start from them"
    )
    keep_models: bool = setting(False, "keep what was made of each entry, in output_dir/packed, trained and folded")

    @lock.alone
    def run(self) -> dict:
        """Runs what the table lacks and returns it; `failed` is the number of rows that are an error.

        Raises ValueError before anything runs for an entry that cannot be read, with the nearest right name, and for
        results in output_dir that are of another model, text or precision.
        """
        entries = self.entries()
        path = Path(self.output_dir) / RESULTS
        rows = self.finished(path, entries)
        todo = [entry for entry in entries.values() if entry.label not in rows]
        if todo or FULL not in rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.measure(todo, rows, path)
        return self.table(entries, rows, path)

    def entries(self) -> dict[str, Entry]:
        """What `methods` names, by label. Raises ValueError as `run` does."""
        training, sides = self.training(), cache(lambda: shapes.linear_sides(self.model))
        named = [entry for label in labels(self.methods) for entry in expand(label, sides)]
        found = {label: read_entry(label, self.init_rank, training) for label in named}
        for entry in found.values():
            if entry.adapted:
                check_rank(entry, sides())
        return found

    def training(self) -> dict | None:
        """What all entries that are trained have in common; None if no tokens are given for it.

        Raises ValueError for tokens that are no whole number of windows."""
        if self.training_tokens is None:
            return None
        length = self.max_length if self.training_length is None else self.training_length
        if length < 2 or self.training_tokens < 1 or self.training_tokens % length:
            near = max(1, round(self.training_tokens / max(length, 2))) * length
            raise ValueError(
                f"training_tokens = {self.training_tokens} is no whole number of windows of {length} tokens "
                f"(--training_length, 2 or more); the nearest is {near}"
            )
        dtype = load.dtype_of(self.training_dtype or self.dtype, load.device_of(self.device))
        return {"tokens": self.training_tokens, "length": length, "dtype": str(dtype).removeprefix("torch.")}

    def table(self, entries: Collection[str], rows: dict[str, dict], path: Path) -> dict:
        """What is told of the rows, those of this call first; draws the picture beside the results."""
        order = [FULL, *entries, *(label for label in rows if label not in entries and label != FULL)]
        columns = COLUMNS + (TRAINING if any("training_tokens" in rows[label] for label in order) else ())
        shown = [{name: rows[label].get(name) for name in columns} for label in order]
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

        if any(entry.training for entry in todo):
            self.teacher_cache()
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
            try:
                found = self.result(entry, ids, teacher)
            except (ValueError, RuntimeError, MemoryError) as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            add(entry.label, entry.settings, found)
            if "error" not in found and not self.keep_models:
                self.remove(entry, todo[todo.index(entry) + 1 :])

    def remove(self, entry: Entry, coming: list[Entry]) -> None:
        """Removes what was made of an entry, but for what those that are coming are trained from."""
        for stage in STAGES:
            if stage != "packed" or entry.base not in [other.base for other in coming]:
                apart.remove(self.place(stage, entry))

    def place(self, stage: str, entry: Entry) -> Path:
        """The directory of a stage of an entry."""
        return Path(self.output_dir) / stage / (entry.base if stage == "packed" else entry).folder

    def result(self, entry: Entry, ids: Tensor, teacher: States) -> dict:
        """Makes what there is to make of an entry and evaluates it: quality, size, seconds, peak bytes."""
        packed = self.place("packed", entry)
        report = apart.run("quantize", self.shared() | entry.given, packed)
        found = {name: report[name] for name in ("seconds", "peak_bytes")}
        quantized = self.measured(packed, None, ids, teacher, entry.label)
        if entry.training is None:
            return found | quantized
        report, adapter = self.train(entry), self.place("trained", entry)
        if entry.folds:
            folded = self.place("folded", entry)
            apart.run("export", {"model": packed, "adapter": adapter, "format": "packed"}, folded)
            packed, adapter = folded, None
        before = {f"{name}_quantized": quantized[name] for name in ("bits_per_weight", "perplexity", "kl")}
        about = {"training_tokens": self.training_tokens, "training_seconds": report["seconds"]}
        about["training_kl"] = [[row["step"], row["kl"]] for row in report["history"] if "kl" in row]
        return found | self.measured(packed, adapter, ids, teacher, entry.label) | before | about

    def measured(self, model_dir: Path, adapter: Path | None, ids: Tensor, teacher: States, desc: str) -> dict:
        """Quality and size of a packed model, with all that is stored of an adapter on it."""
        names = str(model_dir), adapter and str(adapter)
        model = load.model(*names, self.device, self.dtype)
        quality = evaluate.quality(evaluate.states(model, ids, desc=desc), ids, teacher)
        bits = evaluate.bits_per_weight(model, checkpoint.weights_bytes(adapter) if adapter else 0)
        return {"bits_per_weight": bits, "total_bytes": total_bytes(*names)} | quality

    def shared(self) -> dict:
        """What the runs of all entries have in common."""
        names = ("model", "dataset", "num_samples", "max_length", "seed", "device", "dtype")
        return {name: getattr(self, name) for name in names}

    def lessons(self) -> dict:
        """`shared` with the windows that are trained on in the place of those for calibration."""
        training = self.training()
        return self.shared() | {
            "num_samples": training["tokens"] // training["length"],
            "max_length": training["length"],
        }

    def teacher_cache(self) -> Path:
        """What the full-precision model says of the training windows, made unless it is there."""
        lessons = self.lessons()
        directory = Path(self.output_dir) / f"teacher_{lessons['num_samples']}x{lessons['max_length']}"
        apart.run("cache", lessons, directory)
        return directory

    def train(self, entry: Entry) -> dict:
        """The report of `lrec train` of an entry that has been quantized."""
        from_cache = {"model": self.place("packed", entry), "teacher_cache": self.teacher_cache()}
        settings = self.lessons() | from_cache | {"dtype": self.training()["dtype"]}
        return apart.run("train", settings | entry.training, self.place("trained", entry))


def stored_bits(directory: Path) -> float:
    """Bits of a weight of a dense model, as its first tensor of two dimensions or more is stored."""
    for file in checkpoint.weight_files(directory):
        with checkpoint.open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is not a dict)
                if len(tensors.get_slice(key).get_shape()) >= 2:
                    return 8.0 * tensors.get_tensor(key).element_size()
    raise ValueError(f"{directory} holds no matrix; it is no language model")
