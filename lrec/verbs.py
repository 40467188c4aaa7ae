"""What `lrec` can be told: its verbs, in groups, and the settings that each takes. Nothing heavy is imported here, so
that the page `lrec --help` is there at once."""

import importlib

from lrec import options, registry

GROUPS = {
    "Make a small model and correct it": {
        "quantize": "pack a full-precision model into 2, 3, 4 or 8 bits, one block at a time",
        "import": "take over a GPTQ, AWQ, compressed-tensors, HQQ, bitsandbytes or GGUF checkpoint, bit for bit",
        "sample": "draw training text from the teacher, in its chat template if it has one",
        "cache": "run a teacher over the training text once and keep its targets on disk",
        "train": "train an adapter: by KL to the teacher to correct the quantization error, or on the rows of a task",
    },
    "Look at what there is": {
        "doctor": "what this machine has, what works here, and what would make it faster",
        "estimate": "memory of quantizing, caching and training, before any is spent; which cards fit",
        "evaluate": "perplexity, KL to the teacher and top-1 agreement on held-out text",
        "compare": "a table of methods on one model and text, and a picture",
        "report": "a page and a JSON file of what a run did: errors, curves, memory, bytes, samples",
        "inspect": "what a packed model holds: bits, bytes, layers",
        "explain": "which kernel serves each layer here, and why faster ones stand aside",
        "bench": "bench kernels, step, generate, loss, cache: speed here beside peers, measured in the same run",
    },
    "Ship it": {
        "export": "write what others can load: a peft adapter, a dense model, GPTQ ...",
        "push": "put a packed model or an adapter on the Hugging Face Hub, with its card",
    },
    "In your shell": {
        "completion": "completion bash, zsh, fish: the script by which a shell completes verbs, settings and values",
    },
}
VERBS = {verb: what for group in GROUPS.values() for verb, what in group.items()}

# The setting that a word right after the verb gives.
FIRST = {"bench": "what", "push": "directory", "report": "run_dir", "completion": "shell"}

HELP = """lrec fine-tunes large language models that are quantized to 2, 3 or 4 bits.

Usage: lrec VERB [--setting value ...] [--config file.yaml] [--json] [--trust_remote_code]

A first run, with MODEL a directory or a Hub id and any text file:

  lrec quantize --model MODEL --bits 2 --group_size 64 --dataset text.txt --output_dir Q
  lrec train    --model Q --teacher MODEL --dataset text.txt --max_steps 200 --output_dir A
  lrec report   A

{groups}

`lrec VERB --help` lists a verb's settings with their defaults. --config reads settings from a file, and flags win over
it; --json prints one JSON object and nothing else; code that comes with a model is run by --trust_remote_code alone.
A run that was interrupted goes on when it is started again.
Exit codes: 0 done, 1 done but for what the output calls failed, 2 wrong input, 3 does not fit in memory or on the disk.
"""

# The dataclasses that a verb's settings fill, where those do not depend on other settings.
SETTINGS = {
    "import": ["lrec.runs:Import"],
    "sample": ["lrec.sample:Sample"],
    "cache": ["lrec.runs:Cache", "lrec.capture:CaptureSettings"],
    "compare": ["lrec.compare:Compare"],
    "evaluate": ["lrec.runs:Evaluate"],
    "push": ["lrec.hub:Push"],
    "estimate": ["lrec.estimate:Estimate"],
    "report": ["lrec.run_report:RunReport"],
    "inspect": ["lrec.report:Inspect"],
    "explain": ["lrec.report:Explain"],
    "doctor": ["lrec.doctor:Doctor"],
    "completion": ["lrec.completion:Completion"],
}


def parts(verb: str, values: dict) -> tuple[type, ...]:
    """The dataclasses that the settings of a verb fill, the one that runs first."""
    own = {"quantize": quantize_parts, "train": train_parts, "export": export_parts, "bench": bench_parts}
    return own[verb](values) if verb in own else tuple(map(_find, SETTINGS[verb]))


def quantize_parts(values: dict) -> tuple[type, ...]:
    """Of `lrec quantize`: the run, the quantizer that --method names, the pass and what comes before it."""
    run = _find("lrec.runs:Quantize")
    quantizer = registry.find("quantizers", str(values.get("method", run.method)))
    return run, quantizer, _find("lrec.blocks:PassSettings"), _find("lrec.restore:Preprocess")


def train_parts(values: dict) -> tuple[type, type]:
    """Of `lrec train`: the run and trl's configuration, for what --objective names."""
    run = _find("lrec.correction:Train")
    pairs = {
        "kl": [run, "lrec.trainer:LrecConfig"],
        "sft": ["lrec.finetune:Finetune", "lrec.finetune:FinetuneConfig"],
    }
    objective = str(values.get("objective", run.objective))
    if objective not in pairs:
        raise ValueError(registry.nearest(objective, pairs, "value of --objective"))
    first, second = pairs[objective]
    return _find(first), _find(second)


def export_parts(values: dict) -> tuple[type, type]:
    """Of `lrec export`: the run, and the target that --format names."""
    export = importlib.import_module("lrec.export")
    return _find("lrec.runs:Export"), export.find(str(values["format"])) if "format" in values else export.Export


def bench_parts(values: dict) -> tuple[type, ...]:
    """Of `lrec bench`: all that it can measure."""
    return tuple(benches().values())


def benches() -> dict[str, type]:
    """What `lrec bench` can measure."""
    return {
        "kernels": _find("lrec.bench.kernels:Kernels"),
        "step": _find("lrec.bench.step:Step"),
        "step --shape": _find("lrec.bench.shape:ShapeStep"),
        "generate": _find("lrec.bench.generate:Generate"),
        "loss": _find("lrec.bench.loss:Loss"),
        "cache": _find("lrec.bench.cache:CacheBench"),
    }


def help_text(verb: str | None, values: dict) -> str:
    """The help of `lrec`, or of one verb with all its settings and their defaults."""
    if verb is None:
        groups = [
            "\n".join([f"{title}:", *(f"  {name:<10} {what}" for name, what in group.items())])
            for title, group in GROUPS.items()
        ]
        return HELP.format(groups="\n\n".join(groups)).rstrip()
    # Of trl's SFTConfig only what is lrec's own is listed.
    classes = parts(verb, values)[:1] if verb == "train" else parts(verb, values)
    more = (
        "\nand what a step keeps (checkpointing, offload_checkpoints, embeddings, fused_backward; see lrec/step.py)"
        "\nand every setting of trl's SFTConfig (max_steps, learning_rate, per_device_train_batch_size ...)"
        if verb == "train"
        else ""
    )
    return f"lrec {verb}: {VERBS[verb]}\n\n{options.usage(*classes)}{more}"


def _find(place: str | type) -> type:
    if isinstance(place, type):
        return place
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
