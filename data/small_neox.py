"""A small GPT-NeoX trained from nothing on `wikipedia:train`: `python data/small_neox.py`.

A second architecture where no model hub is reachable: fused query-key-value, biases, LayerNorm, attention and MLP in
parallel, untied head. Five million weights in the blocks and a vocabulary of 512 of its own, so small that the blocks
have to spell; trained for one pass over the articles, about ten minutes on one core. It has learned words and little
grammar, which is enough to ask whether a correction that was found on SmolLM2 gains here too.
"""

import sys
from pathlib import Path

import wikipedia
from package_file import cache_folder, complete_folder

LENGTH, BATCH, VOCABULARY = 256, 4, 512


def path() -> Path:
    """The model's folder, trained if it is not there."""
    target = cache_folder() / "small-neox"
    if not target.exists():
        with complete_folder(target) as folder:
            _train(folder)
    return target


def _train(folder: Path) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, get_cosine_schedule_with_warmup

    from lrec import text

    articles = text.documents(str(wikipedia.path("train")))
    tokenizer = _tokenizer(articles)
    ids = text.windows(articles, tokenizer, LENGTH, seed=0)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batches = ids.split(BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    for step, batch in enumerate(batches):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {len(batches)}, loss {loss.item():.2f}", file=sys.stderr)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(articles: list[str]):
    """Byte-level BPE of these articles."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(articles, VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")


if __name__ == "__main__":
    print("there:" if (cache_folder() / "small-neox").exists() else "training", file=sys.stderr)
    print(path())
