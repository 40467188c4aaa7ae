"""NF3: QLoRA's NormalFloat (arXiv 2305.14314) with 8 levels, as LoftQ (arXiv 2310.08659) uses it below 4 bits."""

from dataclasses import dataclass

from lrec.quantizers import setting
from lrec.quantizers.nf4 import Nf4


@dataclass(frozen=True, kw_only=True)
class Nf3(Nf4):
    """The nearest of 8 normal quantiles, zero among them, times the largest |w| of each block."""

    bits: int = setting(3, "bits per code; this method has one width")
