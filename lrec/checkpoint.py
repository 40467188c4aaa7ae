"""Files of a model directory: safetensors and JSON, written whole or not at all, verified when read.

`lrec_manifest.json` lists every weight file with its size and SHA-256. `verify` compares them before anything is
loaded, so that a truncated or altered file is an error and never a model that is subtly wrong. Nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrec import documents, tensor_file
from lrec.documents import read as read_json

SINGLE = "model.safetensors"
MANIFEST = "lrec_manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_STAMP = "lrec_adapter.json"
CORRECTION = "correction"  # an adapter below another: its name in peft, and its folder in that one's
STAMP_KEY = "lrec_adapter"  # of the metadata in the header of an adapter's weights
BASE_TENSORS = "base_tensors.safetensors"  # scales and zeros that were trained, see lrec.trained
FORMAT_VERSION = 1
# What transformers and peft open in a directory by themselves; of its JSON, what their own parsers limit.
LOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
PARSED_ELSEWHERE = ("tokenizer.json", "vocab.json")


def write_json(path: Path, value) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one."""
    _replace(path, [json_bytes(value)])


def json_bytes(value) -> bytes:
    """A value as a JSON file of ours holds it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a .jsonl file atomically, a row a line."""
    _replace(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def without_folders(value):
    """JSON with absolute paths cut to their last part: where things lie on this machine is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(held) for key, held in value.items()}
    if isinstance(value, list):
        return [without_folders(held) for held in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, `metadata` in its header, without a copy of what is written. Raises
    ValueError for a dtype that is not stored."""
    _replace(path, tensor_file.parts(tensors, {"format": "pt"} | (metadata or {})))


def open_tensors(path: Path):
    """A `safe_open` handle on a file (mmap). Raises ValueError that names the file if it is missing or damaged."""
    documents.own_file(Path(path))
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; it is named by the index of {path.parent}") from error
    except (SafetensorError, OSError) as error:  # of an empty file, mmap's own
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or make it again") from error


def tensor(file, key: str, path: Path) -> Tensor:
    """A tensor of an open file. Raises ValueError if the file has none of that name."""
    if key not in file.keys():  # noqa: SIM118  (safe_open is not a dict)
        raise ValueError(f"{path} has no tensor {key}; fetch or make it again")
    return file.get_tensor(key)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, from its index if it has one.

    Raises ValueError if there are none; pickled weights (.bin, .pt) are never read.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index, documents.Index)["weight_map"].values()))
        if SINGLE not in names and (directory / SINGLE).exists():
            raise ValueError(
                f"{directory} has {SINGLE}, which transformers would load, and an index that does not name it; remove "
                "the one that does not belong there"
            )
    else:
        names = [p.name for p in sorted(directory.glob("model*.safetensors"))]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}, which its index names; the copy is incomplete, "
            "fetch or make it again"
        )
    if not names:
        other = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" It has {', '.join(other[:3])}: convert to safetensors first (save_pretrained does)." if other else ""
        raise ValueError(f"{directory} has no model*.safetensors file.{hint}")
    return [directory / name for name in names]


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a model directory of the tokenizer and of generation, which every export carries over."""
    patterns = (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "chat_template*",
        "generation_config.json",
    )
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def write_index(directory: Path, shards: list[Path]) -> None:
    """Writes the index by which transformers finds each tensor's shard."""
    weight_map = {}
    for shard in shards:
        with open_tensors(shard) as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
    total = sum(shard.stat().st_size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def fingerprint(directory: Path) -> str:
    """Identity of a model's weights: SHA-256 over the names and contents of its weight files."""
    entries = [f"{p.name}:{file_hash(p)}" for p in weight_files(directory)]
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """Identity of a set of tensors, whatever files they lie in: SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        digest.update(t.flatten().view(dtype=torch.uint8).numpy())
    return digest.hexdigest()


def write_manifest(directory: Path, about: dict) -> None:
    """Writes the manifest: `about` (base model, recipe, versions) and each weight file's size and hash."""
    files = {path.name: file_entry(path) for path in weight_files(directory)}
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, **about, "files": files})


def check_files(directory: Path) -> None:
    """Raises ValueError for links that lead elsewhere and for damaged JSON among what transformers and peft open."""
    for path in (path for pattern in LOADED for path in directory.glob(pattern)):
        documents.own_file(path)
        if path.suffix == ".json" and path.name not in PARSED_ELSEWHERE:
            documents.load(path)


