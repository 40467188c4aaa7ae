"""The runs lrec makes, one dataclass each: its fields are the flags of a verb, `run()` does the work and returns what
to report. The command line and the recipes fill them."""

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lrec import (
    checkpoint,
    conversations,
    documents,
    effort,
    export,
    imports,
    load,
    lock,
    logbook,
    machine,
    processes,
    record,
    text,
)
from lrec.blocks import Pass, PassSettings
from lrec.calibration import Calibration
from lrec.capture import Capture, CaptureSettings
from lrec.memory_curve import MemoryCurve
from lrec.options import setting
from lrec.quantizers import Quantizer
from lrec.stream import StreamedModel, trim
from lrec.teacher import check_tokenizers


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and in what precision to compute."""

    device: str = setting("auto", "auto (first GPU, else CPU), cpu, cuda, cuda:1 ...")
    dtype: str = setting("auto", "auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text, and how much of it."""

    dataset: str = field(
        metadata={"help": "Hub id, .txt/.jsonl/.parquet file, or a data/ script with a split (wikipedia:test)"}
    )
    num_samples: int | None = setting(None, "number of windows (none: all there are)")
    max_length: int = setting(512, "tokens in a window")

    def input_ids(self, tokenizer, seed: int | None):
        """Windows (num_samples, max_length): a seeded random choice, or with no seed spaced evenly over the text.

        A text that has fewer is refused, or with the default number taken whole, with a warning."""
        fewer = self.num_samples == type(self).num_samples
        return text.windows(
            text.documents(self.dataset), tokenizer, self.max_length, self.num_samples, seed=seed, fewer=fewer
        )


@dataclass(frozen=True, kw_only=True)
class Quantize(Text, Place):
    """`lrec quantize`: a packed model from a full-precision one."""

    model: str = field(metadata={"help": "local directory, Hub id, or a data/ script (smollm2)"})
    output_dir: str = field(metadata={"help": "new directory for the packed model"})
    dataset: str | None = setting(
        None, "calibration text: Hub id, .txt/.jsonl/.parquet file, or a data/ script (none: methods without data)"
    )
    method: str = setting("gptq", "quantizer: one of the files in lrec/quantizers")
    num_samples: int | None = setting(128, "calibration windows")
    seed: int = setting(0, "of the choice of windows")
    effort: Literal["quick", "standard", "max"] | None = setting(
        None, "quick, standard or max: sets what is not set here by time, see lrec/effort.py (none: nothing)"
    )

    @lock.alone
    def run(self, quantizer: Quantizer, settings: PassSettings | None = None, about: dict | None = None) -> dict:
        """Quantizes into `output_dir`; a run that was interrupted goes on. Returns the report.

        `about` is what the manifest is to say otherwise than by this run, as of a model that was itself made.
        """
        device = load.device_of(self.device)
        dtype = load.dtype_of(self.dtype, device)
        if self.effort is not None:
            tokens = {name: chosen["num_samples"] * self.max_length for name, chosen in effort.QUANTIZE.items()}
            tokens[self.effort] = (self.num_samples or 0) * self.max_length
            effort.check_fits(self.effort, self.model, tokens, quantizer.bits, self.device, Path(self.output_dir))
        calibration = self.calibration()
        trim()  # text and tokenizer go before the model comes
        curve = MemoryCurve(device)
        streamed = StreamedModel(text.model_path(self.model), dtype, device)
        report = Pass(streamed, quantizer, calibration, Path(self.output_dir), settings, about).run()
        if processes.is_main():
            logbook.write(self.output_dir, "quantize", [self, quantizer, settings or PassSettings()], curve)
        return report | {"peak_bytes": machine.peak_bytes(device)}

    def calibration(self) -> Calibration | None:
        """The windows of the named text; none if none is named."""
        if self.dataset is None:
            return None
        ids = self.input_ids(load.tokenizer(self.model), self.seed)
        about = {"dataset": self.dataset, "num_samples": len(ids), "max_length": self.max_length, "seed": self.seed}
        return Calibration(ids, about)


@dataclass(frozen=True, kw_only=True)
class Import:
    """`lrec import`: a packed model from what another tool has quantized, without quantizing again."""

    model: str = field(metadata={"help": "quantized checkpoint: local directory (of one .gguf file, too) or Hub id"})
    output_dir: str = field(metadata={"help": "new directory for the packed model"})

    @lock.alone
    def run(self) -> dict:
        """Writes the packed model; the report."""
        return imports.take_over(imports.folder_of(self.model), Path(self.output_dir))


