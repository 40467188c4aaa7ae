"""Where text and models come from: a name in, documents, token windows or a model folder out.

A dataset is named as
    FILE.txt | FILE.jsonl | FILE.parquet     a file; a .txt file is one document
    NAME[:SPLIT]                             a script of the `data/` folder (`wikipedia:test`), run on first use
    OWNER/NAME[[:CONFIG]:SPLIT]              from the Hugging Face Hub (`Salesforce/wikitext:wikitext-2-raw-v1:test`);
                                             of a split like `train[:20000]`, those rows alone are fetched
A model is named as a folder, a script of the `data/` folder that makes one (`smollm2`), or a Hub id.
Only safetensors, JSON and tokenizer files of a model are fetched: nothing that could run code, unless its code is
trusted.
"""

import importlib.util
import itertools
import json
import re
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from lrec import foreign
from lrec.registry import nearest

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
# Second copies of the weights, in folders or in their author's own layout; transformers does not read them.
SECOND_COPIES = ["*/*", "consolidated*"]
HUB_MODEL = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# One part after the id is the split, not the configuration; a split may be sliced: `train[:1000]`.
HUB_DATASET = re.compile(rf"({HUB_MODEL.pattern})(?::([^:\[]+))??(?::([^:\[]+(?:\[.*\])?))?")
ROWS = re.compile(r"(\w+)\[(\d*):(\d+)\]")
# How the two kinds of data script begin their one public function.
MODEL_SCRIPT, TEXT_SCRIPT = "\ndef path() ", "\ndef path(split"


def documents(dataset: str) -> list[str]:
    """The documents of a dataset, in order, blank ones left out.

    The text is the column `text`, or else the only column of strings. Raises ValueError if there is neither, or if
    nothing goes by that name.
    """
    import pyarrow

    found = _find(dataset)
    if isinstance(found, re.Match):
        return _texts(_hub_table(*found.groups(default="")), found[1])
    if found.suffix == ".txt":
        return [found.read_text(encoding="utf-8")]
    table = _parquet(found) if found.suffix == ".parquet" else pyarrow.Table.from_pylist(_json_rows(found))
    return _texts(table, str(found))


def rows(dataset: str) -> list[dict]:
    """The rows of a dataset, in order, with all their columns; a .txt file is one row, `text`.

    Raises ValueError if nothing goes by that name.
    """
    found = _find(dataset)
    if isinstance(found, re.Match):
        return _hub_table(*found.groups(default="")).to_pylist()
    if found.suffix == ".txt":
        return [{"text": found.read_text(encoding="utf-8")}]
    return _parquet(found).to_pylist() if found.suffix == ".parquet" else _json_rows(found)


def _find(dataset: str) -> Path | re.Match:
    """The file of a dataset, made by its script on first use, or the parts of a Hub id (name, config, split)."""
    path = Path(dataset).expanduser()
    if path.suffix in (".txt", ".jsonl", ".parquet"):
        if not path.is_file():
            raise ValueError(f"dataset {dataset!r}: there is no such file (working folder: {Path.cwd()}).")
        return path
    name, _, split = dataset.partition(":")
    if name in _scripts(TEXT_SCRIPT):
        return data_path(name, *filter(None, [split]))
    if match := HUB_DATASET.fullmatch(dataset):
        return match
    raise ValueError(
        f"{_unknown('dataset', name, _scripts(TEXT_SCRIPT))} a .txt, .jsonl or .parquet file, or a Hub id "
        "OWNER/NAME[[:CONFIG]:SPLIT]."
    )


def _unknown(kind: str, name: str, scripts: Collection[str]) -> str:
    """How the error begins for a name that is no script's, nor anything else that may be named."""
    if not scripts:
        return f"unknown {kind} {name!r}. A {kind} is"
    return f"{nearest(name, scripts, kind)} A {kind} is one of these,"


def model_path(name: str, revision: str | None = None) -> Path:
    """The folder with a model's safetensors and tokenizer: local, made by a data script, or fetched from the Hub."""
    folder = Path(name).expanduser()
    hub = not folder.is_dir() and name not in _scripts(MODEL_SCRIPT)
    if revision and not hub:
        raise ValueError(f"model {name!r} is not on the Hub, so revision {revision!r} means nothing: leave it out.")
    if folder.is_dir():
        path = folder
    elif not hub:
        path = data_path(name)
    elif HUB_MODEL.fullmatch(name):
        path = _hub_model(name, revision)
    else:
        raise ValueError(
            f"{_unknown('model', name, _scripts(MODEL_SCRIPT))} an existing folder (there is none of that name in "
            f"{Path.cwd()}), or a Hub id OWNER/NAME."
        )
    missing = [pattern for pattern in ("config.json", "*.safetensors") if not any(path.glob(pattern))]
    if missing:
        raise ValueError(
            f"model {name!r}: {path} has no {' and no '.join(missing)}. A model is a folder with config.json and "
            "safetensors; if its weights are in .bin files, load it in transformers and save_pretrained it first."
        )
    return path


def origin(folder: Path) -> tuple[str, str | None]:
    """Hub id and revision of a folder in the Hub's cache, or for any other its path and None."""
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$", folder.as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else (str(folder), None)


