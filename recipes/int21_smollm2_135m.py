"""SmolLM2-135M-Instruct to INT2 as INT2.1 did it (2306.08162): the published baseline of
equal_bytes_smollm2_135m.py, with the same text.

    accelerate launch recipes/int21_smollm2_135m.py [--setting value ...]

GPTQ, 2 bits in groups of 128; adapters of rank 32, alpha 128, dropout 0.05, B zero, on all linears but down_proj;
forward KL over the whole vocabulary and 0.059 of cross-entropy a token (their 120 over a window of 2048); Adam at a
constant rate, no clipping. They give 3e-5 for 7B and 3e-4 as default; of 3e-4, 1e-3 and 3e-3 the second was the best
here, by the KL of steps 17 to 32 (1.53, 1.51, 2.19).
Measured (AMD EPYC, one core, shared, 2026-11-28; data/results/quality_smollm2.json; two seeds): perplexity 79.6 and KL
1.500 at 3.32 bits per weight, 100.9 MB.
"""

import sys

from lrec.blocks import PassSettings
from lrec.quantizers.gptq import GPTQ
from lrec.recipe import Recipe, main
from lrec.trainer import LrecConfig

recipe = Recipe(
    model="smollm2",
    output_dir="runs/smollm2_135m_int21",
    num_samples=16,
    lora_r=32,
    lora_alpha=128,
    lora_dropout=0.05,
    lora_init="zero",
    lora_target_modules="q_proj,k_proj,v_proj,o_proj,up_proj,gate_proj",
)
quantizer, passing = GPTQ(bits=2, group_size=128), PassSettings(init_rank=0)
training = LrecConfig(
    output_dir="runs/smollm2_135m_int21/adapter", max_steps=64, per_device_train_batch_size=1, learning_rate=1e-3,
    lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0, weight_decay=1e-5, ce_weight=120 / 2048,
    logging_steps=8, gradient_checkpointing=False,
)  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1:], recipe, quantizer, training, passing)
