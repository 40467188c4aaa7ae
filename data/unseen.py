"""Text of other kinds than `wikipedia`, to measure on and never to train on: `python data/unseen.py`.

`manual` is the page about configuration files of the help of Mercurial, a version control system, as its PyPI package
ships it (GPL 2 or later), 130 kB. `news` is the background corpus of Lee, Pincombe and Welsh (2005), which gensim
ships as test data: 300 reports of the Australian Broadcasting Corporation, 2000 and 2001, 360 kB. Each line of
`manual.jsonl` and `news.jsonl` is one document, `{"text"}`.
"""

import json
import sys
from pathlib import Path

import wikipedia
from package_file import cache_folder, complete_folder, package_file

# Package, hash of its wheel, file in it.
SPLITS = {
    "manual": (
        "mercurial==7.2.4",
        "851e0e7036e75157a1cd517799a2e727b3ec6295a3a59c5667ad7004f121b317",
        "mercurial/helptext/config.txt",
    ),
    "news": (wikipedia.PACKAGE, wikipedia.SHA256, "gensim/test/test_data/lee_background.cor"),
}


def path(split: str = "news") -> Path:
    """The jsonl file of `split`, fetched and written if it is not there."""
    if split not in SPLITS:
        raise ValueError(f"unseen has no split {split!r}; its splits are {' and '.join(SPLITS)}. Name one of them.")
    target = cache_folder() / "unseen"
    if not target.exists():
        with complete_folder(target) as folder:
            for name, pinned in SPLITS.items():
                file = package_file(*pinned, folder)
                rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in _documents(name, file)]
                (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
                file.unlink()
    return target / f"{split}.jsonl"


def _documents(split: str, file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    return [text] if split == "manual" else [line.strip() for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    print("there:" if (cache_folder() / "unseen").exists() else "fetching", file=sys.stderr)
    print(path("manual"), path("news"), sep="\n")
