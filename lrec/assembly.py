"""A packed model directory in the making: one shard a block, and nothing that loads until all are there.

Until `finish` there is no config.json and no index, only shards and `lrec_progress.json`, which says how far the run
came and of which run it is; a shard is named in it only after it is on disk. So an interrupted run loses at most the
block it was in, and a directory that loads is complete. Of several processes the main one writes; the others know
what it knows.
"""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from torch import Tensor

from lrec import checkpoint, documents, formats, lowrank, processes
from lrec.formats import Packed

PROGRESS = "lrec_progress.json"
REPORT = "lrec_report.json"
LOWRANK = "lowrank_init.safetensors"


class Assembly:
    """The files of one run of the pass over `count` blocks; `fingerprint` identifies the run."""

    def __init__(self, directory: Path, fingerprint: str, count: int):
        """Takes up what an earlier run of the same fingerprint left, or starts in a new or empty directory.

        Raises ValueError if the directory holds anything else, so that nothing is overwritten.
        """
        self.directory, self.count = Path(directory), count
        self.progress = processes.from_main(lambda: self._begin(fingerprint))

    def _begin(self, fingerprint: str) -> dict:
        path = self.directory / PROGRESS
        if path.exists():
            progress = checkpoint.read_json(path, documents.Progress)
            if progress["fingerprint"] != fingerprint:
                raise ValueError(
                    f"{self.directory} holds an unfinished run with another model, text or settings; "
                    "remove it or choose another output_dir"
                )
            return progress
        if self.directory.exists() and any(self.directory.iterdir()):
            raise ValueError(
                f"{self.directory} is not empty; choose another output_dir or remove it (nothing was changed)"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        progress = {"fingerprint": fingerprint, "blocks": [], "seconds": 0.0}
        checkpoint.write_json(path, progress)
        return progress

    @property
    def num_done(self) -> int:
        """Number of blocks on disk."""
        return len(self.progress["blocks"])

    @property
    def rows(self) -> list[dict]:
        """A row for each layer of a block that is done: name, shape, spec, bytes, error and hash."""
        return [row for block in self.progress["blocks"] for row in block]

    @property
    def all_rows(self) -> list[dict]:
        """The same, behind the rows of what is packed in no block: embeddings and head."""
        return self.progress.get("rest", []) + self.rows

    def save_rest(self, tensors: dict[str, Tensor], rows: list[dict]) -> None:
        """Writes what is in no block by full name, and the rows of those layers of it that are packed."""
        if processes.is_main():
            checkpoint.write_tensors(self._shard(self.count), tensors)
        self.progress["rest"] = rows
        self._keep_progress()

    def save(self, tensors: dict[str, Tensor], rows: list[dict], factors: dict, seconds: float) -> None:
        """Writes the next block: its tensors by full name, its layers' rows and their low-rank factors."""
        index = self.num_done
        if processes.is_main():
            checkpoint.write_tensors(self._shard(index), tensors)
            if factors:
                lowrank.save(factors, self._factor_file(index))
        self.progress["blocks"].append(rows)
        self.progress["seconds"] += seconds
        self._keep_progress()

    def keep_sweep(self, rows: list[dict], seconds: float) -> None:
        """Notes what the sweep measured of its next block: rows of `allocation.to_target`'s table."""
        self.progress.setdefault("sweep", []).append(rows)
        self.progress["seconds"] += seconds
        self._keep_progress()

    @property
    def sweep(self) -> list[list[dict]]:
        """What `keep_sweep` noted, a list for each block."""
        return self.progress.get("sweep", [])

    def packed(self, index: int) -> dict[str, Packed]:
        """The packed layers of a block that is done, by full name. Raises ValueError if its shard is damaged."""
        path, found = self._shard(index), {}
        with checkpoint.open_tensors(path) as file:
            for row in self.progress["blocks"][index]:
                formats.check_spec(row["spec"])
                name, fields = row["name"], row["spec"]["tensors"]
                tensors = {field: checkpoint.tensor(file, f"{name}.{field}", path) for field in fields}
                if checkpoint.tensors_hash(tensors) != row["sha256"]:
                    raise ValueError(f"{path} was altered ({name} is not as it was saved); remove {self.directory}")
                found[name] = formats.build(tensors, row["spec"])
        return found

    def factors(self, index: int) -> lowrank.Factors:
        """The low-rank factors of a block that is done, by full name; empty if none were asked for."""
        path = self._factor_file(index)
        return lowrank.load(path) if path.exists() else {}

    def finish(self, config, about: dict, base_dir: Path, found: dict) -> dict:
        """Writes tokenizer, config, index, report and manifest; returns the report.

        `config` is the model's configuration; `about` says method, settings and base, and goes into its
        quantization_config and into the manifest; `found` is what the report says of the whole model. All processes
        return once everything is written.
        """
        report = self._report() | found
        if processes.is_main():
            self._write_rest(config, about, base_dir, report)
        processes.wait()
        return report

    def _write_rest(self, config, about: dict, base_dir: Path, report: dict) -> None:
        self._merge_factors()
        for path in checkpoint.tokenizer_files(base_dir):
            shutil.copyfile(path, self.directory / path.name)
        config.quantization_config = self._quantization_config(about, report)
        config.save_pretrained(self.directory)
        checkpoint.write_index(self.directory, [self._shard(i) for i in range(self.count + 1)])
        layers = [{key: value for key, value in row.items() if key != "spec"} for row in self.all_rows]
        sweep = {"sweep": self.sweep} if self.sweep else {}
        checkpoint.write_json(self.directory / REPORT, report | {"layers": layers} | sweep)
        checkpoint.write_manifest(self.directory, about)
        (self.directory / PROGRESS).unlink()

    def _keep_progress(self) -> None:
        if processes.is_main():
            checkpoint.write_json(self.directory / PROGRESS, self.progress)

    def _report(self) -> dict:
        weights = sum(row["shape"][0] * row["shape"][1] for row in self.rows)
        packed_bytes = sum(row["bytes"] for row in self.rows)
        return {
            "bits": dict(sorted(Counter(row["bits"] for row in self.rows).items())),
            "bits_per_weight": 8 * packed_bytes / weights,
            "packed_bytes": packed_bytes,
            **self._adapters_report(packed_bytes, weights),
            "num_layers": len(self.rows),
            "seconds": round(self.progress["seconds"], 2),
        }

    def _adapters_report(self, packed_bytes: int, weights: int) -> dict:
        """What is told of adapters whose ranks were allocated: layers by rank, and the size with them."""
        if not all("rank" in row for row in self.rows):
            return {}
        total = packed_bytes + sum(row["adapter_bytes"] for row in self.rows)
        ranks = Counter(row["rank"] for row in self.rows)
        return {"ranks": dict(sorted(ranks.items())), "bits_per_weight_with_adapters": 8 * total / weights}

    def _quantization_config(self, about: dict, report: dict):
        from lrec.integrations.transformers import LrecQuantConfig

        layers: dict[str, dict] = {}
        for row in self.all_rows:
            kind = layers.setdefault(json.dumps(row["spec"]), {"spec": row["spec"], "modules": []})
            kind["modules"].append(row["name"])
        packed_sha256 = hashlib.sha256("".join(row["sha256"] for row in self.all_rows).encode()).hexdigest()
        about = {**about}
        method, settings = about.pop("method"), about.pop("settings")
        meta = about | {"packed_sha256": packed_sha256, "bits_per_weight": report["bits_per_weight"]}
        return LrecQuantConfig(method=method, settings=settings, layers=list(layers.values()), meta=meta)

    def _merge_factors(self) -> None:
        parts = [path for path in map(self._factor_file, range(self.count)) if path.exists()]
        # The first goes first: while it is there, all are, and a run killed below does not merge what is left.
        if self._factor_file(0) in parts:
            factors = {name: pair for path in parts for name, pair in lowrank.load(path).items()}
            lowrank.save(factors, self.directory / LOWRANK)
        for path in parts:
            path.unlink()

    def _shard(self, index: int) -> Path:
        return self.directory / f"model-{index + 1:05}-of-{self.count + 1:05}.safetensors"

    def _factor_file(self, index: int) -> Path:
        return self.directory / f"lowrank-{index + 1:05}.safetensors"
