"""`lrec sample`: training text drawn from the teacher itself, where there is none of the right kind.

What a model says, drawn at temperature 1, is text of its own distribution, on which its quantized copy is to agree with
it. A base model begins after its EOS, which ends documents. An instruct model first plays the user: it is given its
chat template up to where the user speaks, says a question, and then answers it under the whole template (Magpie,
Xu et al., 2406.08464).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import checkpoint, load
from lrec.options import setting
from lrec.progress import Progress
from lrec.runs import Place

MARK = "<<the user speaks here>>"


@dataclass(frozen=True, kw_only=True)
class Sample(Place):
    """`lrec sample`: training text from the teacher, as a .jsonl file that --dataset reads."""

    model: str = field(metadata={"help": "full-precision model: local directory, Hub id, or a data/ script (smollm2)"})
    output: str = field(metadata={"help": "new .jsonl file"})
    num_samples: int = setting(128, "documents, or conversations of an instruct model")
    max_length: int = setting(512, "tokens of a document, or of each speaker")
    batch_size: int = setting(8, "documents drawn at once")
    temperature: float = setting(1.0, "divides logits; 1 is the model's own distribution")
    chat: bool | None = setting(None, "conversations in the chat template (none: if the model has one)")
    seed: int = setting(0, "of the draws")

    def run(self) -> dict:
        """Writes the file; what is in it. Raises ValueError for a file that exists, or a chat without a template."""
        path = Path(self.output)
        if path.suffix != ".jsonl":
            raise ValueError(f"--output {path} is not a .jsonl file, which is what --dataset reads")
        if path.exists():
            raise ValueError(f"{path} exists; choose another --output, or remove it (nothing was changed)")
        tokenizer = load.tokenizer(self.model)
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        if chat and not tokenizer.chat_template:
            raise ValueError(f"{self.model} has no chat template; leave --chat out for plain text")
        model = load.model(self.model, None, self.device, self.dtype)
        tokenizer.padding_side = "left"
        torch.manual_seed(self.seed)
        texts = list(self.documents(model, tokenizer, chat))
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_rows(path, [{"text": text} for text in texts])
        return {"output": str(path), "documents": len(texts), "chat": chat, "characters": sum(map(len, texts))}

    def documents(self, model: nn.Module, tokenizer, chat: bool) -> Iterator[str]:
        """The documents one by one. One that comes out empty is drawn again; raises ValueError if most do."""
        make = self.conversations if chat else self.texts
        found = drawn = 0
        with Progress(total=self.num_samples, desc="sample", unit="document") as told:
            while found < self.num_samples:
                if drawn > 2 * self.num_samples + self.batch_size:
                    raise ValueError(f"{self.model} said nothing in {drawn - found} of {drawn} draws; check the model")
                count = min(self.batch_size, self.num_samples - found)
                made = [text for text in make(model, tokenizer, count) if text.strip()]
                yield from made
                found, drawn = found + len(made), drawn + count
                told.update(len(made))

    def texts(self, model: nn.Module, tokenizer, count: int) -> list[str]:
        """What the model says after the end of a document."""
        start = torch.full((count, 1), tokenizer.eos_token_id)
        return self.draw(model, tokenizer, start, torch.ones_like(start))

    def conversations(self, model: nn.Module, tokenizer, count: int) -> list[str]:
        """Questions and answers under the chat template, fewer where the model asked nothing."""
        blank = [{"role": "user", "content": MARK}]
        opening = tokenizer.apply_chat_template(blank, tokenize=False).partition(MARK)[0]
        ids = torch.tensor(tokenizer(opening, add_special_tokens=False)["input_ids"]).repeat(count, 1)
        asked = self.draw(model, tokenizer, ids, torch.ones_like(ids))
        turns = [[{"role": "user", "content": question.strip()}] for question in asked if question.strip()]
        if not turns:
            return []
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        answers = self.draw(model, tokenizer, batch["input_ids"], batch["attention_mask"])
        return [
            tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": answer.strip()}], tokenize=False)
            for turn, answer in zip(turns, answers, strict=True)
        ]

    @torch.no_grad()
    def draw(self, model: nn.Module, tokenizer, ids_BL: Tensor, mask_BL: Tensor) -> list[str]:
        """What follows each row, up to `max_length` tokens, drawn from the whole distribution."""
        device = next(model.parameters()).device
        out = model.generate(
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            max_new_tokens=self.max_length,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        return tokenizer.batch_decode(out[:, ids_BL.shape[1] :], skip_special_tokens=True)
