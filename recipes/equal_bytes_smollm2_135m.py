"""SmolLM2-135M-Instruct to 2 bits at fewer bytes than INT2.1 takes, and nearer to the full model: no adapter at all.

    accelerate launch recipes/equal_bytes_smollm2_135m.py [--setting value ...]

On a model this small adapters of rank 32 take more than a bit per weight. Here that bit goes into groups of 16 with
8-bit scales and float zeros, which then learn by KL to the teacher; `export` is the packed model that holds them. Text
and training tokens are those of int21_smollm2_135m.py, which ends at KL 1.512 with 100.9 MB.
Measured (AMD EPYC, one core, shared, 2026-11-28; data/results/quality_smollm2.json): perplexity 40.2 and KL 0.805 at
3.00 bits per weight, 96.6 MB. Where codes need not have 2 bits, `--bits 3 --group_size 64 --scales_learning_rate
1.5e-3` spends 99.9 MB (3.25 bits) better: 27.9 and 0.409.
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
quantizer = GPTQ(bits=2, group_size=16, zero_point="float", scale_bits=8)
passing = PassSettings(init_rank=0)
training = LrecConfig(
    output_dir="runs/smollm2_135m_equal_bytes/adapter",
    max_steps=64,
    per_device_train_batch_size=1,
    logging_steps=8,
    gradient_checkpointing=False,  # a model this small need not trade time for memory
)

if __name__ == "__main__":
    main(sys.argv[1:], recipe, quantizer, training, passing)