def windows(
    texts: list[str],
    tokenizer,
    length: int,
    num_samples: int | None = None,
    seed: int | None = 0,
    stride: int | None = None,
    fewer: bool = False,
) -> Tensor:
    """Token ids (num_samples, length): the documents joined by EOS and cut into windows, `stride` (length) apart.

    With a seed, windows are drawn without replacement; with None, they are evenly spaced over the text; without
    num_samples, all come, in order. Equal arguments give equal windows. No BOS is added: a window starts mid-text.
    Raises ValueError if the text is too short; with `fewer` only for no window at all, else it warns and takes all.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no EOS token to put between documents; set its eos_token.")
    # Not verbose: documents longer than the model's context are no cause for a warning, they are cut below.
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    batch = tokenizer(texts, **plain)["input_ids"] if texts else []
    ids = torch.tensor(list(itertools.chain.from_iterable([*document, tokenizer.eos_token_id] for document in batch)))
    stride = stride or length
    num_windows = max(0, (len(ids) - length) // stride + 1)
    if fewer and num_samples is not None and 0 < num_windows < num_samples:
        warnings.warn(
            f"the text has {num_windows} windows of {length} tokens, which are all used: fewer than the {num_samples} "
            "that are taken by default",
            stacklevel=2,
        )
        num_samples = num_windows
    if num_windows < (num_samples or 1):
        needed = length + ((num_samples or 1) - 1) * stride
        raise ValueError(
            f"the text has {len(ids)} tokens in {len(texts)} documents; {num_samples or 1} windows of {length} tokens "
            f"need {needed}. Take more text, or at most {num_windows} windows (--num_samples), or shorter ones "
            "(--max_length)."
        )
    cut = ids.unfold(0, length, stride)
    if num_samples is None:
        return cut.clone()
    return cut[chosen(num_windows, num_samples, seed)]


def chosen(count: int, num_samples: int, seed: int | None) -> Tensor:
    """Which `num_samples` of `count` things to take: drawn without replacement, or without a seed evenly spaced."""
    if seed is None:
        return torch.arange(num_samples) * count // num_samples
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_samples]


def overlap(seen_BL: Tensor, held_out_BL: Tensor, run: int = 24) -> float:
    """The share of the runs of `run` tokens in the held-out windows that the seen windows contain too, in any place.

    Runs are told apart by a polynomial modulo 2^64 in their tokens, whose collisions do not matter to a share."""
    run = min(run, seen_BL.shape[1], held_out_BL.shape[1])
    base = torch.full((run,), 6364136223846793005).cumprod(0)  # wraps around
    seen, held_out = ((ids.long().unfold(1, run, 1) * base).sum(-1).unique() for ids in (seen_BL, held_out_BL))
    return float(torch.isin(held_out, seen).double().mean())


def warn_overlap(seen_BL: Tensor, held_out_BL: Tensor, seen: str, held_out: str) -> None:
    """Warns if more than one per cent of the held-out text was seen; the strings say whose text it is."""
    share = overlap(seen_BL, held_out_BL)
    if share > 0.01:
        warnings.warn(
            f"{share:.0%} of the text of {held_out} is also in {seen}: figures on it say little of other text",
            stacklevel=2,
        )


def data_path(name: str, *split: str) -> Path:
    """What the script `data/<name>.py` makes: the file of a split, or a model's folder. Fetched on first use."""
    script = {**_scripts(MODEL_SCRIPT), **_scripts(TEXT_SCRIPT)}[name]
    # A script imports its siblings, as it does when run by hand. Appended, so that they shadow nothing.
    if str(script.parent) not in sys.path:
        sys.path.append(str(script.parent))
    spec = importlib.util.spec_from_file_location(f"lrec_data_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.path(*split)


def _scripts(kind: str) -> dict[str, Path]:
    """Data scripts of a kind by name: files of ./data, or else of the `data/` beside the package, that contain it."""
    folders = [Path(__file__).resolve().parents[1] / "data", Path.cwd() / "data"]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return {file.stem: file for file in files if kind in file.read_text(encoding="utf-8")}


def _json_rows(path: Path) -> list[dict]:
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}. A .jsonl file has one JSON object a line."
                ) from error
    return found


def _parquet(path: Path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


def _hub_table(name: str, config: str, split: str):
    import pyarrow
    from datasets import load_dataset

    try:
        if part := ROWS.fullmatch(split):
            # Streamed, because a slice of C4 must not fetch its 300 GB.
            first, last = int(part[2] or 0), int(part[3])
            dataset = load_dataset(name, config or None, split=part[1], streaming=True)
            return pyarrow.Table.from_pylist(list(dataset.skip(first).take(last - first)))
        dataset = load_dataset(name, config or None, split=split or "train")
    except OSError as error:
        raise _not_fetched("dataset", name, error) from error
    return dataset.with_format("arrow")[:]


def _hub_model(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*MODEL_FILES, *(["*.py"] if foreign.trusted() else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=SECOND_COPIES))
    except OSError as error:
        raise _not_fetched("model", name, error) from error


def _not_fetched(what: str, name: str, error: OSError) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ValueError(
        f"{what} {name!r} is nothing in {Path.cwd()}, and the Hugging Face Hub did not give it: {reason}. Check the "
        "spelling, the network and, if it is gated, `hf auth login`."
    )


def _texts(table, where: str) -> list[str]:
    """The text column of a pyarrow Table."""
    from pyarrow.types import is_large_string, is_string

    strings = [field.name for field in table.schema if is_string(field.type) or is_large_string(field.type)]
    if "text" not in strings and len(strings) != 1:
        raise ValueError(
            f"{where} has columns {', '.join(table.column_names) or 'none'}, of which strings: "
            f"{', '.join(strings) or 'none'}. Text is the column `text` or the only column of strings: rename one."
        )
    column = table["text" if "text" in strings else strings[0]]
    return [text for text in column.to_pylist() if text and text.strip()]
