"""The `lrec` command: one verb, its settings as flags, one report.

Exit codes: 0 done, 1 done but for the methods of `compare` that failed, 2 wrong input (one clear message on stderr),
3 does not fit in memory or on the disk, 130 interrupted. With `--json` the report is the only thing on stdout.
"""

import contextlib
import errno
import json
import sys

from lrec import options, registry

VERBS = {
    "quantize": "pack a full-precision model into 2, 3, 4 or 8 bits, one block at a time",
    "import": "take over a GPTQ, AWQ, compressed-tensors, HQQ, bitsandbytes or GGUF checkpoint, bit for bit",
    "sample": "draw training text from the teacher, in its chat template if it has one",
    "cache": "run a teacher over the training text once and keep its targets on disk",
    "train": "train an adapter: by KL to the teacher to correct the quantization error, or on the rows of a task",
    "compare": "a table of methods on one model and text, and a picture",
    "evaluate": "perplexity, KL to the teacher and top-1 agreement on held-out text",
    "export": "write what others can load: a peft adapter, a dense model, GPTQ ...",
    "push": "put a packed model or an adapter on the Hugging Face Hub, with its card",
    "inspect": "what a packed model holds: bits, bytes, layers",
    "estimate": "memory of quantizing, caching and training, before any is spent; which cards fit",
    "bench": "bench kernels, step, generate, loss, cache: speed here beside peers, measured in the same run",
    "explain": "which kernel serves each layer here, and why faster ones stand aside",
}

# The verbs that the processes of an `accelerate launch` share; each of the others is one process's work.
SHARED = ("quantize", "cache", "train")

# The setting that a word right after the verb gives.
FIRST = {"bench": "what", "push": "directory"}

HELP = """lrec: fine-tune large language models quantized to 2, 3 or 4 bits

usage: lrec VERB [--setting value ...] [--config file.yaml] [--json]

{verbs}

`lrec VERB --help` lists a verb's settings and their defaults."""


def quantize(values: dict) -> dict:
    """`lrec quantize`."""
    from lrec import effort
    from lrec.blocks import PassSettings
    from lrec.restore import Preprocess
    from lrec.runs import Quantize

    quantizer = registry.find("quantizers", str(values.get("method", Quantize.method)))
    parts = (Quantize, quantizer, PassSettings, Preprocess)
    run, method, settings, preprocess = options.fill(effort.spend(values, *parts), *parts)
    return preprocess.run(run, method, settings)


def sample(values: dict) -> dict:
    """`lrec sample`."""
    from lrec.sample import Sample

    return options.fill(values, Sample)[0].run()


def cache(values: dict) -> dict:
    """`lrec cache`."""
    from lrec.capture import CaptureSettings
    from lrec.runs import Cache

    run, settings = options.fill(values, Cache, CaptureSettings)
    return run.run(settings)


def import_(values: dict) -> dict:
    """`lrec import`."""
    from lrec.runs import Import

    return options.fill(values, Import)[0].run()


def train(values: dict) -> dict:
    """`lrec train`."""
    run, config = options.fill(values, *train_parts(values))
    return run.run(config)


def train_parts(values: dict) -> tuple[type, type]:
    """What the settings of `lrec train` fill: the run and trl's configuration, for what --objective names."""
    from lrec.correction import Train
    from lrec.finetune import Finetune, FinetuneConfig
    from lrec.trainer import LrecConfig

    parts = {"kl": (Train, LrecConfig), "sft": (Finetune, FinetuneConfig)}
    objective = str(values.get("objective", Train.objective))
    if objective not in parts:
        raise ValueError(registry.nearest(objective, parts, "value of --objective"))
    return parts[objective]


def evaluate(values: dict) -> dict:
    """`lrec evaluate`."""
    from lrec.runs import Evaluate

    return options.fill(values, Evaluate)[0].run()


def compare(values: dict) -> dict:
    """`lrec compare`."""
    from lrec.compare import Compare

    return options.fill(values, Compare)[0].run()


def export(values: dict) -> dict:
    """`lrec export`."""
    run, target = options.fill(values, *export_parts(values))
    return run.run(target)


def export_parts(values: dict) -> tuple[type, type]:
    """What the settings of `lrec export` fill: the run, and the target that --format names."""
    from lrec import export
    from lrec.runs import Export

    return Export, export.find(str(values["format"])) if "format" in values else export.Export


def push(values: dict) -> dict:
    """`lrec push DIRECTORY`."""
    from lrec.hub import Push

    return options.fill(values, Push)[0].run()


def inspect(values: dict) -> dict:
    """`lrec inspect`."""
    from lrec.report import Inspect

    return options.fill(values, Inspect)[0].run()


