"""`lrec train --objective sft`: the loss of completions, packing, a task on top of a correction, and both together."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from test_exports import export, packed_model
from torch.nn import functional

import lrec
from lrec import checkpoint, cli, conversations, evaluate, load
from lrec.finetune import Finetune, FinetuneConfig
from lrec.lora_files import LoraFiles
from lrec.losses import IGNORE
from lrec.trainer import LrecTrainer
from tests.checks import assert_close

ROWS = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}, of course" * (1 + i % 3)} for i in range(12)]
QUIET = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def place(dense, tmp_path_factory):
    """A packed model `Q` of 2 bits, an adapter `A` that changes q and down_proj much, and rows of a task."""
    place = tmp_path_factory.mktemp("sft")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "Q").symlink_to(packed_model(dense, "--bits", "2", "--group_size", "32"))
    base = load.model(str(place / "Q"))
    adapted = lrec_lora(base, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    stir(adapted, "default")
    adapted.save_pretrained(place / "A")
    stamp = {"packed_sha256": checkpoint.packed_sha256(base)}
    checkpoint.write_json(place / "A" / checkpoint.ADAPTER_STAMP, stamp)
    return place


def lrec_lora(base, **settings):
    from peft import get_peft_model

    torch.manual_seed(0)  # for A: what ran before must not choose it
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def stir(model, name, std=0.05):
    """Gives the adapter a B that is not zero."""
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}" in key:
            torch.nn.init.normal_(parameter.data, std=std)


def run(place, directory, **changes):
    given = {"model": str(place / "Q"), "dataset": str(place / "rows.jsonl"), "output_dir": str(directory)}
    settings = {k: v for k, v in changes.items() if k in Finetune.__dataclass_fields__}
    rest = {k: v for k, v in changes.items() if k not in settings}
    config = FinetuneConfig(str(directory), **{"max_steps": 3, "per_device_train_batch_size": 4, **QUIET, **rest})
    return Finetune(**{**given, "lora_r": 4, **settings}).run(config)


def trainer_of(place, directory, model, **settings):
    tokenizer = load.tokenizer(str(place / "Q"))
    ids, labels = conversations.tokenize(ROWS, tokenizer)
    config = FinetuneConfig(str(directory), **{"max_steps": 1, **QUIET, "max_length": 128, **settings})
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    return LrecTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer), ids, labels


def brute_force(model, ids, labels):
    """The mean of -log q over learned tokens in float64, each row by itself, all logits made."""
    total, count = 0.0, 0
    for row, told in zip(ids, labels, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1].double()
        nll = functional.cross_entropy(logits, torch.tensor(told[1:]), ignore_index=IGNORE, reduction="none")
        total, count = total + nll.sum(), count + sum(label != IGNORE for label in told[1:])
    return total / count


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_each_row_alone(place, tmp_path, packing):
    model = load.model(str(place / "Q"), str(place / "A"))
    load.activate(model, ["default"], learning="default")
    run, ids, labels = trainer_of(place, tmp_path, model, packing=packing, per_device_train_batch_size=12)
    batches = list(run.get_train_dataloader())
    learned = sum(label != IGNORE for row in labels for label in row[1:])
    assert learned < 0.8 * sum(len(row) - 1 for row in labels), "the prompts are no part of it"
    with torch.no_grad():
        loss = sum(run.compute_loss(model, dict(batch), num_items_in_batch=learned) for batch in batches)
    if packing:
        assert len(batches) == 1 and (batches[0]["position_ids"] == 0).sum() == len(ids)
    expected = brute_force(model, ids, labels)
    assert_close(loss.double(), expected, 1e-6)
    assert evaluate.rows_quality(model, ids, labels)["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_a_packed_row_gets_no_gradient_from_its_neighbours(place, tmp_path):
    model = load.model(str(place / "Q"), str(place / "A"))
    load.activate(model, ["default"], learning="default")
    run, ids, _ = trainer_of(place, tmp_path, model, packing=True, per_device_train_batch_size=12)
    (batch,) = run.get_train_dataloader()
    seen = []

    def keep(module, args, out):
        out.requires_grad_().retain_grad()
        seen.append(out)

    model.get_input_embeddings().register_forward_hook(keep)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    labels = batch["labels"].clone()
    labels[:, : starts[3]] = labels[:, starts[4] :] = IGNORE
    run.compute_loss(model, {**batch, "labels": labels}).backward()
    touched = seen[0].grad[0].abs().sum(1) > 0
    # The last token of a row predicts nothing.
    assert touched[starts[3] : starts[4] - 1].all() and touched.sum() == starts[4] - 1 - starts[3]


def test_task_on_top_of_a_correction(place, tmp_path):
    before = load.model(str(place / "Q"), str(place / "A"))
    report = run(place, tmp_path / "T", adapter=str(place / "A"), eval_dataset=str(place / "rows.jsonl"), lora_r=8)
    assert report["held_out_loss"] < report["held_out_loss_before"] and report["lora_init"] == "zero"
    for name in ("adapter_config.json", "adapter_model.safetensors", checkpoint.ADAPTER_STAMP):
        assert (tmp_path / "T/correction" / name).read_bytes() == (place / "A" / name).read_bytes()
    pair = load.model(str(place / "Q"), str(tmp_path / "T"))
    assert pair.active_adapters == ["correction", "default"]
    tokenizer = load.tokenizer(str(place / "Q"))
    ids, labels = conversations.tokenize(ROWS, tokenizer)
    assert evaluate.rows_quality(before, ids, labels)["loss"] == report["held_out_loss_before"]
    assert evaluate.rows_quality(pair, ids, labels)["loss"] == report["held_out_loss"], "what was measured is stored"
    base = lrec.nn.packed_modules(load.model(str(place / "Q")))
    by_peft = PeftModel.from_pretrained(load.model(str(place / "Q")), tmp_path / "T/correction", adapter_name="a")
    by_peft.load_adapter(tmp_path / "T", "b")
    by_peft.base_model.set_adapter(["a", "b"])
    x = torch.tensor([ids[0]])
    with torch.no_grad():
        assert torch.equal(by_peft.eval()(x).logits, pair(x).logits)
    assert base.keys() == lrec.nn.packed_modules(load.model(str(place / "Q"))).keys()


def test_a_task_without_its_correction_is_refused(place, tmp_path):
    run(place, tmp_path / "T", adapter=str(place / "A"), max_steps=1)
    base = load.model(str(place / "Q"))
    with pytest.raises(ValueError, match=r"on top of a correcting adapter .* not loaded: load that one first"):
        PeftModel.from_pretrained(base, tmp_path / "T")
    (tmp_path / "T/correction/adapter_config.json").unlink()
    with pytest.raises(ValueError, match="not loaded: load that one first"):
        LoraFiles(tmp_path / "T", checkpoint.packed_sha256(base))


@pytest.fixture(scope="module")
def pair(place, tmp_path_factory):
    """A task `T` on top of `A`, whose adapters have other ranks, factors and layers, with what its logits are."""
    directory = tmp_path_factory.mktemp("pair") / "T"
    run(place, directory, adapter=str(place / "A"), lora_r=3, lora_alpha=2, lora_target_modules="q_proj,gate_proj",
        learning_rate=1e-2, max_steps=2)  # fmt: skip
    return directory


@torch.no_grad()
def test_exports_hold_both(place, pair, tmp_path):
    x = torch.arange(3, 40)[None]
    expected = load.model(str(place / "Q"), str(pair))(x).logits
    alone = load.model(str(place / "Q"), str(pair / "correction"))(x).logits
    assert (expected - alone).norm() > 0.005 * alone.norm()
    words = ["--adapter", str(pair), "--check"]
    assert export(place / "Q", tmp_path / "J", "adapter", *words) == 0
    config = json.loads((tmp_path / "J/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 + 3
    assert set(config["target_modules"]) == {"q_proj", "down_proj", "gate_proj"}
    assert_close(PeftModel.from_pretrained(load.model(str(place / "Q")), tmp_path / "J")(x).logits, expected, 1e-6)
    assert export(place / "Q", tmp_path / "M", "merged", *words) == 0
    assert_close(load.model(str(tmp_path / "M"))(x).logits, expected, 2e-2)
    assert export(place / "Q", tmp_path / "C", "adapter", "--adapter", str(pair / "correction")) == 0
    assert_close(load.model(str(place / "Q"), str(tmp_path / "C"))(x).logits, alone, 0)


def test_two_plain_adapters_are_what_peft_composes(place, pair):
    from peft.tuners.lora.layer import Linear

    model = load.model(str(place / "Q"), str(pair))
    load.activate(model, model.active_adapters, learning="default")
    layer = next(m for m in model.modules() if isinstance(m, Linear) and {"correction", "default"} <= set(m.lora_A))
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    found = layer(x)
    expected = Linear.forward(layer, x)
    assert_close(found, expected, 1e-6)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected)), strict=True):
        assert_close(a, b, 1e-5)


def test_the_frozen_correction_keeps_no_activation(place, pair):
    model = load.model(str(place / "Q"), str(pair))
    kept = []
    for names in (["default"], ["correction", "default"]):
        load.activate(model, names, learning="default")
        (layer,) = [m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj")]
        weights = {p.data_ptr() for p in layer.parameters()} | {b.data_ptr() for b in layer.buffers()}
        sizes = {}

        def pack(t, weights=weights, sizes=sizes):
            if t.data_ptr() not in weights:
                sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(64, layer.in_features, requires_grad=True))
        kept.append(sum(sizes.values()))
    assert kept[0] == kept[1] == 64 * (64 + 3), "x and A x of the trained one"


def test_continuing_trains_the_correction_itself(place, pair, tmp_path):
    report = run(place, tmp_path / "T", adapter=str(place / "A"), stack="continue", max_steps=2, learning_rate=1e-2)
    assert report["continued_from"] == str(place / "A") and report["lora_r"] == 4
    assert not (tmp_path / "T/correction").exists()
    old, new = (LoraFiles(path, report["packed_sha256"]) for path in (place / "A", tmp_path / "T"))
    assert old.tensors.keys() == new.tensors.keys() and old.scaling == new.scaling == 2
    moved = [(new.tensors[k].float() - t.float()).abs().max() for k, t in old.tensors.items()]
    assert all(0 < change < 0.1 for change in moved)
    with pytest.raises(ValueError, match="itself on top of another: go on training it"):
        run(place, tmp_path / "U", adapter=str(pair), max_steps=1)
    report = run(place, tmp_path / "V", adapter=str(pair), stack="continue", max_steps=1)
    same = (tmp_path / "V/correction/adapter_model.safetensors").read_bytes()
    assert same == (place / "A/adapter_model.safetensors").read_bytes() and report["lora_r"] == 3


def test_a_resumed_stack_is_the_straight_run(place, tmp_path):
    settings = {"adapter": str(place / "A"), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = run(place, tmp_path / "S", **settings)
    run(place, tmp_path / "R", **settings)
    shutil.rmtree(tmp_path / "R/checkpoint-4")
    (tmp_path / "R/adapter_model.safetensors").unlink()
    resumed = run(place, tmp_path / "R", **settings, resume_from_checkpoint=True)
    assert [row["loss"] for row in straight["history"]][2:] == [row["loss"] for row in resumed["history"]][-2:]
    first, second = (
        path.read_bytes()
        for path in (tmp_path / "S/adapter_model.safetensors", tmp_path / "R/adapter_model.safetensors")
    )
    assert first == second


def test_the_command(place, tmp_path, capsys):
    words = [
        "train",
        "--objective",
        "sft",
        "--model",
        str(place / "Q"),
        "--dataset",
        str(place / "rows.jsonl"),
        "--json",
    ]
    small = ["--max_steps", "2", "--use_cpu", "true", "--lora_init", "zero", "--lora_r", "2", "--save_strategy", "no"]
    assert (
        cli.main([*words, *small, "--output_dir", str(tmp_path / "T"), "--packing", "true", "--max_length", "64"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["objective"] == "sft" and told["num_rows"] == 12 and told["num_target_tokens"] == 339
    assert all("kl" not in row and row["ce"] == row["loss"] for row in told["history"])
    words = [
        "evaluate",
        "--model",
        str(place / "Q"),
        "--adapter",
        str(tmp_path / "T"),
        "--rows",
        "--num_samples",
        "none",
    ]
    words += ["--dataset", str(place / "rows.jsonl"), "--teacher", str(place / "Q"), "--json"]
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_tokens"] == 339 and 0 < told["kl"] < 1 and told["loss"] > 0


def test_what_does_not_fit_is_refused(place, tmp_path):
    refused = {
        "to stay near a teacher give --teacher and --kl_weight": {"kl_weight": 0.5},
        "a teacher, with kl_weight = 0.0": {"teacher": str(place / "Q")},
        "a cache holds windows": {"teacher_cache": "C"},
        "corrects the model already": {"adapter": str(place / "A"), "lora_init": "closed_form"},
        "has anything to be learned in its first 5 tokens": {"max_length": 5},
        "must be that of a .jinja template": {"chat_template_path": "no/such"},
        "by an adapter, not by scales": {"train": "scales"},
        "keeps the best checkpoint by --eval_dataset": {"eval_steps": 1},
    }
    for told, changes in refused.items():
        with pytest.raises(ValueError, match=told):
            run(place, tmp_path / "T", **changes)


@torch.no_grad()
def test_pooled_adapters_stay_pooled_and_fold_exactly(dense, place, tmp_path):
    words = ["--bits", "3", "--group_size", "48", "--zero_point", "float"]
    place_of = {"model": str(packed_model(dense, *words)), "lora_pool": True, "lora_r": 4, "max_steps": 6}
    with torch.enable_grad():
        report = run(place, tmp_path / "T", **place_of, learning_rate=2e-2, eval_dataset=str(place / "rows.jsonl"))
    assert report["lora_init"] == "zero" and report["held_out_loss"] < report["held_out_loss_before"] - 0.01
    adapter = LoraFiles(tmp_path / "T", report["packed_sha256"])
    for key, tensor in adapter.tensors.items():
        if "lora_A" in key:
            groups = tensor.split(48, 1)
            assert all((part == part[:, :1]).all() for part in groups)
            assert all((a[:, 0] != b[:, 0]).all() for a, b in pairwise(groups))
    assert export(place_of["model"], tmp_path / "P", "packed", "--adapter", str(tmp_path / "T")) == 0
    x = torch.arange(3, 40)[None]
    expected = load.model(place_of["model"], str(tmp_path / "T"))(x).logits
    assert_close(load.model(str(tmp_path / "P"))(x).logits, expected, 1e-5)


def test_the_best_of_a_stack_is_kept_on_the_same_correction(place, tmp_path):
    # What is learned of the rows makes letters that are not in them less likely: the last evaluation is not the best.
    rows = [{"prompt": f"{i}", "completion": "XQZ~JKW" * 3} for i in range(4)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"adapter": str(place / "A"), "eval_dataset": str(tmp_path / "others.jsonl"), "eval_steps": 16}
    settings |= {"max_steps": 96, "patience": None, "learning_rate": 6e-2, "lr_scheduler_type": "constant"}
    report = run(place, tmp_path / "T", **settings)
    losses = [row["eval_loss"] for row in report["evaluations"]]
    assert len(losses) == 6 and min(losses) < losses[-1] - 0.005
    pair = load.model(str(place / "Q"), str(tmp_path / "T"))
    ids, labels = conversations.tokenize(rows, load.tokenizer(str(place / "Q")))
    assert evaluate.rows_quality(pair, ids, labels)["loss"] == report["held_out_loss"]
    assert report["held_out_loss"] == pytest.approx(min(losses), abs=3e-3)
    kept = LoraFiles(tmp_path / "T/correction", report["packed_sha256"])
    assert all(
        torch.equal(t, kept.tensors[k]) for k, t in LoraFiles(place / "A", report["packed_sha256"]).tensors.items()
    )


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_task_on_trained_scales_takes_them_along(place, tmp_path, with_adapter):
    from lrec import trained

    base = load.model(str(place / "Q"))
    trained.start(base, ("scales",))
    for parameter in base.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.05
    trained.settle(base)
    correction = tmp_path / "S"
    shutil.copytree(place / "A", correction) if with_adapter else correction.mkdir()
    trained.save(base, correction)
    stamp = {"packed_sha256": checkpoint.packed_sha256(base)}
    stamp["base_tensors_sha256"] = checkpoint.tensors_hash(trained.tensors(base))
    checkpoint.write_json(correction / checkpoint.ADAPTER_STAMP, stamp)
    ids, labels = conversations.tokenize(ROWS, load.tokenizer(str(place / "Q")))
    corrected = load.model(str(place / "Q"), str(correction))
    report = run(place, tmp_path / "T", adapter=str(correction), eval_dataset=str(place / "rows.jsonl"))
    assert evaluate.rows_quality(corrected, ids, labels)["loss"] == report["held_out_loss_before"]
    both = load.model(str(place / "Q"), str(tmp_path / "T"))
    assert evaluate.rows_quality(both, ids, labels)["loss"] == report["held_out_loss"]
    assert (tmp_path / "T/correction").exists() == with_adapter
    x = torch.tensor([ids[0]])
    assert export(place / "Q", tmp_path / "M", "merged", "--adapter", str(tmp_path / "T")) == 0
    with torch.no_grad():
        assert_close(load.model(str(tmp_path / "M"))(x).logits, both(x).logits, 2e-2)
        assert export(place / "Q", tmp_path / "J", "adapter", "--adapter", str(tmp_path / "T")) == 0
        assert_close(load.model(str(place / "Q"), str(tmp_path / "J"))(x).logits, both(x).logits, 1e-5)
