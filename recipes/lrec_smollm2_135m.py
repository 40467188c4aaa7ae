"""SmolLM2-135M-Instruct to INT2 (GPTQ, groups of 64), corrected by rank-16 adapters trained with KL to the teacher.

accelerate launch recipes/lrec_smollm2_135m.py [--setting value ...]
"""

import sys

from lrec import options
from lrec.quantizers.gptq import GPTQ
from lrec.recipe import Recipe
from lrec.trainer import LrecConfig

recipe = Recipe(model="smollm2", output_dir="runs/smollm2_135m_int2")
quantizer = GPTQ(bits=2, group_size=64)
training = LrecConfig(
    output_dir="runs/smollm2_135m_int2/adapter", max_steps=40, per_device_train_batch_size=4, learning_rate=1e-3
)

if __name__ == "__main__":
    recipe, quantizer, training = options.fill(options.settings(sys.argv[1:]), recipe, quantizer, training)
    recipe.run(quantizer, training)
