"""AutoRound (2309.05516): rounding and clipping learned block by block with the sign of the gradient.

Its documentation advises its recipe `best` (1000 iterations, 512 samples of 2048 tokens) with `enable_alg_ext` for 2
bits and `auto-round` (200 iterations) for 4, which are hours of one core each. Here it is `auto-round-light`: 50
iterations at a rate of 5e-3, batches of 8, on twice the windows that lrec trains on, and `enable_alg_ext` for 2 bits. A
block took about 25 s of one core (AMD EPYC, 2026-11-28): 12 minutes a width; 200 iterations would take 50.
"""

from pathlib import Path

PACKAGE = "auto-round"
ABSENT = {}
NO_LORA = "peft has no LoRA for the QuantLinear that AutoRound computes with on a CPU"
SETTINGS = (
    "recipe auto-round-light (50 iterations, lr 5e-3, batches of 8) on 128 windows of 256 tokens, the recipe's own "
    "being of 2048; groups of 64 (128 do not divide 576), symmetric as its W2A16G64, W3A16, W4A16 are; "
    "enable_alg_ext at 2 bits; torch.compile off; saved in the auto_round format"
)
SCHEMES = {2: "W2A16G64", 3: "W3A16", 4: "W4A16"}


def quantize(source: Path, bits: int, ids, folder: Path) -> None:
    """See `peers`."""
    from auto_round import AutoRound

    tuner = AutoRound(
        str(source),
        scheme=SCHEMES[bits],
        group_size=64,
        iters=50,
        lr=5e-3,
        batch_size=8,
        dataset=[window[None] for window in ids],
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        enable_alg_ext=bits == 2,
        enable_torch_compile=False,
        device_map="cpu",
    )
    tuner.quantize_and_save(output_dir=str(folder), format="auto_round")


def load(folder: Path, dtype):
    """See `peers`."""
    from transformers import AutoModelForCausalLM

    (saved,) = folder.glob("*/")  # a folder of its own, named after model and scheme
    # Its own product for CPUs forces float16, which a CPU multiplies slowest of all; scales stay the numbers they are.
    return AutoModelForCausalLM.from_pretrained(saved, dtype=dtype, device_map="cpu").to(dtype)
