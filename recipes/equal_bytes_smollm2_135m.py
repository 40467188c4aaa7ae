"""SmolLM2-135M-Instruct in fewer bytes than INT2.1 takes at 2 bits, and far nearer to the full model, without adapters.

    accelerate launch recipes/equal_bytes_smollm2_135m.py [--setting value ...]

On a model this small adapters of rank 32 take more than a bit per weight. Here that bit goes into wider codes for the
layers that measured error picks, most of 3 bits, 2 to 8; scales and float zeros, in 8 bits, then learn by KL to the
teacher; `export` is the packed model that holds them. Text and training tokens are those of int21_smollm2_135m.py.
Measured (AMD EPYC, one core, shared, 2026-11-28; data/results/quality_smollm2.json; two seeds): perplexity 26.4 and KL
0.341 at 3.25 bits per weight, 99.9 MB, where INT2.1 has 79.6 and 1.500 with 100.9 MB. With codes of 2 bits alone,
`--group_size 16 --target_bpw none --scales_learning_rate 1e-3`: 39.3 and 0.778 at 3.00 bits, 96.6 MB.
"""

import sys

from lrec.blocks import PassSettings
from lrec.quantizers.gptq import GPTQ
from lrec.recipe import Recipe, main
from lrec.trainer import LrecConfig

recipe = Recipe(
    model="smollm2",
    output_dir="runs/smollm2_135m_equal_bytes",
    num_samples=16,
    train="scales,zeros",
)
quantizer = GPTQ(bits=2, group_size=64, zero_point="float", scale_bits=8)
passing = PassSettings(init_rank=0, target_bpw=3.25)
training = LrecConfig(
    output_dir="runs/smollm2_135m_equal_bytes/adapter",
    max_steps=64,
    per_device_train_batch_size=1,
    scales_learning_rate=5e-4,
    logging_steps=8,
    gradient_checkpointing=False,  # a model this small need not trade time for memory
)

if __name__ == "__main__":
    main(sys.argv[1:], recipe, quantizer, training, passing)
