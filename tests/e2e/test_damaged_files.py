"""Damaged and hostile files of every kind: a ValueError that says what is wrong, or a sound reading, and nothing else.

`LREC_MUTATIONS=2000 pytest tests/e2e/test_damaged_files.py` damages each kind as often as the project's bar asks for.
"""

import copy
import functools
import json
import os
import shutil

import pytest
import torch
from checks import tiny_model
from mutations import survey
from safetensors.torch import load_file, save_file

from lrec import assembly, checkpoint, checkpoints, cli, compare, load, lowrank, options, record, runs, text
from lrec.blocks import packed_row
from lrec.cache import TargetCache
from lrec.lora_files import LoraFiles
from lrec.losses import Objective
from lrec.nn import packed_modules
from lrec.report import Inspect
from lrec.stream import StreamedModel
from lrec.teacher import CachedTeacher

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
COUNT = int(os.environ.get("LREC_MUTATIONS", "8"))
IDS = torch.arange(8)[None]
METHOD = "rtn:2"  # what is compared
METHODS = {"gptq": {"bits": 2}, "icquant": {"bits": 2}, "nf4": {}, "ptq161": {"refine_epochs": 0}}


@pytest.fixture(scope="module")
def place(tmp_path_factory, dense):
    """A directory with every kind of file that lrec reads, each in a folder of its own, and `outside`."""
    place = tmp_path_factory.mktemp("damaged")
    tiny_model(place / "sharded", max_shard_size="200KB")
    tiny_model(place / "M")
    (place / "text.txt").write_text(TEXT * 60)
    (place / "outside").mkdir()
    save_file({"secret": torch.zeros(2)}, place / "outside" / "secret.safetensors")
    for method, settings in METHODS.items():
        given = corpus(place) | settings
        run("quantize", model=place / "M", method=method, output_dir=place / method, **given)
        shutil.copytree(place / method, place / f"bare-{method}")
        (place / f"bare-{method}" / checkpoint.MANIFEST).unlink()  # so that what is damaged is read
    for kind, settings in {"hidden": {}, "topk": {"what": "topk", "top_k": 16}}.items():
        run("cache", model=place / "M", output_dir=place / kind, **corpus(place), **settings)
        shutil.copytree(place / kind, place / f"loose-{kind}")
    train(place)
    run("evaluate", model=place / "gptq", record=True, **corpus(place))
    compare_all(place / "C")
    half_done(place)
    imported(place, dense)
    (place / "settings").mkdir()
    (place / "settings" / "run.yaml").write_text("bits: 2\nmethod: gptq\nlayers: [1, {a: b}]\n")
    (place / "settings" / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two", "n": [1, 2]}\n')
    return place


def run(verb, **settings):
    assert cli.main([verb, *(f"--{name}={value}" for name, value in settings.items())]) == 0


def corpus(place):
    return {"dataset": str(place / "text.txt"), "num_samples": "4", "max_length": "16"}


def train(place):
    settings = {"max_steps": 2, "lora_r": 4, "use_cpu": True, "train": "all", "save_strategy": "steps", "save_steps": 1}
    run("train", model=place / "gptq", teacher=place / "M", output_dir=place / "A", **corpus(place), **settings)


def the_comparison(folder):
    values = corpus(folder.parent) | {"model": str(folder.parent / "M"), "methods": METHOD, "output_dir": str(folder)}
    return options.fill(values | {"test_dataset": values["dataset"], "test_samples": "2"}, compare.Compare)[0]


def compare_all(folder):
    """A comparison that finds its method quantized, so that no process has to be started."""
    job, entry = the_comparison(folder), compare.read_entry(METHOD, 0)
    packed = folder / "packed" / entry.folder
    report = cli.run("quantize", {"model": job.model, **entry.given, "output_dir": str(packed)})
    checkpoint.write_json(packed.with_suffix(".json"), report)
    packed.with_suffix(".log").touch()
    assert job.run()["failed"] == 0


def half_done(place):
    """A quantization of which one of two blocks is done."""
    layers = packed_modules(load.model(str(place / "gptq")))
    name, layer = next(iter(layers.items()))
    tensors = {f"{name}.{field}": tensor for field, tensor in layer.packed.tensors().items()}
    factors = {name: (torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4))}
    assembly.Assembly(place / "half", "run", 2).save(
        tensors, [packed_row(name, layer.packed) | {"bits": 2}], factors, 1.0
    )


