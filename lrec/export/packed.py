"""A packed model with the correction folded in: no adapter to carry, and every other export can follow.

What the format can hold exactly it is given so, without any text: see lrec.fold. Any other BA added to a weight on a
grid lies between its points, so the sum has to be rounded again: GPTQ against W = Wq + BA, block by block, with the
statistics of inputs that the blocks re-rounded before it produce. Layers that the adapter leaves alone stay as they
are, bit for bit. What this loses is measured, on windows it was not calibrated with: the
divergence of the corrected model, of the result and of the base without its adapter from the teacher (from the
corrected model itself if no teacher is given). A result that keeps too little of the gain is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrec import evaluate, load, rewrite, text
from lrec.export import Export
from lrec.fold import fold, misfit, to_round
from lrec.lora_files import LoraFiles
from lrec.options import setting
from lrec.report import packed_config
from lrec.stream import StreamedModel


@dataclass(frozen=True, kw_only=True)
class PackedExport(Export):
    """A directory as `lrec quantize` writes it; bits and groups of each layer are those of the base."""

    # Rounding changes logits; how much is measured, and bounded, by `max_lost`.
    tolerance: ClassVar[float] = float("inf")

    dataset: str | None = setting(None, "calibration text, as for `lrec quantize`")
    num_samples: int = setting(128, "calibration windows")
    eval_samples: int = setting(16, "further windows, to measure with")
    max_length: int = setting(512, "tokens in a window")
    seed: int = setting(0, "of the choice of windows")
    teacher: str | None = setting(None, "full-precision model to measure against (none: the corrected model)")
    max_lost: float = setting(0.9, "refuse to lose more than this share of what the adapter gains in KL")
    force: bool = setting(False, "write the result however much is lost")

    def write(self, model_dir: Path, adapter_dir: Path | None, output_dir: Path) -> dict:
        """See `Export.write`. Raises ValueError without adapter; where layers have to be rounded again, without text or
        for layers that are not uniform integers; and for a result that lost more than `max_lost`."""
        if adapter_dir is None:
            raise ValueError("--format packed folds an adapter into the base: it needs --adapter")
        meta = packed_config(model_dir).get("meta", {})
        adapter = LoraFiles(adapter_dir, meta.get("packed_sha256"))
        rounded = to_round(adapter, rewrite.kinds(model_dir))
        if rounded and self.dataset is None:
            raise ValueError(
                f"{len(rounded)} layers, the first {rounded[0]}, cannot hold the adapter exactly, so they are rounded "
                "again: that needs --dataset, text to round by"
            )
        rewrite.refuse(model_dir, "packed", misfit, "Nearest that can: --format merged", rounded)
        windows = None
        if self.dataset is not None:
            total = self.num_samples + self.eval_samples
            tokenizer = load.tokenizer(str(model_dir))
            windows = text.windows(text.documents(self.dataset), tokenizer, self.max_length, total, seed=self.seed)
        fold(
            StreamedModel(model_dir, torch.float32),
            adapter,
            windows[: self.num_samples] if rounded else None,
            output_dir,
        )
        adapter.check_used(model_dir)
        told = {"rounded_layers": len(rounded)}
        if windows is None:
            return told
        found = told | self._measure(model_dir, adapter_dir, output_dir, windows[self.num_samples :])
        if found["lost"] > self.max_lost and not self.force:
            raise ValueError(
                f"rounding again lost {found['lost']:.0%} of what the adapter gains (KL {found['kl_corrected']:.4g} "
                f"corrected, {found['kl_packed']:.4g} folded, {found['kl_base']:.4g} base alone; allowed: "
                f"{self.max_lost:.0%}); keep the adapter apart (--format adapter), merge densely (--format merged), "
                "use a base of more bits, or write it all the same with --force"
            )
        return found

    def _measure(self, base: Path, adapter: Path, folded: Path, ids: Tensor) -> dict:
        """KL from the reference of the corrected, the folded and the bare model, and the share of the gain lost."""
        teacher, target = str(base), str(adapter)
        if self.teacher is not None:
            teacher, target = self.teacher, None
        reference = evaluate.states(load.model(teacher, target), ids).kept()
        models = {"corrected": (base, adapter), "packed": (folded, None), "base": (base, None)}
        kl = {}
        for name, (model, lora) in models.items():
            student = load.model(str(model), lora and str(lora))
            kl[name] = evaluate.quality(evaluate.states(student, ids), ids, reference)["kl"]
        gain = kl["base"] - kl["corrected"]
        lost = (kl["packed"] - kl["corrected"]) / gain if gain > 0 else float("inf")
        return {f"kl_{name}": value for name, value in kl.items()} | {"lost": lost}
