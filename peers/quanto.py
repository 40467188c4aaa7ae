"""optimum-quanto: qint2 and qint4 weights.

It takes groups of 128, or the next smaller multiple of 32 that divides the row: 96 where SmolLM2 has 576 inputs. Its
calibration is for activations, which stay as they are; for weights it offers an optimizer, of HQQ's kind.
"""

from pathlib import Path

PACKAGE = "optimum-quanto"
ABSENT = {3: "optimum-quanto has qint2, qint4 and qint8, no 3 bits"}
SETTINGS = (
    "qint2, qint4, its own groups of 96 and 128, its HqqOptimizer for zero points, lm_head excluded, as in its README; "
    "needs no text. Computes in bfloat16, in which it was quantized: it cannot be asked for another dtype"
)


def quantize(source: Path, bits: int, ids, folder: Path) -> None:
    """See `peers`."""
    import torch
    from optimum.quanto import HqqOptimizer, QuantizedModelForCausalLM, qint2, qint4
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).requires_grad_(False)
    weights = {2: qint2, 4: qint4}[bits]
    quantized = QuantizedModelForCausalLM.quantize(model, weights=weights, optimizer=HqqOptimizer(), exclude="lm_head")
    quantized.save_pretrained(folder)


def load(folder: Path, dtype):
    """See `peers`. The dtype stays that of the scales."""
    from optimum.quanto import QuantizedModelForCausalLM

    return QuantizedModelForCausalLM.from_pretrained(folder)._wrapped
