"""A recipe of a task: quantize, correct, learn the task on top; what each stage says of held-out rows.

The first two stages are those of a `Recipe`, and taken over where they are found complete.
"""

from dataclasses import dataclass
from pathlib import Path

from lrec import checkpoint, conversations, evaluate, load, processes, report
from lrec.finetune import Finetune, FinetuneConfig
from lrec.options import setting
from lrec.pass_settings import PassSettings
from lrec.quantizers import Quantizer
from lrec.recipe import Recipe
from lrec.runs import total_bytes
from lrec.trainer import LrecConfig


@dataclass(frozen=True, kw_only=True)
class TaskRecipe(Recipe):
    """Quantize, correct, learn a task by a second adapter, compare on held-out rows."""

    task_dataset: str = setting("wikipedia_questions:train", "rows of the task")
    task_test_dataset: str = setting("wikipedia_questions:test", "held-out rows")
    task_length: int = setting(512, "tokens of a row; the rest is cut off")
    task_r: int = setting(8, "rank of the task's adapter")
    prompts: str = setting("Tell me about Alkane.|Tell me about Algeria: Climate.", "questions, parted by |")

    def teach(
        self, quantizer: Quantizer, passing: PassSettings | None, correcting: LrecConfig, config: FinetuneConfig
    ) -> list[dict]:
        """Runs all stages, `correcting` being the correction's settings and `config` the task's, and prints the table
        and what each stage answers. Returns the table's rows."""
        load.quiet()
        self.quantize(quantizer, passing)
        self.correct(correcting)
        self.learn(config)
        processes.wait()
        if not processes.is_main():
            return []
        rows, answers = self.compare_answers()
        print("\n".join(["", *report.table(rows), "", *answers]))
        checkpoint.write_json(Path(self.output_dir) / "task_results.json", {"rows": rows, "answers": answers})
        return rows

    def learn(self, config: FinetuneConfig) -> None:
        """Trains the task's adapter unless it is there."""
        if not (Path(self.path("task")) / checkpoint.ADAPTER_STAMP).exists():
            Finetune(
                model=self.path("packed"),
                adapter=self.path("adapter"),
                output_dir=self.path("task"),
                dataset=self.task_dataset,
                max_length=self.task_length,
                lora_r=self.task_r,
                seed=self.seed,
            ).run(self.placed(config, "task"))

    def compare_answers(self) -> tuple[list[dict], list[str]]:
        """Each stage's loss on held-out rows and its size; and its answers."""
        tokenizer, packed = load.tokenizer(self.model), self.path("packed")
        held = conversations.read(self.task_test_dataset, tokenizer, None, None, self.task_length)
        questions = self.prompts.split("|")
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        stages = {
            "full precision": (self.model, None),
            "quantized": (packed, None),
            "corrected": (packed, self.path("adapter")),
            "with the task": (packed, self.path("task")),
        }
        rows, answers = [], [f"> {question}" for question in questions]
        for stage, (name, lora) in stages.items():
            model = load.model(name, lora)
            rows.append({"model": stage, **evaluate.rows_quality(model, *held), "bytes": total_bytes(name, lora)})
            for i, answer in enumerate(evaluate.continuations(model, tokenizer, asked)):
                answers[i] += f"\n  {stage:<16}{answer.strip()!r}"
        return rows, answers
