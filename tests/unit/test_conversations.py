"""Rows of a task as ids and labels: what is learned, told by brute force from the text, and by trl."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from lrec import conversations
from lrec.losses import IGNORE
from tests.checks import tiny_model

CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Turns before the last user's lose what the assistant thought: the beginning is not the beginning of the whole.
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '[assistant]' }}{% generation %}"
    "{{ (m['content'] if loop.last else m['content'].split('|')[-1]) + '</>' }}{% endgeneration %}"
    "{% else %}{{ '[' + m['role'] + ']' + m['content'] + '</>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer of single bytes, so that a token is a letter."""
    directory = tmp_path_factory.mktemp("letters")
    tiny_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHATML
    return tokenizer


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def learned(tokenizer, row, **options):
    """The text of a row, what is not learned shown as dots; labels must be the ids themselves."""
    (ids,), (labels,) = conversations.tokenize([row], tokenizer, **options)
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    letters = [tokenizer.decode([token]) for token in ids]
    return "".join("." if label == IGNORE else letter for label, letter in zip(labels, letters, strict=True))


def test_every_turn_of_the_assistant_is_learned_with_its_end(letters):
    row = {"messages": [{"role": "system", "content": "be kind"}, *turns("hi", "yo", "more?", "no.")]}
    text = "[system]be kind</>[user]hi</>[assistant]yo</>[user]more?</>[assistant]no.</>"
    shown = "." * text.index("yo") + "yo</>" + "." * len("[user]more?</>[assistant]") + "no.</>"
    assert learned(letters, row) == shown
    assert learned(letters, row, completion_only=False) == text
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    assert learned(letters, shared) == "." * len("[user]hi</>[assistant]") + "yo</>"


def test_of_prompt_and_completion_the_completion_is_learned(letters):
    assert learned(letters, {"prompt": "2+2=", "completion": "4"}) == "....4<eos>"
    row = {"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    assert learned(letters, row) == "." * len("[user]a</>[assistant]b</>[user]c</>[assistant]") + "d</>"
    assert learned(letters, {"text": "ab", "id": None}) == "ab<eos>"


def test_a_template_that_forgets_needs_marks(letters):
    row = {"messages": turns("q", "why|a", "r", "hm|b")}
    forgets = FORGETS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    letters.chat_template = FORGETS
    assert learned(letters, row) == "." * 21 + "a</>" + "." * 21 + "hm|b</>"
    later = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    assert learned(letters, later) == "." * (21 + 4 + 21) + "hm|b</>"
    letters.chat_template = forgets
    with pytest.raises(ValueError, match=r"1 of 1 rows .* does not mark what is generated: give prompt and completion"):
        learned(letters, row)
    letters.chat_template = CHATML


def test_labels_are_those_of_trl(letters, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    for rows in (
        [{"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "dd"}]}],
        [{"prompt": "one two", "completion": " three"}, {"prompt": "x", "completion": "y"}],
        [{"text": "all of this"}],
        [{"messages": turns("a", "b", "c", "d")}],
    ):
        conversational = "messages" in rows[0]
        config = SFTConfig(str(tmp_path), use_cpu=True, assistant_only_loss=conversational)
        stub = SimpleNamespace(
            _tokenizer=letters,
            chat_template=FORGETS if conversational else None,
            completion_only_loss="prompt" in rows[0],
        )
        found = SFTTrainer._prepare_dataset(stub, Dataset.from_list(rows), letters, config, False, None, "train")
        ids, labels = conversations.tokenize(rows, letters)
        assert found["input_ids"] == ids and found["labels"] == labels


def test_rows_that_fit_no_kind_are_told(letters):
    rows = [
        {"text": "good"},
        {"instruction": "x", "output": "y"},
        {"messages": turns("only a question")},
        {"messages": [{"role": "user"}]},
        {"prompt": "text", "completion": turns("a", "b")},
    ]
    with pytest.raises(ValueError) as caught:
        conversations.tokenize(rows, letters)
    told = str(caught.value)
    assert told.startswith(
        "4 of 5 rows cannot be learned from: row 2 has instruction (str), output (str); row 3 has no"
    )
    assert "row 4 has a message without role or content" in told and '{"text": "..."}' in told
    letters.chat_template = None
    with pytest.raises(ValueError, match="no chat template: give --chat_template_path"):
        learned(letters, {"messages": turns("a", "b")})
    letters.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refused by the chat template: roles must alternate"):
        learned(letters, {"messages": turns("a", "b")})
    letters.chat_template = CHATML


def test_rows_are_chosen_cut_and_counted(letters, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 5}) + "\n" for letter in "abcdefgh"))
    ids, labels = conversations.read(str(path), letters, 4, None, max_length=3)
    assert [letters.decode(row) for row in ids] == ["aaa", "ccc", "eee", "ggg"] and labels == ids
    drawn = conversations.read(str(path), letters, 4, seed=1)[0]
    assert drawn == conversations.read(str(path), letters, None, seed=1)[0][:4] and len(drawn[0]) == 6
    with pytest.raises(ValueError, match="has 8 rows, but num_samples = 9"):
        conversations.read(str(path), letters, 9, None)
