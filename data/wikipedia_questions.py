"""Questions and answers made from the articles of `wikipedia`: `python data/wikipedia_questions.py`.

No instruction data set can be fetched without a model hub, so this one is derived: of each article a conversation that
asks for the subject and is answered by the first paragraph, and one for each section that begins with its heading, cut
to whole sentences of at most 500 characters. 98 articles for `train`, the eight held out for `test`. It is good for
showing that a task is learned, an encyclopedia's manner of answering, and for nothing else: nobody checked the answers,
and they read as Wikipedia of 2016 does after its markup is stripped.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import wikipedia
from package_file import cache_folder, complete_folder

SPLITS = wikipedia.SPLITS
LONGEST = 500  # characters of an answer
HEADING = re.compile(r"([A-Z][\w ,'’-]{2,40})\n(?=\w)")


def path(split: str = "train") -> Path:
    """The jsonl file of `split`, one `{"messages": [...]}` a line, written if it is not there."""
    if split not in SPLITS:
        raise ValueError(f"wikipedia_questions has no split {split!r}; its splits are {' and '.join(SPLITS)}.")
    target = cache_folder() / "wikipedia_questions"
    if not target.exists():
        with complete_folder(target) as folder:
            for name in SPLITS:
                lines = wikipedia.path(name).read_text(encoding="utf-8").splitlines()
                rows = [row for line in lines for row in conversations(**json.loads(line))]
                text = "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
                (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return target / f"{split}.jsonl"


def conversations(title: str, text: str) -> Iterator[list[dict]]:
    """A question and its answer for the article and for each of its sections; none of lists of meanings."""
    first, *rest = re.split(r"\n{2,}", text)
    if "may refer to" in text[:2000] or "may also refer to" in text[:2000]:
        return
    asked = [(f"Tell me about {title}.", first)]
    for paragraph in rest:
        if heading := HEADING.match(paragraph):
            asked.append((f"Tell me about {title}: {heading[1].strip()}.", paragraph[heading.end() :]))
    for question, paragraph in asked:
        if answer := whole_sentences(paragraph):
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def whole_sentences(paragraph: str) -> str:
    """As many whole sentences as fit into `LONGEST` characters; empty if none does or they are no prose."""
    text = re.sub(r"\s+", " ", re.sub(r" ?\([;,\s]*\)", "", paragraph)).strip()
    end = max((found.end() for found in re.finditer(r"[a-z)\d]\.(?= |$)", text[: LONGEST + 1])), default=0)
    return text[:end] if end >= 80 else ""


if __name__ == "__main__":
    print("there:" if (cache_folder() / "wikipedia_questions").exists() else "making", file=sys.stderr)
    print(path("train"), path("test"), sep="\n")
