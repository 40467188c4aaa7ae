"""The steps of a training told as all long steps are, in the place of transformers' own bar and printed logs."""

from datasets import disable_progress_bars
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from lrec import processes
from lrec.progress import Progress

TOLD = ("loss", "kl", "eval_kl", "eval_loss")


class TrainingProgress(TrainerCallback):
    """A step a tick with the last logged loss beside it; an evaluation is an inner bar of its batches."""

    def __init__(self):
        self.steps = self.batches = None

    @staticmethod
    def in_main_alone() -> None:
        """Of several processes only the main one shows datasets' bars, which trl shows in each."""
        if not processes.is_main():
            disable_progress_bars()

    @classmethod
    def take_over(cls, trainer: Trainer) -> None:
        """Puts this in the place of what transformers tells progress by; a notebook keeps its own."""
        for callback in (ProgressCallback, PrinterCallback):
            if trainer.pop_callback(callback) is not None:
                trainer.add_callback(cls())

    def on_train_begin(self, args, state, control, **kwargs):
        """See `TrainerCallback`."""
        if state.is_world_process_zero:
            self.steps = Progress(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        """See `TrainerCallback`."""
        if self.steps is not None:
            self.steps.update(state.global_step - self.steps.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """See `TrainerCallback`."""
        found = {name: f"{float(logs[name]):.4g}" for name in TOLD if name in (logs or {})}
        if self.steps is not None and found:
            self.steps.set_postfix(found, refresh=False)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """See `TrainerCallback`."""
        if self.steps is not None:
            if self.batches is None:
                self.batches = Progress(total=len(eval_dataloader), desc="held-out text", unit="batch", inner=True)
            self.batches.update()

    def on_evaluate(self, args, state, control, **kwargs):
        """See `TrainerCallback`."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def on_train_end(self, args, state, control, **kwargs):
        """See `TrainerCallback`."""
        if self.steps is not None:
            self.steps.close()
            self.steps = None
