"""Names become documents, documents become windows: on real files, with a tokenizer whose every id can be predicted."""

import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lrec import text

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    """Word "7" has id 7; id 0 ends a document."""
    words = Tokenizer(WordLevel({"</s>": EOS, **{str(i): i for i in range(1, 200)}}, unk_token="</s>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", model_max_length=4)


def numbers(first: int, last: int) -> str:
    return " ".join(str(i) for i in range(first, last + 1))


def test_windows_cut_the_joined_documents_without_gap_or_overlap(tokenizer):
    ids = text.windows([numbers(1, 3), numbers(4, 9)], tokenizer, length=4)
    assert ids.tolist() == [[1, 2, 3, EOS], [4, 5, 6, 7]]  # 8, 9, EOS are left over
    assert ids.dtype == torch.int64 and ids.is_contiguous()


def test_windows_with_a_stride_overlap(tokenizer):
    ids = text.windows([numbers(1, 7)], tokenizer, length=4, stride=2)
    assert ids.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, EOS]]


def test_windows_without_a_seed_are_evenly_spaced(tokenizer):
    ids = text.windows([numbers(1, 23)], tokenizer, length=2, num_samples=4, seed=None)
    assert ids[:, 0].tolist() == [1, 7, 13, 19]


def test_windows_with_a_seed_are_a_draw_without_replacement(tokenizer):
    def draw(seed, num_samples=10):
        return text.windows([numbers(1, 79)], tokenizer, 2, num_samples, seed)[:, 0].tolist()

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 10
    assert sorted(draw(1, num_samples=40)) == list(range(1, 80, 2))


def test_windows_of_too_short_a_text_say_what_is_there_and_what_is_needed(tokenizer):
    assert len(text.windows([numbers(1, 11)], tokenizer, 4, num_samples=3)) == 3
    with pytest.raises(ValueError, match=r"has 11 tokens in 1 documents; 3 windows of 4 tokens need 12.*at most 2"):
        text.windows([numbers(1, 10)], tokenizer, 4, num_samples=3)
    with pytest.raises(ValueError, match="has 0 tokens"):
        text.windows([], tokenizer, 4)


def test_a_short_text_is_taken_whole_where_fewer_windows_will_do(tokenizer):
    with pytest.warns(UserWarning, match=r"has 2 windows of 4 tokens.*fewer than the 3"):
        ids = text.windows([numbers(1, 10)], tokenizer, 4, num_samples=3, fewer=True)
    assert sorted(ids[:, 0].tolist()) == [1, 5]
    with pytest.raises(ValueError, match="has 3 tokens"):
        text.windows([numbers(1, 2)], tokenizer, 4, num_samples=3, fewer=True)


def test_windows_need_a_token_between_documents(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="EOS"):
        text.windows([numbers(1, 10)], bare, 4)


def test_documents_of_every_file_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ndocument")
    rows = [{"title": "t", "text": "first"}, {"title": "u", "text": " \n"}, {"title": "v", "text": "sécond"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    table = pyarrow.table({"id": [1, 2, 3], "content": ["first", None, "second"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    assert text.documents(str(tmp_path / "a.txt")) == ["one\n\ndocument"]
    assert text.documents(str(tmp_path / "b.jsonl")) == ["first", "sécond"]
    assert text.documents(str(tmp_path / "c.parquet")) == ["first", "second"]


def test_documents_of_an_unclear_table_name_its_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "id": 1}))
    with pytest.raises(ValueError, match="columns question, answer, id, of which strings: question, answer"):
        text.documents(str(tmp_path / "a.jsonl"))


def test_documents_of_a_broken_file_name_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*one JSON object a line"):
        text.documents(str(tmp_path / "a.jsonl"))


def test_documents_of_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        text.documents(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="Did you mean 'wikipedia'"):
        text.documents("wikipdia:test")


def test_a_script_in_the_working_folder_makes_a_dataset(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shelf.py").write_text("SPLITS = {'a': 'one.txt', 'b': 'two.txt'}\n")
    (tmp_path / "data" / "mine.py").write_text(
        "from pathlib import Path\nfrom shelf import SPLITS\n\n\n"
        "def path(split='a'):\n    file = Path(__file__).with_name(SPLITS[split])\n"
        "    file.write_text(f'split {split}')\n    return file\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert text.documents("mine") == ["split a"]
    assert text.documents("mine:b") == ["split b"]
    with pytest.raises(ValueError, match="allowed: mine, unseen, wikipedia"):
        text.documents("shelf")


@pytest.mark.parametrize(
    ("dataset", "asked", "found"),
    [
        ("owner/set", ("owner/set", None, "train", False), list("abcd")),
        ("owner/set:test", ("owner/set", None, "test", False), list("abcd")),
        ("owner/set:train[:10%]", ("owner/set", None, "train[:10%]", False), list("abcd")),
        ("owner/set:train[:2]", ("owner/set", None, "train", True), list("ab")),
        ("owner/set:raw-v1:test[1:3]", ("owner/set", "raw-v1", "test", True), list("bc")),
    ],
)
def test_hub_datasets_are_asked_for_by_id_configuration_and_split(monkeypatch, dataset, asked, found):
    def load_dataset(name, config, split, streaming=False):
        assert (name, config, split, streaming) == asked
        table = datasets.Dataset.from_dict({"text": list("abcd")})
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert text.documents(dataset) == found


def test_what_the_hub_does_not_give_is_an_error_that_says_what_was_tried():
    for ask in (text.model_path, text.documents):
        with pytest.raises(ValueError, match=r"'nobody/nothing' is nothing in .*Hub did not give it: .*network"):
            ask("nobody/nothing")


def test_model_path_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors.*save_pretrained"):
        text.model_path(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert text.model_path(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="revision 'main' means nothing"):
        text.model_path(str(tmp_path), revision="main")


def test_model_path_of_an_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'smollm2'"):
        text.model_path("smolm2")
    with pytest.raises(ValueError, match="an existing folder"):
        text.model_path(str(tmp_path / "gone"))