@dataclass(frozen=True, kw_only=True)
class Cache(Text, Place):
    """`lrec cache`: a teacher's targets on disk, so that training needs no teacher in memory."""

    model: str = field(metadata={"help": "teacher: local directory, Hub id, or a data/ script (smollm2)"})
    output_dir: str = field(metadata={"help": "new directory for the cache"})
    seed: int = setting(0, "of the choice of windows; train with the same")
    dry_run: bool = setting(False, "only tell tokens, bytes, room on the disk and estimated time")

    def run(self, settings: CaptureSettings) -> dict:
        """Captures into `output_dir`, going on where an interrupted capture stopped. Returns the report."""
        ids = self.input_ids(load.tokenizer(self.model), self.seed)
        job = Capture.of(self.model, ids, self.output_dir, settings, self.device, self.dtype)
        if self.dry_run:
            return job.plan() | job.estimate()
        with lock.held(self.output_dir):
            return job.run()


@dataclass(frozen=True, kw_only=True)
class Evaluate(Text, Place):
    """`lrec evaluate`: perplexity, KL to the teacher, top-1 agreement, and size."""

    model: str = field(metadata={"help": "packed or dense model"})
    adapter: str | None = setting(None, "peft adapter on top of the model")
    teacher: str | None = setting(None, "full-precision model to compare with")
    num_samples: int | None = setting(24, "evaluation windows, spaced evenly over the text")
    batch_size: int = setting(4, "windows in a forward pass")
    rows: bool = setting(False, "the dataset's rows as those of a task: the loss of what answers, as in `lrec train`")
    activation_bits: int | None = setting(None, "8: activations are rounded, as by LREC_ACTIVATION_BITS=8")
    record: bool = setting(False, "keep the result beside the weights, for the card that `lrec push` makes")

    def run(self) -> dict:
        """The measured quality and size. Raises ValueError for a result to be kept beside weights fetched by name."""
        from lrec import evaluate, kernels

        place = Path(self.adapter or self.model)
        if self.record and not place.is_dir():
            raise ValueError(
                f"--record keeps the result beside the weights, but {place} is not a folder here: leave --record out"
            )

        kernels.round_activations(self.activation_bits)
        tokenizer = load.tokenizer(self.model)
        if self.teacher:
            check_tokenizers(load.tokenizer(self.teacher), tokenizer)
        if self.rows:
            ids, labels = conversations.read(self.dataset, tokenizer, self.num_samples, None, self.max_length)
        else:
            ids = self.input_ids(tokenizer, None)
            self.warn_of_seen_text()
        start = time.monotonic()
        model = load.model(self.model, self.adapter, self.device, self.dtype)
        teacher = self.teacher and load.model(self.teacher, None, self.device, self.dtype)
        if self.rows:
            found = evaluate.rows_quality(model, ids, labels, teacher)
        else:
            targets = teacher and evaluate.states(teacher, ids, self.batch_size, "teacher")
            found = evaluate.quality(evaluate.states(model, ids, self.batch_size), ids, targets, self.batch_size)
        added = checkpoint.adapter_bytes(Path(self.adapter)) if self.adapter else 0
        size = {
            "bits_per_weight": evaluate.bits_per_weight(model, added),
            "total_bytes": total_bytes(self.model, self.adapter),
        }
        if self.record:
            asked = {"dataset": self.dataset, "num_samples": len(ids), "max_length": self.max_length}
            with lock.held(place):
                record.add(place, asked | {"teacher": self.teacher} | found | size)
        return found | size | {"seconds": round(time.monotonic() - start, 2)}

    def warn_of_seen_text(self) -> None:
        """Warns if the text is what model or adapter were made with, as they tell."""
        manifest = text.model_path(self.model) / checkpoint.MANIFEST
        packed = checkpoint.read_json(manifest, documents.Manifest) if manifest.exists() else {}
        stamp = checkpoint.read_stamp(Path(self.adapter)) if self.adapter else {}
        seen = {"calibrated with": (packed.get("calibration") or {}).get("dataset"), "trained on": stamp.get("dataset")}
        if found := " and ".join(how for how, dataset in seen.items() if dataset == self.dataset):
            warnings.warn(f"the model was {found} {self.dataset}: figures on it say little of other text", stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class Export:
    """`lrec export`: what others can load."""

    model: str = field(metadata={"help": "packed model"})
    output_dir: str = field(metadata={"help": "new directory for the export"})
    format: str = field(metadata={"help": "one of the files in lrec/export"})
    adapter: str | None = setting(None, "peft adapter to export, merge or fold in")
    check: bool = setting(False, "load it again with the tool it is for, if installed, and compare logits")

    def run(self, target: export.Export | None = None) -> dict:
        """Writes the export, by the target's defaults if none is given; what it wrote."""
        target = target or export.find(self.format)()
        adapter = self.adapter and Path(self.adapter)
        return export.export(target, text.model_path(self.model), adapter, Path(self.output_dir), self.check)


def total_bytes(model: str, adapter: str | None) -> int:
    """Bytes on disk of a model's weight files and its adapter's."""
    return sum(
        checkpoint.weights_bytes(path) for path in [text.model_path(model), *([Path(adapter)] if adapter else [])]
    )