def imported(place, dense):
    """Checkpoints of other tools: GPTQ and GGUF as lrec writes them, AWQ and HQQ of random codes."""
    run("quantize", model=dense, method="rtn", bits=4, group_size=32, init_rank=0, output_dir=place / "rtn")
    for kind in ("gptq", "compressed-tensors", "gguf"):
        run("export", model=place / "rtn", format=kind, output_dir=place / f"from-{kind}")
    for kind, layer in {"awq": awq_layer, "hqq": hqq_layer}.items():
        shutil.copytree(place / "M", place / f"from-{kind}")
        path = place / f"from-{kind}" / "model.safetensors"
        tensors = load_file(path)
        for key in [key for key in tensors if "_proj" in key]:
            N, K = tensors.pop(key).shape
            tensors |= {key.replace("weight", field): tensor for field, tensor in layer(N, K).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        config = json.loads((path.parent / "config.json").read_text())
        config["quantization_config"] = {"quant_method": kind, "bits": 4, "version": "gemm"}
        (path.parent / "config.json").write_text(json.dumps(config))


def awq_layer(N, K):
    fields = {"qweight": (K, N // 8), "qzeros": (K // 32, N // 8)}
    tensors = {name: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32) for name, shape in fields.items()}
    return tensors | {"scales": torch.rand(K // 32, N).half()}


def hqq_layer(N, K):
    rows = N * K // 32
    sizes = {"shape": torch.tensor([N, K]), "group_size": torch.tensor(32), "axis": torch.tensor(1)}
    grid = {"scale": torch.rand(rows, 1).half(), "zero": torch.rand(rows, 1).half()}
    packing = torch.tensor(list(b"4bit_u8"), dtype=torch.uint8)
    return {"W_q": torch.randint(0, 256, (rows // 2, 32)).to(torch.uint8), "packing": packing, **sizes, **grid}


def streamed(folder):
    model = StreamedModel(folder, torch.float32)
    for index in range(len(model)):
        model.load(index)
        model.free(index)


def forward(folder):
    run_model(load.model(str(folder), None, "cpu", "float32"))


@torch.no_grad()
def run_model(model):
    model(IDS)


def packed(folder):
    Inspect(model=str(folder)).run()
    forward(folder)


@functools.cache
def windows(place):
    return options.fill(corpus(place), runs.Text)[0].input_ids(load.tokenizer(str(place / "M")), 0)


def cached(folder):
    teacher, ids = CachedTeacher(TargetCache(folder)), windows(folder.parent)
    teacher.check(Objective(), ids.tolist())
    teacher.targets({"input_ids": ids})


def loosely_cached(folder):
    """As `cached`, but what the manifest says of the files follows them, as a forger would have it."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    for name in manifest["files"]:
        if (folder / name).is_file() and not (folder / name).is_symlink():
            manifest["files"][name] = checkpoint.file_entry(folder / name)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    cached(folder)


@functools.cache
def whole_base(folder):
    return load.model(str(folder), None, "cpu", "float32")


def adapted(folder):
    base = whole_base(folder.parent / "gptq")  # which is not what is damaged
    run_model(load.with_adapter(copy.deepcopy(base), str(folder)))
    files = LoraFiles(folder, checkpoint.packed_sha256(base))
    for name, layer in packed_modules(base).items():
        files.packed(name, layer.packed)
        files.delta(name)
    files.check_used(folder)


def half(folder):
    found = assembly.Assembly(folder, "run", 2)
    for index in range(found.num_done):
        found.packed(index)
        found.factors(index)
    assert isinstance(found.all_rows, list) and isinstance(found.sweep, list)


def resumed(folder):
    whole = checkpoints.whole_checkpoints(folder.parent)
    if whole:
        checkpoints.check_checkpoint(whole[-1])


def compared(folder):
    job, entries = the_comparison(folder), {METHOD: compare.read_entry(METHOD, 0)}
    path = folder / compare.RESULTS
    # A row that is not found sound is measured again; measuring is not what reads the file.
    rows = {label: {"method": label} for label in (compare.FULL, *entries)} | job.finished(path, entries)
    figures = json.dumps([[row.get(name) for name in compare.COLUMNS] for row in rows.values()])
    if figures not in DRAWN:  # a picture takes ten times what reading does
        job.table(entries, rows, path)
        DRAWN.add(figures)


DRAWN: set[str] = set()


def taken_over(folder):
    output = folder.parent / f"{folder.name}-taken"
    shutil.rmtree(output, ignore_errors=True)
    runs.Import(model=str(folder), output_dir=str(output)).run()


def tokenized(folder):
    load.tokenizer(str(folder))("the quick brown fox")


# What is damaged, and what reads it.
KINDS = {
    "dense weights": ("M", "model.safetensors", streamed),
    "dense shard": ("sharded", "model-00001-of-*.safetensors", streamed),
    "index": ("sharded", "model.safetensors.index.json", streamed),
    "dense config": ("M", "config.json", forward),
    "tokenizer": ("M", "tokenizer.json", tokenized),
    "tokenizer config": ("M", "tokenizer_config.json", tokenized),
    "generation config": ("M", "generation_config.json", forward),
    "manifest": ("gptq", checkpoint.MANIFEST, packed),
    "shard with manifest": ("gptq", "model-00001-of-*.safetensors", packed),
    "packed config": ("bare-gptq", "config.json", packed),
    "uniform weights": ("bare-gptq", "model-00001-of-*.safetensors", packed),
    "outlier weights": ("bare-icquant", "model-00001-of-*.safetensors", packed),
    "codebook weights": ("bare-nf4", "model-00001-of-*.safetensors", packed),
    "salient weights": ("bare-ptq161", "model-00001-of-*.safetensors", packed),
    "factors": ("gptq", assembly.LOWRANK, lambda folder: lowrank.load(folder / assembly.LOWRANK)),
    "stamp": ("A", checkpoint.ADAPTER_STAMP, adapted),
    "adapter config": ("A", "adapter_config.json", adapted),
    "adapter weights": ("A", checkpoint.ADAPTER_WEIGHTS, adapted),
    "trained tensors": ("A", checkpoint.BASE_TENSORS, adapted),
    "cache manifest": ("hidden", checkpoint.MANIFEST, cached),
    "cache head": ("loose-hidden", "head.safetensors", loosely_cached),
    "hidden targets": ("loose-hidden", "targets-00001.safetensors", loosely_cached),
    "topk targets": ("loose-topk", "targets-00001.safetensors", loosely_cached),
    "progress": ("half", assembly.PROGRESS, half),
    "half-done shard": ("half", "model-00001-of-*.safetensors", half),
    "half-done factors": ("half", "lowrank-00001.safetensors", half),
    "training state": ("A/checkpoint-2", "trainer_state.json", resumed),
    "comparison": ("C", compare.RESULTS, compared),
    "record": ("gptq", record.FILE, lambda folder: record.rows(folder)),
    "GPTQ weights": ("from-gptq", "model-00001-of-*.safetensors", taken_over),
    "GPTQ config": ("from-gptq", "config.json", taken_over),
    "compressed-tensors weights": ("from-compressed-tensors", "model-00001-of-*.safetensors", taken_over),
    "AWQ weights": ("from-awq", "model.safetensors", taken_over),
    "HQQ weights": ("from-hqq", "model.safetensors", taken_over),
    "GGUF file": ("from-gguf", "model.gguf", taken_over),
    "settings": ("settings", "run.yaml", lambda folder: options.read_yaml(str(folder / "run.yaml"))),
    "rows": ("settings", "rows.jsonl", lambda folder: text.documents(str(folder / "rows.jsonl"))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_soundly(place, kind):
    load.quiet()
    folder, pattern, read = KINDS[kind]
    (path,) = (place / folder).glob(pattern)
    read(place / folder)
    before = sum(os.times()[2:4])  # of processes that have ended
    faults = survey(place / folder, path.name, read, COUNT, may_link=folder == "settings")
    seconds = sum(os.times()[2:4]) - before
    about = f"{kind}: {len(faults)} faults in mutations 0 to {COUNT - 1}, {1000 * seconds / COUNT:.0f} ms of CPU each"
    told = "\n".join([about, *faults])
    print(f"\n{told}", flush=True)
    assert not faults, told[:10_000]
