"""A recipe: quantize, correct, compare on held-out text, export; one experiment in one directory.

A script in `recipes/` fills the dataclass and calls `run`; flags and `--config file.yaml` override what it filled in.
"""

import copy
import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lrec import assembly, checkpoint, documents, effort, load, options, processes, report, text, trained
from lrec.correction import Train
from lrec.learning import Learning
from lrec.options import setting
from lrec.pass_settings import PassSettings
from lrec.quantizers import Quantizer
from lrec.runs import Export, Quantize, Text, total_bytes

STAGES = ("full precision", "quantized", "corrected")


@dataclass(frozen=True, kw_only=True)
class Recipe(Learning):
    """Quantize, correct, compare on held-out text, export: one experiment."""

    model: str = field(metadata={"help": "full-precision model: local directory, Hub id, or a data/ script"})
    output_dir: str = field(metadata={"help": "directory of the experiment; stages found complete there are reused"})
    train_dataset: str = setting("wikipedia:train", "text for calibration and training")
    test_dataset: str = setting("wikipedia:test", "held-out text")
    method: str = setting("gptq", "quantizer")
    num_samples: int = setting(32, "calibration windows")
    max_length: int = setting(512, "tokens in a calibration or evaluation window")
    train_length: int = setting(256, "tokens in a training window")
    test_samples: int = setting(24, "held-out windows")
    teacher_targets: Literal["live", "hidden", "topk"] = setting(
        "live", "the teacher in memory while training, or cached first and then away"
    )
    prompts: str = setting("The history of|Water is|In mathematics, a", "texts to continue side by side, parted by |")
    seed: int = setting(0, "of the choice of text and of the adapters")
    effort: Literal["quick", "standard", "max"] | None = setting(
        None, "quick, standard or max: sets what is not given by time, see lrec/effort.py (none: nothing)"
    )

    def run(self, quantizer: Quantizer, config, passing: PassSettings | None = None) -> list[dict]:
        """Runs all stages and prints the table and continuations; `config` is the LrecConfig of the training.

        Several processes share quantizing and training; the main one evaluates. Returns the table's rows.
        """
        load.quiet()
        self.quantize(quantizer, passing)
        self.correct(config)
        processes.wait()
        if not processes.is_main():
            return []
        if not Path(self.path("export")).exists():
            Export(
                model=self.path("packed"),
                adapter=self.path("adapter"),
                format="adapter" if self.has_adapters else "packed",
                output_dir=self.path("export"),
            ).run()
        rows, continuations = self.compare()
        print("\n".join(["", *report.table(rows), "", *continuations]))
        checkpoint.write_json(Path(self.output_dir) / "results.json", {"rows": rows, "continuations": continuations})
        return rows

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained; scales and zeros alone replace those of the packed model, at its size."""
        return "adapters" in trained.kinds_of(self.train)

    def path(self, stage: str) -> str:
        """The directory of a stage."""
        return f"{self.output_dir}/{stage}"

    def quantize(self, quantizer: Quantizer, passing: PassSettings | None) -> None:
        """Makes the packed model unless it is there."""
        if not (Path(self.path("packed")) / checkpoint.MANIFEST).exists():
            Quantize(
                model=self.model,
                output_dir=self.path("packed"),
                method=self.method,
                dataset=self.train_dataset,
                num_samples=self.num_samples,
                max_length=self.max_length,
                seed=self.seed,
                effort=self.effort,
            ).run(quantizer, passing)

    def correct(self, config) -> None:
        """Trains the adapter unless it is there."""
        if not (Path(self.path("adapter")) / checkpoint.ADAPTER_STAMP).exists():
            Train(
                model=self.path("packed"),
                teacher=self.model,
                output_dir=self.path("adapter"),
                dataset=self.train_dataset,
                num_samples=None,
                max_length=self.train_length,
                **self.learning(),
                teacher_targets=self.teacher_targets,
                seed=self.seed,
            ).run(self.placed(config, "adapter"))

    def placed(self, config, stage: str):
        """The trainer's settings for a stage: checkpoints go into its directory, and a training that was killed there
        goes on from the last of them."""
        placed = copy.copy(config)
        placed.output_dir = self.path(stage)
        begun = processes.from_main(lambda: any(Path(placed.output_dir).glob("*")))
        placed.resume_from_checkpoint = config.resume_from_checkpoint or begun
        return placed

    def compare(self) -> tuple[list[dict], list[str]]:
        """Each stage's quality against the first, its size and time; and its continuations of the prompts."""
        from lrec import evaluate

        tokenizer, packed, adapter = load.tokenizer(self.model), self.path("packed"), self.path("adapter")
        test = Text(dataset=self.test_dataset, num_samples=self.test_samples, max_length=self.max_length)
        ids = test.input_ids(tokenizer, None)
        seen = replace(test, dataset=self.train_dataset, num_samples=None).input_ids(tokenizer, None)
        text.warn_overlap(seen, ids, f"{self.train_dataset} (training)", f"{self.test_dataset} (test)")
        seconds = [
            None,
            checkpoint.read_json(Path(packed) / assembly.REPORT, documents.Report)["seconds"],
            checkpoint.read_json(Path(adapter) / checkpoint.ADAPTER_STAMP)["seconds"],
        ]
        prompts = self.prompts.split("|")
        rows, texts, teacher = [], [f"> {prompt}" for prompt in prompts], None
        for stage, name, lora, time in zip(
            STAGES, (self.model, packed, packed), (None, None, adapter), seconds, strict=True
        ):
            model = load.model(name, lora)
            states = evaluate.states(model, ids, desc=stage)
            teacher = teacher or (states := states.kept())
            added = checkpoint.adapter_bytes(Path(lora)) if lora else 0
            bits = evaluate.bits_per_weight(model, added) or 16.0
            stored = (name, lora) if self.has_adapters or not lora else (self.path("export"), None)
            size = {"bits_per_weight": bits, "bytes": total_bytes(*stored), "seconds": time}
            rows.append({"model": stage, **evaluate.quality(states, ids, teacher), **size})
            for i, continuation in enumerate(evaluate.continuations(model, tokenizer, prompts)):
                texts[i] += f"\n  {stage:<16}{continuation.strip()!r}"
        return rows, texts


def main(argv: list[str], recipe: Recipe, quantizer: Quantizer, config, passing: PassSettings) -> list[dict]:
    """Runs a recipe as flags, a YAML file and an effort among them change it; the table's rows.

    An effort stands between what the recipe says and what the flags say: it changes the recipe, and flags change it.
    """
    values, parts = options.settings(argv), (recipe, quantizer, config, passing)
    values = effort.spend(values, *parts)
    recipe, quantizer, config, passing = options.fill(values, *parts)
    if recipe.effort is not None:
        per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        chosen = effort.steps(recipe.effort, per_step * recipe.train_length)
        config = dataclasses.replace(config, **{name: n for name, n in chosen.items() if name not in values})
    return recipe.run(quantizer, config, passing)
