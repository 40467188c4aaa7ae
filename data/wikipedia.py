"""106 Wikipedia articles as plain text, from the PyPI package gensim: `python data/wikipedia.py`.

gensim ships the first pages of an English Wikipedia dump (May 2016, CC BY-SA 3.0) as test data. Redirects are
dropped, wiki markup is stripped, and whole articles are split: eight held out for `test`, the rest in `train`. Each
line of `train.jsonl` and `test.jsonl` is one article, `{"title", "text"}`: 2.9 MB in all, made in half a minute.
Splitting by article keeps the test text out of calibration and training; the split is a fixed list, so numbers taken
at different times compare.
"""

import bz2
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from package_file import cache_folder, complete_folder, package_file

PACKAGE = "gensim==4.4.0"
SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"
XML = "{http://www.mediawiki.org/xml/export-0.10/}"
TEST = {"Anarchism", "Albedo", "Algeria", "Apollo 11", "Albert Einstein", "Algorithm", "Anatomy", "Alkane"}
SPLITS = ("train", "test")


def path(split: str = "train") -> Path:
    """The jsonl file of `split`, fetched and written if it is not there."""
    if split not in SPLITS:
        raise ValueError(f"wikipedia has no split {split!r}; its splits are {' and '.join(SPLITS)}. Name one of them.")
    target = cache_folder() / "wikipedia"
    if not target.exists():
        with complete_folder(target) as folder:
            dump = package_file(PACKAGE, SHA256, DUMP, folder)
            _write_splits(dump, folder)
            dump.unlink()
    return target / f"{split}.jsonl"


def _write_splits(dump: Path, folder: Path) -> None:
    lines = {split: [] for split in SPLITS}
    for title, markup in _pages(dump):
        article = {"title": title, "text": _plain(markup)}
        lines["test" if title in TEST else "train"].append(json.dumps(article, ensure_ascii=False) + "\n")
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text("".join(lines[split]), encoding="utf-8")


def _pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wiki markup of every article of the dump that is not a redirect."""
    with bz2.open(dump) as xml:
        for _, page in ElementTree.iterparse(xml):
            if page.tag == f"{XML}page" and page.find(f"{XML}redirect") is None and page.findtext(f"{XML}ns") == "0":
                yield page.findtext(f"{XML}title"), page.findtext(f"{XML}revision/{XML}text")


def _plain(markup: str) -> str:
    """The prose of an article: no templates, tables, references, galleries, formulas, file captions, categories."""
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    tags = code.filter_tags(matches=lambda tag: tag.tag in ("ref", "table", "gallery", "math"))
    links = code.filter_wikilinks(matches=r"^\[\[\s*(File|Image|Category)\s*:")
    for node in tags + links:
        # One that stood inside another is gone with it.
        if code.contains(node):
            code.remove(node)
    return re.sub(r"\n{3,}", "\n\n", code.strip_code()).strip()


if __name__ == "__main__":
    print("there:" if (cache_folder() / "wikipedia").exists() else "fetching", file=sys.stderr)
    print(path("train"), path("test"), sep="\n")