def verify(directory: Path) -> None:
    """`check_files`, and what the directory's manifest lists, if it has one.

    Raises ValueError naming every file that is missing, truncated or altered, for weights that the manifest does not
    list, and for a manifest made by a newer lrec.
    """
    directory = Path(directory)
    check_files(directory)
    if not (directory / MANIFEST).exists():
        return
    manifest = read_json(directory / MANIFEST, documents.Manifest)
    verify_files(directory, manifest, directory.glob("model*.safetensors"), MANIFEST)


def verify_files(directory: Path, told: documents.Manifest, found: Iterable[Path], name: str) -> None:
    """Holds the weight files `found` in a directory to those that its document of this name lists; see `verify`."""
    if told["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{directory / name} has format_version {told['format_version']}, "
            f"this lrec reads {FORMAT_VERSION}; upgrade lrec"
        )
    files = told["files"]
    wrong = [fault for file, entry in files.items() if (fault := _fault(directory / file, entry))]
    wrong += [f"{path.name} is not in {name}" for path in found if path.name not in files]
    if wrong:
        raise ValueError(f"{directory} is damaged: {'; '.join(wrong)}. Fetch it or make it again.")


def _fault(path: Path, entry: documents.FileEntry) -> str | None:
    """What is wrong with a file that a manifest lists."""
    documents.own_file(path)
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
    return f"{path.name} was altered (its SHA-256 differs)" if file_hash(path) != entry["sha256"] else None


def check_stamp(adapter_dir: Path, packed_sha256: str | None) -> dict:
    """The stamp of an adapter directory, from its file or the header of the weights; empty if it has none.

    Raises ValueError if it was made for packed weights other than `packed_sha256`.
    """
    stamp = read_stamp(Path(adapter_dir))
    if stamp and stamp.get("packed_sha256") != packed_sha256:
        raise ValueError(
            f"{adapter_dir} was made for a base with packed weights {str(stamp.get('packed_sha256'))[:12]}, but this "
            f"base has {str(packed_sha256)[:12]}; use the base it was trained on, or train an adapter for this one"
        )
    return stamp


def correction_of(adapter_dir: Path) -> Path | None:
    """The folder of the adapter that an adapter was trained on top of, where peft saves it; None if there is none."""
    below = Path(adapter_dir) / CORRECTION
    return below if (below / "adapter_config.json").exists() else None


def check_correction(adapter_dir: Path, stamp: dict, loaded: Collection[str]) -> None:
    """Raises ValueError if an adapter's stamp says that it was trained on top of one which is not among those of the
    weights' hashes `loaded`."""
    if stamp.get("correction_sha256") not in (None, *loaded):
        raise ValueError(
            f"{adapter_dir} was trained on top of a correcting adapter with weights {stamp['correction_sha256'][:12]}, "
            f"which is not loaded: load that one first, as adapter {CORRECTION!r}, from the folder {CORRECTION}/ "
            "in it or where it is, and make both active"
        )


def adapter_hash(adapter_dir: Path) -> str:
    """Identity of an adapter's weights: SHA-256 of their file."""
    return file_hash(Path(adapter_dir) / ADAPTER_WEIGHTS)


def read_stamp(adapter_dir: Path) -> dict:
    """What an adapter directory tells of the base it was made for, empty if nothing."""
    if (adapter_dir / ADAPTER_STAMP).exists():
        return read_json(adapter_dir / ADAPTER_STAMP, documents.Stamp)
    weights = adapter_dir / ADAPTER_WEIGHTS
    if not weights.exists():
        return {}
    with open_tensors(weights) as file:
        told = (file.metadata() or {}).get(STAMP_KEY, "{}")
    where = f"the header of {weights}"
    return documents.check(documents.parse(told, where), documents.Stamp, where)


def packed_sha256(base: nn.Module) -> str | None:
    """Identity of a packed model's weights as its config tells it; None for a model that is not packed by lrec."""
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    meta = getattr(config, "meta", None) or (config.get("meta") if isinstance(config, dict) else None) or {}
    return meta.get("packed_sha256")


def weights_bytes(directory: Path) -> int:
    """Bytes on disk of a model's weight files, or of an adapter's, of the one below it and of the scales and zeros
    trained with it."""
    named = [Path(directory) / name for name in (ADAPTER_WEIGHTS, BASE_TENSORS)]
    found = [path for path in named if path.exists()]
    below = correction_of(directory)
    return sum(path.stat().st_size for path in found or weight_files(Path(directory))) + adapter_bytes(below)


def adapter_bytes(directory: Path | None) -> int:
    """Bytes on disk of an adapter's own weights and those of one below it: trained scales and zeros take the place of
    the base's. None is no adapter."""
    if directory is None:
        return 0
    path = Path(directory) / ADAPTER_WEIGHTS
    return (path.stat().st_size if path.exists() else 0) + adapter_bytes(correction_of(directory))


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
