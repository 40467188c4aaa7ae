"""bitsandbytes: NF4 in blocks of 64, scales quantized again, as QLoRA (2305.14314) and its documentation advise."""

from pathlib import Path

PACKAGE = "bitsandbytes"
ABSENT = {bits: "bitsandbytes has 4 bits (NF4, FP4) and 8, no 2 or 3" for bits in (2, 3)}
SETTINGS = "NF4, blocks of 64, double quantization (the documentation's advice for fine-tuning); needs no text"


def quantize(source: Path, bits: int, ids, folder: Path) -> None:
    """See `peers`."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def load(folder: Path, dtype):
    """See `peers`. Weights decode to bfloat16, in which they were given, and are multiplied in `dtype`."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    return model
