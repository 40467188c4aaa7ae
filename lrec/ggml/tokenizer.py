"""A byte-level BPE tokenizer in GGUF: tokens, their kinds, merges, special ids, chat template.

llama.cpp has the rules by which text is cut before merging under names; which one a tokenizer has is told here from
its own tokenizer.json, and never guessed.
"""

from pathlib import Path

from lrec import checkpoint

# The regular expressions of tokenizer.json -> llama.cpp's name (src/llama-vocab.cpp).
CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
}


def cut_name(pre_tokenizer: dict) -> str | None:
    """llama.cpp's name of the rule in tokenizer.json's `pre_tokenizer`; None if it is another."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    kinds = [step["type"] for step in before]
    if kinds == [] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits"] and before[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split"] and not last.get("use_regex", True):
        return CUTS.get(before[0]["pattern"].get("Regex"))
    return None


def describe(writer, directory: Path, vocab_size: int) -> None:
    """Writes the tokenizer of a model directory into a GGUFWriter; ids without a token become unused ones.

    Raises ValueError without a tokenizer.json, or for one that is not byte-level BPE with a rule llama.cpp has.
    """
    import gguf

    told = checkpoint.read_json(directory / "tokenizer.json")
    name = cut_name(told.get("pre_tokenizer") or {}) if told["model"]["type"] == "BPE" else None
    if name is None:
        raise ValueError(
            f"{directory / 'tokenizer.json'} is not byte-level BPE that cuts text as gpt-2, smollm, llama-bpe or "
            "qwen2 do; nearest that can: --format merged, then llama.cpp's convert_hf_to_gguf.py"
        )
    tokens = {i: (token, gguf.TokenType.NORMAL) for token, i in told["model"]["vocab"].items()}
    for added in told.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if not told["model"]["merges"]:
        raise ValueError(f"{directory / 'tokenizer.json'} has no merges, without which llama.cpp reads no tokenizer")
    if max(tokens) >= vocab_size:
        raise ValueError(f"{directory} has token id {max(tokens)}, but the model embeds {vocab_size}")
    listed = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
