"""A teacher's targets on disk: a directory of shards, found by the token ids of a window.

    lrec_manifest.json          what the targets were made of, and every file's size and SHA-256
    head.safetensors            the teacher's head, once: `weight` (V, H), `bias` (V,) if it has one
    targets-00001.safetensors   `keys` (n, 16), a hash of each window's ids, and (n, L, ...) for each thing stored

A shard is named in the manifest only after it is on disk, and both are written whole or not at all. So an interrupted
capture loses at most the shard it was in, going on gives the same bytes, and what the manifest names is valid even if
the disk fills up. A cache that is not complete, or that has been altered, opens for nobody but the capture. Several
processes may write shards; the main one keeps the manifest.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrec import checkpoint, documents, processes
from lrec.head import Head

HEAD = "head.safetensors"
KEY_BYTES = 16
# The names and dtypes of what a shard holds, by kind of cache.
FEW = {"values": ("F16",), "ids": ("I16", "I32"), "lse": ("F32",), "ids_high": ("U8",)}
WANTED = {"hidden": {"hidden": ("BF16", "F32")}, "topk": FEW, "sampled": FEW}
# What may differ when a capture goes on: where the same teacher and text are, and how far it came.
INCIDENTAL = ("teacher", "files")


class TargetCache:
    """A cache directory: `about` is its manifest without the list of files.

    about: kind ("hidden", "topk" or "sampled"), num_windows, windows_per_shard, vocab_size, softcap, scale, and the
    fingerprints teacher_sha256, tokenizer and ids_sha256.
    """

    def __init__(self, directory: Path):
        """Raises ValueError if the directory holds no complete cache, or one that was altered."""
        self.directory = Path(directory)
        if not (self.directory / checkpoint.MANIFEST).exists():
            raise ValueError(f"{directory} is no teacher's cache; make one with `lrec cache`")
        checkpoint.verify(self.directory)
        path = self.directory / checkpoint.MANIFEST
        if "windows_per_shard" not in checkpoint.read_json(path):
            raise ValueError(f"{directory} is a model, not a teacher's cache; make one with `lrec cache`")
        self.about = checkpoint.read_json(path, documents.CacheManifest)
        self.files = self.about.pop("files")
        if self.num_done < self.num_shards:
            raise ValueError(
                f"{directory} is unfinished, {self.num_done} of {self.num_shards} shards; "
                "give the same `lrec cache` command again to go on"
            )
        self.places: dict[bytes, tuple[int, int]] = {}
        for shard in range(self.num_shards):
            with checkpoint.open_tensors(self.shard(shard)) as file:
                self._check_shard(shard, file)
                keys = file.get_tensor("keys")
            self.places |= {key.tobytes(): (shard, row) for row, key in enumerate(keys.numpy())}

    def _check_shard(self, index: int, file) -> None:
        """Raises ValueError unless a shard holds what its kind of cache has, in shapes that belong together."""
        found = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        rows, wanted = found.get("keys", ("", [0]))[1][0], WANTED[self.about["kind"]]
        shaped = [
            name
            for name, dtypes in wanted.items()
            if name in found and found[name][0] in dtypes and found[name][1][:2] == [rows, self.about["max_length"]]
        ]
        whole = {*shaped, "keys"} == found.keys() and {*wanted} - {*shaped} <= {"ids_high"}
        if not whole or found["keys"] != ("U8", [rows, KEY_BYTES]) or rows > self.about["windows_per_shard"]:
            raise ValueError(
                f"{self.shard(index)} holds {found}, not what a {self.about['kind']} cache has; make it anew"
            )

    @classmethod
    def begin(cls, directory: Path, about: dict) -> "TargetCache":
        """The unfinished cache of this description: a new one, or what an interrupted capture left. Collective.

        Raises ValueError if the directory holds anything else, and then names what differs."""
        cache = cls.__new__(cls)
        cache.directory, cache.about, cache.files = Path(directory), about, {}
        cache.files = processes.from_main(cache._begin)
        return cache

    def _begin(self) -> dict[str, dict]:
        """The files that are there, by name, in a directory made ready."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob(".*.partial"):
            partial.unlink()
        path = self.directory / checkpoint.MANIFEST
        if path.exists():
            checkpoint.verify(self.directory)
            found = checkpoint.read_json(path, documents.Manifest)
            wanted = {"format_version": checkpoint.FORMAT_VERSION, **self.about}
            differ = [key for key in {**wanted, **found} if key not in INCIDENTAL and wanted.get(key) != found.get(key)]
            if differ:
                raise ValueError(
                    f"{self.directory} holds a cache of another {', '.join(differ)}; "
                    "choose another output_dir or remove it (nothing was changed)"
                )
            return found["files"]
        if any(self.directory.iterdir()):
            raise ValueError(
                f"{self.directory} is not empty; choose another output_dir or remove it (nothing was changed)"
            )
        self._write_manifest()
        return self.files

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete cache."""
        return -(-self.about["num_windows"] // self.about["windows_per_shard"])

    @property
    def num_done(self) -> int:
        """Number of shards on disk."""
        return len(self.files.keys() - {HEAD})

    def shard(self, index: int) -> Path:
        """The file of a shard."""
        return self.directory / f"targets-{index + 1:05}.safetensors"

    def add(self, path: Path, tensors: dict[str, Tensor] | None) -> None:
        """Writes a file of the cache, if this process has one, then names in the manifest what all have written."""
        entry = None
        if tensors is not None:
            checkpoint.write_tensors(path, tensors)
            entry = path.name, checkpoint.file_entry(path)
        self.files |= dict(found for found in processes.everyones(entry) if found is not None)
        if processes.is_main():
            self._write_manifest()

    def head(self) -> Head:
        """The teacher's head, mapped from the file rather than read."""
        with checkpoint.open_tensors(self.directory / HEAD) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        V, weight, bias = self.about["vocab_size"], tensors.get("weight"), tensors.get("bias")
        if weight is None or weight.dim() != 2 or len(weight) != V or (bias is not None and bias.shape != (V,)):
            raise ValueError(f"{self.directory / HEAD} holds no head of {V} tokens; make the cache anew")
        return Head(tensors["weight"], tensors.get("bias"), self.about["softcap"], self.about["scale"])

    def missing(self, windows: Iterable[Sequence[int]]) -> int:
        """How many of these windows of ids the cache does not hold."""
        return sum(window_key(ids) not in self.places for ids in windows)

    def read(self, input_ids_BL: Tensor) -> dict[str, Tensor]:
        """What is stored of these windows, each thing (B, L, ...). Raises ValueError for a window that is not here."""
        rows = []
        for ids in input_ids_BL.tolist():
            key = window_key(ids)
            if key not in self.places:
                raise ValueError(
                    f"the window of {len(ids)} tokens {ids[:8]} ... is not in {self.directory}; train on the "
                    "windows it was made of: the same dataset, num_samples, max_length and seed"
                )
            shard, row = self.places[key]
            # Opened for each read: pages of a mapping that stays open would count as memory in use.
            with checkpoint.open_tensors(self.shard(shard)) as file:
                rows.append({name: file.get_slice(name)[row] for name in file.keys() if name != "keys"})  # noqa: SIM118
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _write_manifest(self) -> None:
        about = {"format_version": checkpoint.FORMAT_VERSION, **self.about, "files": self.files}
        checkpoint.write_json(self.directory / checkpoint.MANIFEST, about)


def window_key(ids: Sequence[int]) -> bytes:
    """A hash of a window's token ids, by which a cache knows it; 16 bytes."""
    return hashlib.blake2b(array("i", ids).tobytes(), digest_size=KEY_BYTES).digest()


def ids_hash(input_ids_nL: Tensor) -> str:
    """SHA-256 of windows of token ids."""
    return checkpoint.tensors_hash({"input_ids": input_ids_nL.to(torch.int64)})


def tokenizer_mark(tokenizer) -> dict:
    """The size of a tokenizer and the SHA-256 of its vocabulary, however it is written to files."""
    vocab = sorted(tokenizer.get_vocab().items())
    return {"size": len(tokenizer), "sha256": hashlib.sha256(repr(vocab).encode()).hexdigest()}
