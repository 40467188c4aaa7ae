"""Training a LoRA on a packed model against its full-precision teacher, through trl's whole loop, on a tiny Llama."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, TrainerCallback

from lrec import trained
from lrec.formats.uniform import Uniform
from lrec.nn import PackedLinear
from lrec.teacher import check_tokenizers, final_hidden
from lrec.trainer import LrecConfig, LrecTrainer
from tests.checks import assert_close, tiny_llama

VOCAB, LENGTH = 256, 24


def tokenizer(size=VOCAB):
    vocab = {f"w{i}": i for i in range(size - 3)} | {"[PAD]": size - 3, "</s>": size - 2, "[UNK]": size - 1}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]")


def teacher_model(**changes):
    model = tiny_llama(initializer_range=0.2, pad_token_id=VOCAB - 3, eos_token_id=VOCAB - 2, **changes)
    return model


def packed_model(model, bits=2, group_size=32):
    """A copy whose blocks' linears are rounded to the nearest code and packed."""
    model = copy.deepcopy(model)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            w = linear.weight.detach().unflatten(1, (-1, group_size))
            low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
            scale = (high - low) / (2**bits - 1)
            zero = -low / scale
            codes = (w / scale + zero).round().clamp(0, 2**bits - 1).int().flatten(1)
            packed = Uniform.pack(codes, scale[..., 0], zero[..., 0], bits, group_size)
            model.model.layers.set_submodule(name, PackedLinear(packed))
    return model


def windows(count=16, length=LENGTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(0, VOCAB - 3, (count, length), generator=g).tolist()})


def trainer(tmp_path, data=None, teacher=None, **settings):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-2, "max_length": 64,
    }  # fmt: skip
    fp = teacher_model()
    torch.manual_seed(0)
    model = get_peft_model(packed_model(fp), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = LrecConfig(str(tmp_path / "out"), **(defaults | settings))
    return LrecTrainer(
        model=model, args=config, teacher=teacher or fp, train_dataset=data or windows(), processing_class=tokenizer()
    )


def kl_log(run):
    return [row["kl"] for row in run.state.log_history if "kl" in row]


def adapters(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def test_the_kl_falls_and_only_adapters_learn(tmp_path):
    run = trainer(tmp_path, max_steps=20)
    before = {n: t.clone() for n, t in run.model.state_dict().items() if "lora" not in n}
    result = run.train()
    kl = kl_log(run)
    assert len(kl) == 20 and sum(kl[-4:]) < 0.7 * sum(kl[:4]), kl
    assert abs(result.training_loss - sum(kl) / len(kl)) < 1e-5 * result.training_loss
    assert all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items() if "lora" not in n)
    assert all("lora" in n for n, p in run.model.named_parameters() if p.requires_grad or p.grad is not None)
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.model.parameters())


def step_gradients(run):
    """The gradients of the first optimizer step, before they are clipped or applied."""
    found = {}

    def keep(*args, **kwargs):
        found.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
        raise KeyboardInterrupt

    run.optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    run.optimizer.register_step_pre_hook(keep)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return found


def ragged():
    """Rows of very different lengths, so that a mean of micro-batch means would be wrong."""
    g = torch.Generator().manual_seed(1)
    lengths = (5, 24, 9, 17, 21, 4, 12, 24)
    return Dataset.from_dict({"input_ids": [torch.randint(0, 200, (n,), generator=g).tolist() for n in lengths]})


