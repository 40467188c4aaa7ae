"""SmolLM2-135M-Instruct to 2 bits at fewer bytes than INT2.1 takes, and nearer to the full model: no adapter at all.

    accelerate launch recipes/equal_bytes_smollm2_135m.py [--setting value ...]

On a model this small adapters of rank 32 cost more than a bit per weight. Here that bit buys groups of 16 with 8-bit
scales and float zeros, which then learn by KL to the teacher, and `export` is the packed model with what they learned.
`--bits 3 --group_size 64` is as large and may spend the bytes on codes instead.
Measured: not yet.
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
