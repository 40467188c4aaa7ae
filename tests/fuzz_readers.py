"""Coverage-guided fuzzing of what reads manifests and caches: `make fuzz`, by atheris (libFuzzer).

A first byte chooses what is read: a model's manifest and index, an adapter's stamp, a cache's manifest, or a shard and
the head of a cache whose manifest agrees with them, as a forger's would. Whatever is no ValueError is a find.

    python tests/fuzz_readers.py -max_total_time=60 CORPUS
"""

import json
import os
import sys
import tempfile
from pathlib import Path

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
CACHE = {
    "format_version": 1,
    "kind": "hidden",
    "num_windows": 2,
    "windows_per_shard": 2,
    "max_length": 4,
    "vocab_size": 8,
    "softcap": None,
    "scale": 1.0,
    "teacher": "M",
    "teacher_sha256": "0",
    "tokenizer": {"size": 8, "sha256": "0"},
}


def seeds() -> list[bytes]:
    """A sound input for each thing that is read."""
    import torch
    from safetensors.torch import save

    tensors = {"keys": torch.zeros(2, 16, dtype=torch.uint8), "hidden": torch.zeros(2, 4, 4, dtype=torch.bfloat16)}
    entry = {"bytes": 1, "sha256": "0" * 64}
    documents = [
        {"format_version": 1, "files": {"model.safetensors": entry}},
        {"weight_map": {"a": "model-1.safetensors"}},
        {"packed_sha256": "0", "history": [{"loss": 1.0}], "seconds": 1.0},
        CACHE | {"files": {"head.safetensors": entry}},
    ]
    files = [save(tensors), save({"weight": torch.zeros(8, 4)})]
    return [bytes([i]) + data for i, data in enumerate([*(json.dumps(d).encode() for d in documents), *files])]


def read(data: bytes) -> None:
    """Reads what an input says; a ValueError is an answer."""
    from lrec import checkpoint
    from lrec.cache import TargetCache

    kind, body = (data[0] % 6 if data else 0), data[1:]
    name = [checkpoint.MANIFEST, "model.safetensors.index.json", checkpoint.ADAPTER_STAMP, checkpoint.MANIFEST]
    folder = PLACE / str(kind)
    folder.mkdir(exist_ok=True)
    try:
        if kind < 4:
            (folder / name[kind]).write_bytes(body)
        if kind == 0:
            checkpoint.verify(folder)
        elif kind == 1:
            checkpoint.weight_files(folder)
        elif kind == 2:
            checkpoint.check_stamp(folder, "0")
        elif kind == 3:
            TargetCache(folder)
        else:
            whole = dict(
                zip(("targets-00001.safetensors", "head.safetensors"), (s[1:] for s in SEEDS[4:]), strict=True)
            )
            whole[list(whole)[kind - 4]] = body
            for file, held in whole.items():
                (folder / file).write_bytes(held)
            entries = {file: checkpoint.file_entry(folder / file) for file in whole}
            checkpoint.write_json(folder / checkpoint.MANIFEST, CACHE | {"files": entries})
            cache = TargetCache(folder)
            cache.head()
            shard, row = next(iter(cache.places.values()), (0, 0))
            assert shard == 0 and 0 <= row < 2
    except ValueError as error:
        assert str(error)


SEEDS = seeds()


def main() -> None:
    """Runs atheris on `read` with its own flags; makes the corpus folder, the last word, if it is empty."""
    import atheris

    with atheris.instrument_imports(include=["lrec"]):
        import lrec.cache
        import lrec.checkpoint  # noqa: F401
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if words:
        corpus = Path(words[-1])
        corpus.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(SEEDS):
            (corpus / f"seed-{i}").write_bytes(seed)
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
