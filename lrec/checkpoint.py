"""Files of a model directory: safetensors and JSON, written whole or not at all, verified when read.

`lrec_manifest.json` lists every weight file with its size and SHA-256. `verify` compares them before anything is
loaded, so that a truncated or altered file is an error and never a model that is subtly wrong. Nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

MANIFEST = "lrec_manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_STAMP = "lrec_adapter.json"
CORRECTION = "correction"  # an adapter below another: its name in peft, and its folder in that one's
STAMP_KEY = "lrec_adapter"  # of the metadata in the header of an adapter's weights
BASE_TENSORS = "base_tensors.safetensors"  # scales and zeros that were trained, see lrec.trained
FORMAT_VERSION = 1


def write_json(path: Path, value) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one."""
    _replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a .jsonl file atomically, a row a line."""
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError that names the file if it is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; is {path.parent} a model directory?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged, fetch or make it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object: fetch or make it again")
    return value


def without_folders(value):
    """JSON with absolute paths cut to their last part: where things lie on this machine is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(held) for key, held in value.items()}
    if isinstance(value, list):
        return [without_folders(held) for held in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, `metadata` in its header; tensors are made contiguous on the CPU."""
    contiguous = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    _replace(path, save(contiguous, metadata={"format": "pt"} | (metadata or {})))


def open_tensors(path: Path):
    """A `safe_open` handle on a file (mmap). Raises ValueError that names the file if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; it is named by the index of {path.parent}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or make it again") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, from its index if it has one.

    Raises ValueError if there are none; pickled weights (.bin, .pt) are never read.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside its directory; it is damaged or hostile, do not use it")
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


def verify(directory: Path) -> None:
    """Checks a directory against its manifest; one without a manifest passes.

    Raises ValueError naming every file that is missing, truncated or altered, or a manifest made by a newer lrec.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        return
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory / MANIFEST} has format_version {manifest.get('format_version')}, "
            f"this lrec reads {FORMAT_VERSION}; upgrade lrec"
        )
    wrong = []
    for name, entry in manifest.get("files", {}).items():
        path = directory / name
        if Path(name).name != name:
            raise ValueError(f"{directory / MANIFEST} names {name!r}, outside its directory; it is damaged or hostile")
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written")
        elif file_hash(path) != entry["sha256"]:
            wrong.append(f"{name} was altered (its SHA-256 differs)")
    if wrong:
        raise ValueError(f"{directory} is damaged: {'; '.join(wrong)}. Fetch it or make it again.")


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
        return read_json(adapter_dir / ADAPTER_STAMP)
    weights = adapter_dir / ADAPTER_WEIGHTS
    if not weights.exists():
        return {}
    with open_tensors(weights) as file:
        return json.loads((file.metadata() or {}).get(STAMP_KEY, "{}"))


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


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
