"""A packed model with the correction folded in: no adapter to carry, and every other export can follow.

What the format can hold exactly it is given so, without any text: see lrec.fold. Any other BA added to a weight on a
grid lies between its points, so the sum has to be rounded again: GPTQ against W = Wq + BA, block by block, with the
statistics of inputs that the blocks re-rounded before it produce. Layers that the adapter leaves alone keep their
codes. Then the scales of all layers are trained for a few steps by KL, and kept if that helped. What all this loses is
measured, on windows it was not calibrated with: the divergence of the corrected model, of the result and of the base
without its adapter from the teacher (from the corrected model itself if no teacher is given, in training too). A
result that keeps too little of the gain is refused.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import evaluate, fold, load, rewrite, text
from lrec.export import Export
from lrec.lora_files import LoraFiles
from lrec.options import setting
from lrec.report import packed_config
from lrec.stream import StreamedModel
from lrec.touch_up import touch_up


@dataclass(frozen=True, kw_only=True)
class PackedExport(Export):
    """A directory as `lrec quantize` writes it; bits and groups of each layer are those of the base."""

    # Rounding changes logits; how much is measured, and bounded, by `max_lost`.
    tolerance: ClassVar[float] = float("inf")
    recorded: ClassVar[bool] = False  # config and manifest tell it

    dataset: str | None = setting(None, "calibration text, as for `lrec quantize`")
    num_samples: int = setting(128, "calibration windows")
    eval_samples: int = setting(16, "further windows, to measure with")
    max_length: int = setting(512, "tokens in a window")
    seed: int = setting(0, "of the choice of windows")
    teacher: str | None = setting(None, "full-precision model to measure against (none: the corrected model)")
    touch_up_steps: int = setting(32, "steps of training the scales after rounding, by KL, one window each (0: none)")
    max_lost: float = setting(0.9, "refuse to lose more than this share of what the adapter gains in KL")
    force: bool = setting(False, "write the result however much is lost")

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError without adapter; where layers have to be rounded again, without text or
        for layers that are not uniform integers; and for a result that lost more than `max_lost`."""
        if adapter_dir is None:
            raise ValueError("--format packed folds an adapter into the base: it needs --adapter")
        meta = packed_config(model_dir).get("meta", {})
        adapter = LoraFiles(adapter_dir, meta.get("packed_sha256"))
        rounded = fold.to_round(adapter, rewrite.kinds(model_dir))
        if rounded and self.dataset is None:
            raise ValueError(
                f"{len(rounded)} layers, the first {rounded[0]}, cannot hold the adapter exactly, so they are rounded "
                "again: that needs --dataset, text to round by"
            )
        rewrite.refuse(model_dir, "packed", fold.misfit, "Nearest that can: --format merged", rounded)
        windows = None
        if self.dataset is not None:
            total = self.num_samples + self.eval_samples
            tokenizer = load.tokenizer(str(model_dir))
            windows = text.windows(text.documents(self.dataset), tokenizer, self.max_length, total, seed=self.seed)
        about = fold.about(model_dir, adapter_dir, bool(rounded))
        calibration = windows[: self.num_samples] if rounded else None
        fold.fold(StreamedModel(model_dir, torch.float32), adapter, calibration, output_dir, about)
        adapter.check_used(model_dir)
        found = {"rounded_layers": len(rounded)}
        if windows is None:
            return found
        kl = self._kl(model_dir, adapter_dir, windows[self.num_samples :])
        found |= {"kl_base": kl(model_dir), "kl_corrected": kl(model_dir, adapter_dir), "kl_packed": kl(output_dir)}
        if rounded and self.touch_up_steps:
            found["kl_rounded"] = found["kl_packed"]
            target = self._target(model_dir, adapter_dir)
            found["kl_packed"] = self._touch_up(output_dir, target, calibration, about, kl, found["kl_rounded"])
        gain = found["kl_base"] - found["kl_corrected"]
        found["lost"] = (found["kl_packed"] - found["kl_corrected"]) / gain if gain > 0 else float("inf")
        if found["lost"] > self.max_lost and not self.force:
            raise ValueError(
                f"rounding again lost {found['lost']:.0%} of what the adapter gains (KL {found['kl_corrected']:.4g} "
                f"corrected, {found['kl_packed']:.4g} folded, {found['kl_base']:.4g} base alone; allowed: "
                f"{self.max_lost:.0%}); keep the adapter apart (--format adapter), merge densely (--format merged), "
                "use a base of more bits, or write it all the same with --force"
            )
        return found

    def _target(self, model_dir: Path, adapter_dir: Path) -> tuple[str, str | None]:
        """The model and adapter that all others should say the same as."""
        return (str(model_dir), str(adapter_dir)) if self.teacher is None else (self.teacher, None)

    def _kl(self, model_dir: Path, adapter_dir: Path, ids: Tensor) -> Callable[..., float]:
        """A function of a model's directory and its adapter's: the KL from the target on these windows."""
        reference = evaluate.states(load.model(*self._target(model_dir, adapter_dir)), ids).kept()

        def kl(model: Path, adapter: Path | None = None) -> float:
            student = load.model(str(model), adapter and str(adapter))
            return evaluate.quality(evaluate.states(student, ids), ids, reference)["kl"]

        return kl

    def _touch_up(
        self, folded: Path, target: tuple[str, str | None], ids: Tensor, about: dict, kl: Callable, before: float
    ) -> float:
        """Trains the scales of the model in `folded`, in its place if the KL falls below `before`; the KL then."""
        with tempfile.TemporaryDirectory(dir=folded.parent) as place:
            scales, made = Path(place) / "scales", Path(place) / "packed"
            touch_up(folded, load.model(*target), ids, self.touch_up_steps, scales)
            changed = LoraFiles(scales, packed_config(folded)["meta"]["packed_sha256"])
            fold.fold(StreamedModel(folded, torch.float32), changed, None, made, about)
            after = kl(made)
            if after < before:
                shutil.rmtree(folded)
                made.rename(folded)
        return min(before, after)