def test_accumulating_two_batches_of_two_is_a_batch_of_four(tmp_path):
    settings = {"max_steps": 1, "max_grad_norm": 0.0}
    one = trainer(tmp_path, ragged(), **settings)
    two = trainer(tmp_path, ragged(), per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    expected, actual = stirred_gradients(one), stirred_gradients(two)
    assert expected.keys() == actual.keys() == adapters(one).keys()
    for name in expected:
        assert_close(actual[name], expected[name], 1e-5, name)


def stirred_gradients(run):
    """`step_gradients` with a B that is not zero, so that A has gradients too."""
    for p in adapters(run):
        if "lora_B" in p:
            torch.nn.init.normal_(run.model.get_parameter(p), std=0.1, generator=torch.Generator().manual_seed(3))
    return step_gradients(run)


def test_scales_and_zeros_accumulate_too_and_have_rates_of_their_own(tmp_path):
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "scales_learning_rate": 0.01, "weight_decay": 0.1}
    one = trainer(tmp_path, ragged(), **settings)
    two = trainer(tmp_path, ragged(), per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    for run in (one, two):
        trained.start(run.model, trained.ALL)
    groups = one.create_optimizer().param_groups
    one.optimizer = None
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(adapters(one)) == 14 * 4
    for group in groups:
        for p in group["params"]:
            own = not any(p is q for n, q in one.model.named_parameters() if "lora" in n)
            expected = 0.01 * p.detach().square().mean().sqrt().item() if own else one.args.learning_rate
            assert abs(group["lr"] - expected) < 1e-6 * expected and group["weight_decay"] == (0 if own else 0.1)
    expected, actual = stirred_gradients(one), stirred_gradients(two)
    assert expected.keys() == actual.keys() == adapters(one).keys()
    for name in expected:
        assert_close(actual[name], expected[name], 1e-5, name)


def test_the_loss_is_the_mean_kl_of_target_tokens(tmp_path):
    run = trainer(tmp_path, ragged(), max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        loss = run.compute_loss(run.model, dict(batch))
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        q, p = (m(**inputs).logits[:, :-1].double().log_softmax(-1) for m in (run.model, run.teacher.model))
    kl = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)[batch["labels"][:, 1:] != -100]
    assert_close(loss, kl.mean(), 1e-5)


def test_cross_entropy_joins_with_its_weight(tmp_path):
    data = windows(4)
    run = trainer(tmp_path, data, max_steps=1, ce_weight=0.25)
    run.train()
    (row,) = [row for row in run.state.log_history if "kl" in row]
    assert abs(row["loss"] - (row["kl"] + 0.25 * row["ce"])) < 1e-4 * row["loss"]
    alone = trainer(tmp_path, data, max_steps=1, kl_weight=0.0, ce_weight=1.0)
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        expected = alone.model(input_ids=ids, labels=ids).loss
    alone.train()
    (row,) = [row for row in alone.state.log_history if "ce" in row]
    assert "kl" not in row and abs(row["loss"] - expected.item()) < 1e-4 * row["loss"]


def test_the_pull_on_hidden_states_fades_linearly(tmp_path):
    settings = {"max_steps": 4, "hidden_weight": 0.5, "hidden_anneal": True, "learning_rate": 1e-9}
    run = trainer(tmp_path, windows(4), **settings)
    run.train()
    rows = [row for row in run.state.log_history if "hidden" in row]
    shares = [(row["loss"] - row["kl"]) / row["hidden"] / 0.5 for row in rows]
    assert all(abs(share - left) < 1e-2 for share, left in zip(shares, (1.0, 0.75, 0.5, 0.25), strict=True)), shares
    assert abs(run.evaluate(windows(4))["eval_loss"] - run.evaluate(windows(4))["eval_kl"]) < 1e-6
    with pytest.raises(ValueError, match="leaves no loss at the end"):
        trainer(tmp_path, kl_weight=0.0, hidden_weight=0.5, hidden_anneal=True)


def test_two_runs_with_one_seed_are_bitwise_equal(tmp_path):
    runs = [trainer(tmp_path, max_steps=5) for _ in range(2)]
    for run in runs:
        run.train()
    assert kl_log(runs[0]) == kl_log(runs[1])
    first, second = map(adapters, runs)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_resumed_run_is_the_straight_run(tmp_path):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    straight = trainer(tmp_path, **settings)
    straight.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert kl_log(straight) == kl_log(resumed) and resumed.state.global_step == 10
    first, second = adapters(straight), adapters(resumed)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_neither_model_ever_makes_the_logits_of_a_batch(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    rows = []
    for model in (run.model, run.teacher.model):
        model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[:-1].numel()))
    run.train()
    assert rows == [4, 4], "one row of logits for each of the 4 sequences, from the teacher and from the student"


def test_checkpointing_runs_each_block_twice_and_changes_no_gradient(tmp_path):
    gradients, counts = [], []
    for checkpointing in (True, False):
        run = trainer(tmp_path, max_steps=1, gradient_checkpointing=checkpointing, max_grad_norm=0.0)
        counts.append(0)

        def count(module, args):
            counts[-1] += 1

        run.model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(count)
        gradients.append(step_gradients(run))
    assert counts == [2, 1]
    for name, expected in gradients[1].items():
        assert_close(gradients[0][name], expected, 1e-6, name)


