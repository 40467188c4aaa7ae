"""Llama-2-7B to INT2 (GPTQ, groups of 64), corrected by rank-32 adapters trained with KL to the teacher.

    accelerate launch recipes/lrec_llama7b.py --model <local directory or Hub id> [--setting value ...]

Calibration and training text come from C4, held-out text from WikiText-2, both from the Hub; `--train_dataset` and
`--test_dataset` take files as well. The teacher is held in memory beside the packed model, so this needs a GPU with
about 18 GB. Measured: not yet on a 7B; the same code is measured in lrec_smollm2_135m.py.
"""

import sys

from lrec.blocks import PassSettings
from lrec.quantizers.gptq import GPTQ
from lrec.recipe import Recipe, main
from lrec.trainer import LrecConfig

recipe = Recipe(
    model="meta-llama/Llama-2-7b-hf",
    train_dataset="allenai/c4:en:train[:20000]",
    test_dataset="Salesforce/wikitext:wikitext-2-raw-v1:test",
    output_dir="runs/llama7b_int2",
    num_samples=128,
    max_length=2048,
    train_length=1024,
    lora_r=32,
)
quantizer = GPTQ(bits=2, group_size=64)
passing = PassSettings(init_rank=32, correct_stream=True)
training = LrecConfig(
    output_dir="runs/llama7b_int2/adapter",
    max_steps=500,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    learning_rate=1e-4,
)

if __name__ == "__main__":
    main(sys.argv[1:], recipe, quantizer, training, passing)
