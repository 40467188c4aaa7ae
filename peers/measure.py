"""One row of the table, made in a process of its own: `python -m peers.measure LABEL`."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

from peers.rows import CACHE, CALIBRATION, FULL, LORA, MODEL, SEED, TEST, TRAIN, TRAINING, WORK, Label
from peers.sizes import quantized_weights, size, tensors


def once(folder: Path, make: Callable[[], dict | None]) -> dict:
    """What `make`, which fills a folder, told, with its seconds; kept beside the folder, and not made again.

    A folder that was left half made is removed first."""
    from lrec import checkpoint

    told = folder.with_suffix(".json")
    if not told.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        found = make() or {}
        checkpoint.write_json(told, found | {"wall_s": round(time.monotonic() - start, 1)})
    return json.loads(told.read_text())


def lrec(command: str) -> dict:
    """The report of a command line of lrec's, run in a process of its own, and only once: see `lrec.apart`."""
    from lrec import apart, options

    verb, *words = command.split()
    settings = options.read_flags(words)
    return apart.run(verb, settings, Path(settings.pop("output_dir")))


def teacher_cache() -> Path:
    """The teacher's hidden states on the training windows, as `lrec cache` writes them."""
    folder = WORK / "teacher_cache"
    lrec(f"{CACHE} --output_dir {folder}")
    return folder


@cache
def tokenizer():
    """The model's own."""
    from lrec import load

    return load.tokenizer(MODEL)


def windows(text: dict, seed: int | None):
    """Token ids (num_samples, max_length), as lrec takes them."""
    from lrec.runs import Text

    return Text(**text).input_ids(tokenizer(), seed)


def quality(model=None) -> dict:
    """Perplexity, KL(teacher || model) and top-1 agreement on the held-out windows; of the teacher itself for None."""
    from lrec import checkpoint, evaluate, load
    from lrec.head import Head

    ids = windows(TEST, None)
    full = load.model(MODEL, None, "cpu", "float32")
    path = WORK / "teacher_test.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = evaluate.states(full, ids, desc=FULL).kept().hidden
        checkpoint.write_tensors(path, {str(i): hidden for i, hidden in enumerate(batches)})
    with checkpoint.open_tensors(path) as file:
        kept = [file.get_tensor(str(i)) for i in range(len(list(file.keys())))]
    teacher = evaluate.States(kept, Head.of(full))
    return evaluate.quality(teacher if model is None else evaluate.states(model, ids), ids, teacher)


def quantized(label: Label) -> tuple[Path, dict]:
    """The folder of a peer's model, made if it is not there, and what was told of making it."""
    from lrec import text

    folder = label.place / "model"
    source = text.model_path(MODEL)
    return folder, once(folder, lambda: label.peer.quantize(source, label.bits, windows(CALIBRATION, SEED), folder))


def adapted(label: Label, folder: Path) -> tuple[Path, dict]:
    """The folder of an adapter in bfloat16, trained on a peer's model by lrec's trainer, and what was told of it."""
    place = label.place / "adapter"

    def train() -> dict:
        import torch
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model

        from lrec import checkpoint, lora_bits, text
        from lrec.cache import TargetCache
        from lrec.correction import history
        from lrec.teacher import CachedTeacher
        from lrec.trainer import LrecConfig, LrecTrainer

        torch.manual_seed(SEED)
        # By name: what peft calls all-linear leaves out hqq's class.
        names = sorted({name.rpartition(".")[2] for name in quantized_weights(text.model_path(MODEL))})
        # In training mode at once: on its first pass in the other, bitsandbytes packs weights for a CPU product that
        # has no gradient, and keeps them so.
        base = label.peer.load(folder, torch.bfloat16).train()
        model = get_peft_model(base, LoraConfig(**LORA, target_modules=names))
        trainer = LrecTrainer(
            model=model,
            args=LrecConfig(str(place), **TRAINING),
            teacher=CachedTeacher(TargetCache(teacher_cache()), model),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_dict({"input_ids": windows(TRAIN, SEED).tolist()}),
        )
        trainer.train()
        trainer.save_model(str(place))
        lora_bits.store(place / checkpoint.ADAPTER_WEIGHTS, 16)
        return {"history": history(trainer)}

    return place, once(place, train)


def peer_row(label: Label) -> dict:
    """Size and quality of a peer's model, under an adapter if the label says so."""
    import torch
    from peft import PeftModel

    from lrec import checkpoint, text

    folder, made = quantized(label.base or label)
    weights = quantized_weights(text.model_path(MODEL))
    stored = getattr(label.peer, "stored", tensors)(folder)
    found = {"settings": label.peer.SETTINGS, "version": version(label.peer.PACKAGE), "quantize_s": made["wall_s"]}
    adapter, adapter_bytes = None, 0
    if label.base:
        adapter, trained = adapted(label, folder)
        adapter_bytes = checkpoint.adapter_bytes(adapter)
        tokens = TRAIN["num_samples"] * TRAIN["max_length"]
        found |= {"training_tokens": tokens, "train_s": trained["wall_s"], "history": trained["history"]}
    found |= size(folder, stored, weights, adapter_bytes)
    model = label.peer.load(folder, torch.float32).eval()
    computed_in = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return found | {"computed_in": computed_in} | quality(model)


def our_row(label: Label) -> dict:
    """Size and quality of what lrec's command lines make."""
    from lrec import load, text

    commands = label.own.commands(str(label.place), str(teacher_cache()))
    told = {Path(folder).name: lrec(command) for folder, command in commands.items()}
    folder = Path([*commands][-1])
    model = load.model(str(folder), None, "cpu", "float32")
    found = {
        "commands": [f"lrec {command}" for command in commands.values()],
        "quantize_s": told["base"]["seconds"],
        "training_tokens": TRAIN["num_samples"] * TRAIN["max_length"],
        "train_s": told["trained"]["seconds"],
        "history": told["trained"]["history"],
    }
    return found | size(folder, tensors(folder), quantized_weights(text.model_path(MODEL))) | quality(model)


def full_row() -> dict:
    """The model that all are made of and compared with."""
    from lrec import text

    folder = text.model_path(MODEL)
    return size(folder, tensors(folder), quantized_weights(text.model_path(MODEL))) | quality()


def measure(label: Label) -> dict:
    """The row, written to its file too."""
    from lrec import checkpoint, load, lock, machine

    load.quiet()
    with lock.held(label.place):
        found = our_row(label) if label.own else peer_row(label) if label.peer else full_row()
    stamp = {"machine": machine.about(), "versions": machine.versions(), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
    row = {"method": label.text} | found | stamp
    label.place.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(label.row, row)
    return row


if __name__ == "__main__":
    measure(Label(sys.argv[1]))
