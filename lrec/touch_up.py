"""The last step of folding: scales of a model whose codes were rounded again, trained by KL to what it is to say."""

from pathlib import Path

from datasets import Dataset
from torch import Tensor, nn

from lrec import load, prepare_model_for_training, trained
from lrec.teacher import LiveTeacher
from lrec.trainer import LrecConfig, LrecTrainer


def touch_up(folded: Path, teacher: nn.Module, ids: Tensor, num_steps: int, output_dir: Path) -> None:
    """Trains the scales of the packed model in `folded` for `num_steps` steps of one window of `ids` (B, L) each, and
    writes them into `output_dir` as `lrec train --train scales` does. Codes and zero points stay."""
    model = prepare_model_for_training(load.model(str(folded)), use_gradient_checkpointing=True)
    trained.start(model, ("scales",))
    config = LrecConfig(
        str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        logging_steps=max(1, num_steps // 8),
        save_strategy="no",
    )
    LrecTrainer(
        model=model,
        args=config,
        teacher=LiveTeacher(teacher),
        processing_class=load.tokenizer(str(folded)),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
    ).train()
    trained.settle(model)
    trained.save(model, output_dir)
