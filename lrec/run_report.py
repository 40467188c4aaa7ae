"""`lrec report RUN`: what a run of `lrec quantize` or `lrec train` did, as one page to look at and one file of JSON.

The page is a file that loads nothing from anywhere: text, tables, and pictures as SVG inside it. All its numbers stand
in the JSON beside it, under the names of the sections. Both are made of what the run left in its directory; with
--samples the models are run too, side by side.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from lrec import anatomy, assembly, checkpoint, curves, load, logbook, memory, pass_memory, record, rewrite, shapes
from lrec import machine as machines
from lrec.options import setting
from lrec.report import Inspect
from lrec.side_by_side import Compared, compare

PAGE, DATA, TEMPLATE = "report.html", "report.json", "report.html.jinja"
# What the fields of a packed weight hold, see lrec/formats; those not named here are scales, zeros and tables.
CODES, INDICES = ("qweight", "salient"), ("index", "starts", "mask", "group")


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """`lrec report RUN`: one page and one JSON file that tell a run."""

    run_dir: str = field(
        metadata={"help": "output directory of `lrec quantize` or `lrec train` (the word after report)"}
    )
    model: str | None = setting(None, "the packed model of an adapter (none: where it was when the adapter was made)")
    teacher: str | None = setting(None, "the full-precision model (none: the one the packed model names)")
    samples: int = setting(0, "continue so many passages by each of the models, and compare their blocks' outputs")
    dataset: str | None = setting(None, "text of the passages; with --samples (none: the run's own)")
    output_dir: str | None = setting(None, f"where to write {PAGE} and {DATA} (none: into the run's directory)")
    device: str = setting("auto", "with --samples: auto (first GPU, else CPU), cpu, cuda ...")
    dtype: str = setting("auto", "with --samples: auto (float32 on a CPU, else bfloat16), float32 ...")

    def run(self) -> dict:
        """Writes both files; where they are. Raises ValueError for a directory that holds no finished run."""
        place = Path(self.output_dir or self.run_dir)
        told = self.gather()
        place.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(place / DATA, told)
        (place / PAGE).write_text(page(told), encoding="utf-8")
        return {
            "page": str(place / PAGE),
            "data": str(place / DATA),
            "sections": [name for name, v in told.items() if v],
        }

    def gather(self) -> dict:
        """All that the page tells, by section; a section of which the run left nothing is empty."""
        run = Path(self.run_dir)
        stamp = checkpoint.read_stamp(run) if run.is_dir() else {}
        if not stamp and not (run / assembly.REPORT).exists():
            raise ValueError(
                f"{run} is no finished run: it holds neither {assembly.REPORT} nor {checkpoint.ADAPTER_STAMP}; name "
                "the output_dir of `lrec quantize` or `lrec train`"
            )
        packed = self.packed_dir(stamp) if stamp else run
        adapter = run if stamp else None
        quantized = checkpoint.read_json(packed / assembly.REPORT) if (packed / assembly.REPORT).exists() else {}
        books = [logbook.read(directory) for directory in dict.fromkeys([packed, run])]
        compared = self.compared(packed, adapter, books[-1]) if self.samples else Compared([], [])
        return {
            "run": str(run),
            "made_by": machines.versions(),
            "summary": summary(packed, quantized, stamp),
            "settings": [settings(book) for book in books if book],
            "layers": quantized.get("layers", []),
            "blocks": compared.blocks,
            "training": {"history": stamp.get("history", []), "evaluations": stamp.get("evaluations", [])},
            "memory": [memory_told(book, stamp, packed, quantized) for book in books if book],
            "bytes": stored(packed, adapter),
            "quality": measured(packed) + (measured(adapter) if adapter else []),
            "samples": compared.samples,
        }

    def packed_dir(self, stamp: dict) -> Path:
        """The packed model of an adapter. Raises ValueError if it is not where it was."""
        named = self.model or stamp.get("base_model") or "an unknown place"
        if not Path(named).is_dir():
            raise ValueError(f"the packed model of {self.run_dir} is not at {named}; say where by --model DIRECTORY")
        return Path(named)

    def compared(self, packed: Path, adapter: Path | None, book: dict) -> Compared:
        """The models side by side. Raises ValueError if there is no text or no full-precision model to do it with."""
        dataset = self.dataset or book.get("settings", {}).get("dataset")
        if dataset is None:
            raise ValueError("--samples needs passages to continue: name a text with --dataset")
        teacher = self.teacher or base_of(packed)
        if teacher is None:
            raise ValueError(f"{packed} does not say what it was made from: name the full-precision model by --teacher")
        models = {
            "full precision": (teacher, None),
            "packed": (str(packed), None),
            "corrected": (str(packed), adapter and str(adapter)),
        }
        if adapter is None:
            del models["corrected"]
        return compare(models, dataset, self.samples, self.device, self.dtype)


def base_of(packed: Path) -> str | None:
    """The full-precision model that a packed one names, if it does."""
    return checkpoint.read_json(packed / checkpoint.MANIFEST).get("base_model")


def summary(packed: Path, quantized: dict, stamp: dict) -> dict[str, object]:
    """The figures that a reader looks for first, by what they are called."""
    held = Inspect(model=str(packed)).run()
    found = {
        "method": held["method"],
        "base model": held["base_model"],
        "packed layers": held["num_layers"],
        "bits": ", ".join(f"{n} layers of {bits}" for bits, n in Counter(quantized.get("bits", {})).items()),
        "bits per weight": held["bits_per_weight"],
        "share of the blocks' weights that is packed": held["quantized_share"],
        "bytes of the packed model": held["total_bytes"],
        "seconds of quantizing": quantized.get("seconds"),
    }
    if stamp:
        history = stamp.get("history") or [{}]
        term, name = ("kl", "KL") if "kl" in history[0] else ("loss", "loss")
        found |= {
            "what was trained": stamp.get("train"),
            "training steps": stamp.get("num_steps"),
            f"{name} at first": history[0].get(term),
            f"{name} at last": history[-1].get(term),
            "seconds of training": stamp.get("seconds"),
            "predicted peak bytes": stamp.get("predicted_peak_bytes"),
            "measured peak bytes": stamp.get("measured_peak_bytes"),
        }
    return {name: value for name, value in found.items() if value not in (None, "")}


def settings(book: dict) -> dict:
    """What a run was asked, when, with and on what."""
    return {name: book[name] for name in ("verb", "finished", "settings", "machine", "versions")}


def memory_told(book: dict, stamp: dict, packed: Path, quantized: dict) -> dict:
    """Memory over a run's time, and the parts that were predicted for it."""
    parts = stamp.get("parts", []) if book["verb"] == "train" else quantizing_parts(book, packed, quantized)
    return {"verb": book["verb"], **book["memory"], "predicted": parts}


