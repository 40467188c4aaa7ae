"""A task on a corrected 2-bit SmolLM2-135M: a second adapter, rank 8, learns to answer in Wikipedia's manner.

    accelerate launch recipes/sft_smollm2_135m.py [--setting value ...]

Builds on recipes/lrec_smollm2_135m.py, whose model and correction it takes over or makes first. The task is a
demonstration: 457 questions made of 98 articles' paragraphs (data/wikipedia_questions.py), 42 held out of eight others.
Measured (Intel Xeon, 1 of 2 cores, shared, 2026-11-25; the task 6 min): loss of held-out answers 2.95 in full
precision, 5.10 quantized, 3.77 corrected, 3.57 with the task; 4.05 with the task straight on the quantized model.
"""

import sys

from lrec_smollm2_135m import passing, quantizer
from lrec_smollm2_135m import training as correcting

from lrec import options
from lrec.finetune import FinetuneConfig
from lrec.task_recipe import TaskRecipe

recipe = TaskRecipe(model="smollm2", output_dir="runs/smollm2_135m_int2", lora_r=32)
training = FinetuneConfig(
    output_dir="runs/smollm2_135m_int2/task",
    max_steps=56,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=8,
    save_strategy="no",
    gradient_checkpointing=False,  # a model this small need not trade time for memory
)

if __name__ == "__main__":
    task, config = options.fill(options.settings(sys.argv[1:]), recipe, training)
    task.teach(quantizer, passing, correcting, config)