def bench(values: dict) -> dict:
    """`lrec bench WHAT`."""
    what = str(values.pop("what", "nothing"))
    if what not in benches():
        raise ValueError(registry.nearest(what, benches(), "bench"))
    if what == "step" and "shape" in values:
        what = "step --shape"
    return options.fill(values, benches()[what])[0].run()


def benches() -> dict[str, type]:
    """What `lrec bench` can measure."""
    from lrec.bench.cache import CacheBench
    from lrec.bench.generate import Generate
    from lrec.bench.kernels import Kernels
    from lrec.bench.loss import Loss
    from lrec.bench.shape import ShapeStep
    from lrec.bench.step import Step

    return {
        "kernels": Kernels,
        "step": Step,
        "step --shape": ShapeStep,
        "generate": Generate,
        "loss": Loss,
        "cache": CacheBench,
    }


def estimate(values: dict) -> dict:
    """`lrec estimate`."""
    from lrec.estimate import Estimate

    return options.fill(values, Estimate)[0].run()


def explain(values: dict) -> dict:
    """`lrec explain`."""
    from lrec.report import Explain

    return options.fill(values, Explain)[0].run()


def help_text(verb: str | None, values: dict) -> str:
    """The help of `lrec`, or of one verb with all its settings and their defaults."""
    if verb is None:
        verbs = "\n".join(f"  {name:<10} {what}" for name, what in VERBS.items())
        return HELP.format(verbs=verbs)
    from lrec import compare, estimate, hub, report, restore, runs
    from lrec.blocks import PassSettings
    from lrec.capture import CaptureSettings
    from lrec.sample import Sample

    classes = {
        "quantize": lambda: (
            runs.Quantize,
            registry.find("quantizers", str(values.get("method", runs.Quantize.method))),
            PassSettings,
            restore.Preprocess,
        ),
        "import": lambda: (runs.Import,),
        "sample": lambda: (Sample,),
        "cache": lambda: (runs.Cache, CaptureSettings),
        "train": lambda: train_parts(values)[:1],
        "compare": lambda: (compare.Compare,),
        "evaluate": lambda: (runs.Evaluate,),
        "export": lambda: export_parts(values),
        "push": lambda: (hub.Push,),
        "estimate": lambda: (estimate.Estimate,),
        "bench": lambda: tuple(benches().values()),
        "inspect": lambda: (report.Inspect,),
        "explain": lambda: (report.Explain,),
    }[verb]()
    more = (
        "\nand what a step keeps (checkpointing, offload_checkpoints, embeddings, fused_backward; see lrec/step.py)"
        "\nand every setting of trl's SFTConfig (max_steps, learning_rate, per_device_train_batch_size ...)"
        if verb == "train"
        else ""
    )
    return f"lrec {verb}: {VERBS[verb]}\n\n{options.usage(*classes)}{more}"


def show(report: dict) -> str:
    """A report for people: rows as a table, the rest as one line each."""
    from lrec.report import table

    lines = [
        f"{key:<20} {value:.6g}" if isinstance(value, float) else f"{key:<20} {value}"
        for key, value in report.items()
        if not isinstance(value, list)
    ]
    for rows in report.values():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            lines += ["", *table(rows)]
    return "\n".join(lines)


def join(verb: str) -> None:
    """Connects this process to the others of its launch. Raises ValueError for a verb that they cannot share."""
    from lrec import processes

    if verb not in SHARED:
        raise ValueError(
            f"{processes.count()} processes were started, but this is one process's work: leave `accelerate launch` "
            f"or `torchrun` out; {', '.join(SHARED)} and recipes share theirs"
        )
    processes.state()


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words.pop(0) if words and not words[0].startswith("-") else None
    try:
        if verb is not None and verb not in VERBS:
            raise ValueError(registry.nearest(verb, VERBS, "verb"))
        if verb in FIRST and words and not words[0].startswith("-"):
            words[0] = f"--{FIRST[verb]}={words[0]}"
        values = options.settings(words)
        if values.pop("help", False) or verb is None:
            print(help_text(verb, values))
            return 0
        as_json = bool(values.pop("json", False))
        from lrec import load, processes

        if processes.count() > 1:
            join(verb)
        with contextlib.redirect_stdout(sys.stderr):
            load.quiet()
            report = globals()["import_" if verb == "import" else verb](values)
        if processes.is_main():
            print(json.dumps(report) if as_json else show(report))
        return int(bool(report.get("failed")))
    except ValueError as error:
        print(f"lrec{' ' + verb if verb else ''}: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"lrec {verb}: does not fit in memory: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"lrec {verb}: does not fit on the disk ({error.strerror}); what is there stays valid", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"lrec {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