def quantizing_parts(book: dict, packed: Path, quantized: dict) -> list[dict]:
    """The predicted parts of a quantizing pass; empty if the model that it read is not here any more."""
    base, asked = base_of(packed), book["settings"]
    if base is None or not Path(base).is_dir():
        return []
    place = torch.device(book["memory"]["device"])
    setup = memory.Setup(
        bits=max(map(int, quantized["bits"])), dtype=load.dtype_of(asked["dtype"], place), device=place.type
    )
    tokens = asked.get("num_samples", 0) * asked["max_length"] if "dataset" in asked else 0
    return memory.rows(pass_memory.quantizing(shapes.config_of(base), setup, tokens).parts)


def stored(packed: Path, adapter: Path | None) -> list[dict]:
    """Bytes on disk by what they hold, the most first; of the weight files' tensors and of whole adapter files."""
    specs, sizes = rewrite.packed(packed), Counter()
    for file in checkpoint.weight_files(packed):
        with checkpoint.open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is not a dict)
                part = tensors.get_slice(key)
                width = int(re.sub(r"\D", "", part.get_dtype()) or 8)
                sizes[holds(key, len(part.get_shape()), specs)] += width * torch.Size(part.get_shape()).numel() // 8
    if adapter:
        sizes["adapters"] = checkpoint.adapter_bytes(adapter)
        grids = adapter / checkpoint.BASE_TENSORS
        sizes["trained scales and zeros"] = grids.stat().st_size if grids.exists() else 0
    factors = packed / assembly.LOWRANK
    sizes["factors to start adapters from"] = factors.stat().st_size if factors.exists() else 0
    return [{"what": what, "bytes": n} for what, n in sizes.most_common() if n]


def holds(key: str, ndim: int, specs: dict[str, dict]) -> str:
    """What a tensor of a packed model's files is, in words."""
    layer, _, name = key.rpartition(".")
    if not anatomy.in_block(key):
        return "embeddings and head" if ndim > 1 or layer in specs else "norms and biases"
    if layer in specs:
        return "codes" if name in CODES else "indices" if name in INDICES else "scales, zeros and tables"
    return "weights left unpacked" if ndim > 1 else "norms and biases"


def measured(directory: Path) -> list[dict]:
    """What `lrec evaluate --record` kept of a model or adapter."""
    return [{"of": directory.name, **row} for row in record.rows(directory)]


def pictures(told: dict) -> dict[str, list[str]]:
    """SVG by section; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    history, evaluations = told["training"]["history"], told["training"]["evaluations"]
    titles = {"kl": "KL to the teacher over the steps", "loss": "Training loss over the steps"}
    if all(math.isclose(row.get("kl", 0.0), row["loss"], rel_tol=1e-3) for row in history):
        titles = {"kl": "KL to the teacher, which is the loss, over the steps"}
    logged = {name.removeprefix("eval_") for row in history + evaluations for name in row}
    terms = [term for term in titles if term in logged]
    return {
        "layers": [curves.layer_errors(told["layers"])] if curves.by_kind(told["layers"]) else [],
        "blocks": [curves.block_errors(told["blocks"])] if told["blocks"] else [],
        "training": [curves.training(history, evaluations, term, titles[term]) for term in terms],
        "memory": [curves.memory(part["verb"], part, part["predicted"]) for part in told["memory"]],
        "bytes": [curves.stored(told["bytes"])],
    }


def page(told: dict) -> str:
    """The page of what `RunReport.gather` found."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"shown": shown, "columns": columns}
    return environment.get_template(TEMPLATE).render(told=told, pictures=pictures(told))


def columns(rows: list[dict]) -> list[str]:
    """The names of the columns of a table: those of its rows that hold one number or text each."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if not any(isinstance(row.get(name), (dict, list)) for row in rows)]


def shown(value) -> str:
    """A value as the page shows it: numbers with four digits, whole ones with their thousands apart."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
