"""Rows of a task as token ids and labels: conversations in the model's chat template, prompts and completions, text.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": ..., "completion": ...}      both text, or both lists of messages
    {"text": "..."}

A label is the token's own id where it is to be learned, else -100. Of a conversation the assistant's turns are learned,
each from the end of its generation prompt to its own last token; of a prompt and completion, the completion; of a text,
all. Where a turn begins and ends is found by rendering the conversation up to it, so any template serves that renders
the beginning of a conversation as the beginning of the whole; of one that does not, because it drops earlier reasoning
say, the marks `{% generation %}` are asked for. ShareGPT's `conversations` of `from` and `value` count as messages.
"""

import json
import re

import jinja2

from lrec import text
from lrec.losses import IGNORE

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
KINDS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": "..."}'
SHOWN = 3  # faults that an error tells of


def read(
    dataset: str,
    tokenizer,
    num_samples: int | None,
    seed: int | None,
    max_length: int | None = None,
    completion_only: bool = True,
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels of the rows of a dataset, named as in `lrec.text`, each cut to `max_length`.

    With a seed a random choice of `num_samples`, in random order; without one, spaced evenly; all if None. Raises
    ValueError as `tokenize`, or for too few rows.
    """
    rows = text.rows(dataset)
    if num_samples is not None and not 1 <= num_samples <= len(rows):
        raise ValueError(f"{dataset} has {len(rows)} rows, but num_samples = {num_samples}: give 1 to {len(rows)}")
    if not rows:
        raise ValueError(f"{dataset} has no rows. A row is {KINDS}")
    rows = [rows[i] for i in text.chosen(len(rows), num_samples or len(rows), seed).tolist()]
    ids, labels = tokenize(rows, tokenizer, completion_only)
    return [row[:max_length] for row in ids], [row[:max_length] for row in labels]


def tokenize(rows: list[dict], tokenizer, completion_only: bool = True) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels of each row; with `completion_only` false, every token is learned.

    Raises ValueError that tells the first rows that are of no kind above, and how many are.
    """
    ids, labels, faults = [], [], []
    for number, row in enumerate(rows, start=1):
        try:
            tokens, learned = example({key: value for key, value in row.items() if value is not None}, tokenizer)
        except ValueError as error:
            faults.append(f"row {number} {error}")
            continue
        ids.append(tokens)
        labels.append([t if keep or not completion_only else IGNORE for t, keep in zip(tokens, learned, strict=True)])
    if faults:
        told = "; ".join(faults[:SHOWN])
        raise ValueError(f"{len(faults)} of {len(rows)} rows cannot be learned from: {told}. A row is {KINDS}")
    return ids, labels


def example(row: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of one row, and which of them are learned. Raises ValueError that says what is wrong with the row."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    if messages := row.get("messages") or row.get("conversations"):
        return _conversation(_messages(messages), 0, tokenizer, tools)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(_messages(prompt + completion), len(prompt), tokenizer, tools)
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = _ended(prompt + completion, tokenizer)
        start = _common(tokenizer(prompt, verbose=False)["input_ids"], ids)
        return ids, [position >= start for position in range(len(ids))]
    if isinstance(row.get("text"), str):
        ids = _ended(row["text"], tokenizer)
        return ids, [True] * len(ids)
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
    raise ValueError(f"has {found or 'nothing'}")


def _messages(turns) -> list[dict]:
    messages = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, dict):
            raise ValueError(f"has a message that is no object of role and content but a {type(turn).__name__}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not (isinstance(content, str | list) or turn.get("tool_calls")):
            raise ValueError(f"has a message without role or content ({', '.join(turn)})")
        rest = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
        named = {"human": "user", "gpt": "assistant"}.get(role, role)
        messages.append(rest | {"role": named} | ({} if content is None else {"content": content}))
    return messages


def _conversation(messages: list[dict], first: int, tokenizer, tools) -> tuple[list[int], list[bool]]:
    """Ids of a conversation; learned are the assistant's turns from the `first` message on."""
    turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"has no turn of the assistant ({', '.join(m['role'] for m in messages[first:])})")
    if not tokenizer.chat_template:
        raise ValueError(
            "is a conversation, but the model's tokenizer has no chat template: give --chat_template_path, a .jinja "
            "file, or rows of text"
        )
    whole = _render(messages, tokenizer, tools)
    learned = [False] * len(whole)
    for turn in turns:
        before = _render(messages[:turn], tokenizer, tools, add_generation_prompt=True)
        after = _render(messages[: turn + 1], tokenizer, tools)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            return whole, _marked(messages, first, tokenizer, tools)
        learned[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, learned


def _marked(messages: list[dict], first: int, tokenizer, tools) -> list[bool]:
    if not MARKS.search(tokenizer.get_chat_template(tools=tools)):
        raise ValueError(
            "is a conversation whose beginning the chat template renders otherwise than within the whole, and the "
            "template does not mark what is generated: give prompt and completion, one answer a row"
        )
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "tools": tools}
    mask = tokenizer.apply_chat_template(messages, **options)["assistant_masks"]
    start = len(_render(messages[:first], tokenizer, tools)) if first else 0
    return [bool(kept) and position >= start for position, kept in enumerate(mask)]


def _render(messages: list[dict], tokenizer, tools, **options) -> list[int]:
    if not messages:
        return []
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **options)["input_ids"]
    except jinja2.TemplateError as error:
        raise ValueError(f"is refused by the chat template: {error}") from error


def _ended(written: str, tokenizer) -> list[int]:
    """Ids of a text, its end marked by EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError("is text, but the tokenizer has no EOS token to end it with: set its eos_token")
    ids = tokenizer(written, verbose=False)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _common(prompt: list[int], whole: list[int]) -> int:
    """Where the two part: tokens that span the end of the prompt belong to the completion."""
    pairs = zip(prompt, whole, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