def test_a_nan_stops_the_run_and_names_step_and_module(tmp_path):
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                run.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.scale[3, 0] = (
                    torch.nan
                )

    run.add_callback(Poison())
    with pytest.raises(ValueError, match=r"step 4: .* that of .*layers\.1\.mlp\.up_proj\.base_layer in the model"):
        run.train()
    saved = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == ["checkpoint-2"]
    assert json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["global_step"] == 2


def test_a_nan_in_the_teacher_is_told_apart(tmp_path):
    run = trainer(tmp_path)
    run.teacher.model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"step 1: .*layers\.0\.self_attn\.o_proj in the teacher"):
        run.train()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    parameter = next(p for p in run.model.parameters() if p.requires_grad)
    before = parameter.detach().clone()
    parameter.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(ValueError, match="gradient is not finite at step 1"):
        run.train()
    assert torch.equal(parameter, before)


def test_text_is_packed_and_documents_do_not_see_each_other(tmp_path):
    documents = [" ".join(f"w{(7 * i + j) % 200}" for j in range(4 + i)) for i in range(8)]
    data = Dataset.from_dict({"text": documents})
    run = trainer(tmp_path, data, packing=True, max_length=40, max_steps=1, per_device_train_batch_size=2)
    batch = next(iter(run.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert batch["input_ids"].shape[0] == 1 and len(starts) > 3, "rows of several documents, flattened"
    pieces = torch.tensor_split(batch["input_ids"][0], starts[1:])
    with torch.no_grad():
        alone = torch.cat([final_hidden(run.teacher.model, piece[None])[0] for piece in pieces])
    assert_close(run.teacher.targets(dict(batch)).hidden, alone, 1e-5)
    run.train()
    assert len(kl_log(run)) == 1


def test_evaluation_gives_the_kl_and_no_logits(tmp_path):
    run = trainer(tmp_path)
    run.eval_dataset = None
    rows = []
    run.model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[:-1].numel()))
    found = run.evaluate(windows(8, seed=5))
    assert abs(found["eval_loss"] - found["eval_kl"]) < 1e-5 * found["eval_kl"] and found["eval_kl"] > 0
    assert rows == [8]


def test_peft_config_wraps_a_bare_packed_model(tmp_path):
    fp = teacher_model()
    config = LrecConfig(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    common = {"args": config, "train_dataset": windows(), "processing_class": tokenizer()}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    run = LrecTrainer(model=packed_model(fp), teacher=fp, peft_config=lora, **common)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_what_does_not_fit_is_refused(tmp_path):
    fp = teacher_model()
    config = LrecConfig(str(tmp_path), use_cpu=True)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {"args": config, "train_dataset": windows(), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match="needs teacher="):
        LrecTrainer(model=packed_model(fp), peft_config=lora, **common)
    with pytest.raises(ValueError, match="head is trainable"):
        LrecTrainer(model=packed_model(fp), teacher=fp, **common)
    with pytest.raises(ValueError, match="the teacher has 300 logits and the model 256"):
        LrecTrainer(model=packed_model(fp), teacher=teacher_model(vocab_size=300), peft_config=lora, **common)
    with pytest.raises(ValueError, match="nothing is trainable"):
        LrecTrainer(model=packed_model(fp).requires_grad_(False), teacher=fp, **common)
    with pytest.raises(ValueError, match="forward_kl"):
        LrecConfig(str(tmp_path), divergence="forward-kl", use_cpu=True)


def test_tokenizers_must_agree():
    check_tokenizers(tokenizer(), tokenizer())
    with pytest.raises(ValueError, match="256 tokens and the student's 257"):
        check_tokenizers(tokenizer(), tokenizer(257))
    other = tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="other ids from token"):
        check_tokenizers(tokenizer(), other)


def test_defaults_suit_packed_models(tmp_path):
    config = LrecConfig(str(tmp_path), use_cpu=True)
    assert config.ddp_broadcast_buffers is False and config.report_to == [] and config.max_grad_norm == 1.0
    assert config.gradient_checkpointing and config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not config.bf16 and config.lr_scheduler_type == "cosine"
