"""Preprocessing: full weights moved to where they quantize well, before they are quantized (PTQ1.61, section 3.4).

The model is quantized once, a "restorative" LoRA is trained on the packed weights, and both are merged into dense
weights, which lie near what the quantizer can hold and yet do what the model did. Then those are quantized. The paper
trains by cross-entropy (`ce`); KL to the full-precision model (`kl`) is our variant. Any quantizer may be used.

The stages are the runs that the command line offers, in a directory beside the output, which is removed at the end.
A stage found complete there is not run again, and each of them resumes, so the same command goes on after a kill.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from lrec import assembly, checkpoint, documents, lock, processes, text
from lrec.checkpoints import whole_checkpoints
from lrec.correction import Train
from lrec.options import setting
from lrec.pass_settings import PassSettings
from lrec.quantizers import Quantizer
from lrec.runs import Export, Quantize

STATE = "lrec_preprocess.json"


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How weights are preprocessed, and whether."""

    preprocess: Literal["none", "kl", "ce"] = setting(
        "none", "train a LoRA on the packed model, merge, quantize again: none, kl (to the full model), ce (the paper)"
    )
    preprocess_steps: int = setting(80, "training steps of that LoRA")
    preprocess_r: int = setting(64, "its rank")
    preprocess_batch_size: int = setting(1, "windows in a step, from anywhere in the calibration text's data set")
    preprocess_lr: float = setting(1e-3, "its peak learning rate")

    def __post_init__(self):
        for name in ("preprocess_steps", "preprocess_r", "preprocess_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; allowed: 1 or more")

    def run(self, quantize: Quantize, quantizer: Quantizer, passing: PassSettings | None = None) -> dict:
        """`quantize.run` on preprocessed weights; its report, with the seconds of all stages.

        The manifest names `quantize.model` as the base, and says how its weights were preprocessed. Raises ValueError
        if there is no text to train on, or if the directory of the stages holds those of another run.
        """
        if self.preprocess == "none":
            return quantize.run(quantizer, passing)
        if processes.count() > 1:
            raise ValueError(
                f"preprocess = {self.preprocess} runs its stages one after the other in one process, but there are "
                f"{processes.count()}: start `lrec quantize` without `accelerate launch`"
            )
        if quantize.dataset is None:
            raise ValueError(f"preprocess = {self.preprocess} trains on a text; name one with --dataset")
        passing, output_dir = passing or PassSettings(), Path(quantize.output_dir)
        work = output_dir.with_name(f".{output_dir.name}.preprocess")
        original = text.model_path(quantize.model)
        base = {"base_model": str(original), "base_sha256": checkpoint.fingerprint(original)}
        asked = {**asdict(quantize), **asdict(quantizer), **asdict(passing), **asdict(self), **base}
        with lock.held(work):
            return self.staged(work, quantize, quantizer, passing, json.loads(json.dumps(asked)))

    def staged(self, work: Path, quantize: Quantize, quantizer: Quantizer, passing: PassSettings, asked: dict) -> dict:
        """All stages that are missing in `work`, and the packed model of what came of them."""
        output_dir, base = Path(quantize.output_dir), {name: asked[name] for name in ("base_model", "base_sha256")}
        self.claim(work, output_dir, asked)
        if (output_dir / checkpoint.MANIFEST).exists() and not (output_dir / assembly.PROGRESS).exists():
            report = checkpoint.read_json(output_dir / assembly.REPORT, documents.Report)
            del report["layers"]
        else:
            merged = self.stages(work, quantize, quantizer, passing)
            stamp = checkpoint.read_json(work / "adapter" / checkpoint.ADAPTER_STAMP)
            about = base | {
                "settings": asdict(quantizer) | asdict(self),
                "preprocessed": {"sha256": checkpoint.fingerprint(merged), "loss": stamp["history"][-1]["loss"]},
            }
            report = replace(quantize, model=str(merged)).run(quantizer, passing, about)
        stages = (work / "packed" / assembly.REPORT, work / "adapter" / checkpoint.ADAPTER_STAMP)
        report["seconds"] = round(report["seconds"] + sum(checkpoint.read_json(path)["seconds"] for path in stages), 2)
        shutil.rmtree(work)
        return report

    def claim(self, work: Path, output_dir: Path, asked: dict) -> None:
        """Takes up the directory of the stages, or makes it. Raises ValueError if it or the output is another run's."""
        if (work / STATE).exists():
            if checkpoint.read_json(work / STATE) != asked:
                raise ValueError(
                    f"{work} holds the unfinished stages of a run with another model, text or settings; "
                    f"remove it and {output_dir}, or choose another output_dir"
                )
            return
        if output_dir.exists() and any(output_dir.iterdir()):
            raise ValueError(f"{output_dir} is not empty; choose another output_dir or remove it (nothing was changed)")
        work.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(work / STATE, asked)

    def stages(self, work: Path, quantize: Quantize, quantizer: Quantizer, passing: PassSettings) -> Path:
        """The directory of the preprocessed model; only missing stages are run."""
        packed, adapter, merged = work / "packed", work / "adapter", work / "merged"
        if not (packed / checkpoint.MANIFEST).exists() or (packed / assembly.PROGRESS).exists():
            replace(quantize, output_dir=str(packed)).run(quantizer, replace(passing, init_rank=0))
        if not (adapter / checkpoint.ADAPTER_STAMP).exists():
            self.train(quantize, packed, adapter)
        if not merged.exists():
            Export(model=str(packed), adapter=str(adapter), format="merged", output_dir=str(merged)).run()
        return merged

    def train(self, quantize: Quantize, packed: Path, adapter: Path) -> None:
        """The restorative LoRA, from zero so that it moves weights no further than the loss asks; resumes."""
        from lrec.trainer import LrecConfig

        whole = whole_checkpoints(adapter)
        if not whole:
            shutil.rmtree(adapter, ignore_errors=True)
        config = LrecConfig(
            output_dir=str(adapter),
            max_steps=self.preprocess_steps,
            per_device_train_batch_size=self.preprocess_batch_size,
            learning_rate=self.preprocess_lr,
            kl_weight=float(self.preprocess == "kl"),
            ce_weight=float(self.preprocess == "ce"),
            logging_steps=min(10, self.preprocess_steps),
            save_steps=20,
            save_total_limit=2,
            report_to="none",
            resume_from_checkpoint=str(whole[-1]) if whole else None,
        )
        same = {name: getattr(quantize, name) for name in ("device", "dtype", "dataset", "max_length", "seed")}
        Train(
            model=str(packed),
            teacher=quantize.model,
            output_dir=str(adapter),
            lora_r=self.preprocess_r,
            lora_init="zero",
            **same,
        ).run(config)
