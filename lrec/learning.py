"""What of a packed model learns, as `lrec train` and recipes are told."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lrec import lora_bits
from lrec.formats.uniform import SCALE_WIDTHS
from lrec.options import setting


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What of a packed model learns, and how adapters start."""

    train: str = setting("adapters", "what learns: adapters, scales, zeros, codes by commas, or all (but codes)")
    scale_bits: int | None = setting(
        8, "bits in which trained scales and zeros of uniform layers are stored: 8 or 16 (none: as many as the base's)"
    )
    lora_r: int | None = setting(
        None, "rank of the adapters (none: layer by layer as quantizing allocated them, or 16 for all)"
    )
    lora_alpha: int | None = setting(None, "LoRA alpha; the update is scaled by alpha / r (none: alpha = r)")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_target_modules: str = setting("all-linear", "all-linear, or comma-separated names")
    lora_init: Literal["closed_form", "zero"] = setting(
        "closed_form", "start from the factors stored with the packed model, or from zero"
    )
    lora_pool: bool = setting(
        False,
        "adapters see each group's inputs summed, so that export packed folds them into float zero points exactly",
    )
    lora_bits: int = setting(
        16, "bits in which adapters are stored: 16 (bfloat16), or 8 (int8, trained so, a scale for each component)"
    )
    lora_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the adapters; bfloat16 ones are updated with stochastic rounding"
    )

    def __post_init__(self):
        if self.scale_bits not in (None, *SCALE_WIDTHS):
            raise ValueError(f"scale_bits = {self.scale_bits} is not offered; allowed: 8, 16, none")
        if self.lora_bits not in lora_bits.WIDTHS:
            raise ValueError(f"lora_bits = {self.lora_bits} is not offered; allowed: 16, 8")
        if self.lora_pool and self.lora_bits == 8:
            raise ValueError("lora_pool is for adapters that export packed folds away: leave lora_bits at 16")

    def learning(self) -> dict:
        """These settings by name, for another dataclass that has them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Learning)}
