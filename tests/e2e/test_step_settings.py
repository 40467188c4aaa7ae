"""The settings of what a step keeps, through the whole trainer: the same training, or a refusal in words."""

import dataclasses

import pytest
import torch
from transformers import TrainerCallback

from lrec import options
from lrec.cpu_embeddings import OnCPU
from lrec.integrations.checkpointing import in_two_parts
from lrec.optimizers import OneByOne
from lrec.trainer import LrecConfig
from tests.checks import assert_close
from tests.e2e.test_trainer import adapters, kl_log, step_gradients, trainer

FUSED = {"fused_backward": True, "max_grad_norm": 0.0}


def narrow(run):
    """The run with its adapters in bfloat16."""
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return run


def test_splitting_blocks_changes_no_gradient(tmp_path):
    gradients, counts = [], []
    for parts in ("none", "block", "split"):
        run = trainer(tmp_path, max_steps=1, checkpointing=parts, max_grad_norm=0.0)
        counts.append(0)

        def count(module, args):
            counts[-1] += 1

        run.model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_pre_hook(count)
        gradients.append(step_gradients(run))
        blocks = run.model.get_base_model().model.layers
        functions = [getattr(block, "_gradient_checkpointing_func", None) for block in blocks]
        assert all((getattr(f, "func", None) is in_two_parts) == (parts == "split") for f in functions)
    assert counts == [1, 2, 2]
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, expected in gradients[0].items():
            assert_close(found[name], expected, 1e-6, name)


def test_a_fused_backward_trains_the_same_adapters_bit_for_bit(tmp_path):
    straight = trainer(tmp_path, max_steps=4, max_grad_norm=0.0)
    straight.train()
    fused = trainer(tmp_path, max_steps=4, **FUSED)
    seen = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(sum(p.grad is not None for p in model.parameters()))

    fused.add_callback(Gradients())
    fused.train()
    assert seen == [0] * 4 and isinstance(fused.optimizer.optimizer, OneByOne)
    first, second = adapters(straight), adapters(fused)
    assert all(torch.equal(first[n], second[n]) for n in first) and kl_log(straight) == kl_log(fused)
    assert not any("grad_norm" in row for row in fused.state.log_history)


def test_bfloat16_adapters_learn_and_stay_bfloat16(tmp_path):
    run = narrow(trainer(tmp_path, max_steps=12))
    run.train()
    kl = kl_log(run)
    assert sum(kl[-3:]) < 0.8 * sum(kl[:3]), kl
    assert {p.dtype for p in adapters(run).values()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{}, FUSED], ids=["stepped", "fused"])
def test_a_resumed_bfloat16_run_is_the_straight_run(tmp_path, settings):
    settings = settings | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = narrow(trainer(tmp_path, **settings))
    straight.train()
    resumed = narrow(trainer(tmp_path, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert kl_log(straight) == kl_log(resumed)
    first, second = adapters(straight), adapters(resumed)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_bitsandbytes_optimizers_serve_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    run = narrow(trainer(tmp_path, max_steps=8, optim="adamw_8bit", **FUSED))
    run.train()
    kl = kl_log(run)
    assert kl[-1] < 0.9 * kl[0], kl
    assert type(run.optimizer.optimizer.inner).__module__.startswith("bitsandbytes")


def test_a_gradient_that_is_not_finite_stops_a_fused_run(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, **FUSED)
    next(p for p in run.model.parameters() if p.requires_grad).register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(ValueError, match="gradient was not finite"):
        run.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_embeddings_in_cpu_memory_train_the_same_adapters(tmp_path):
    runs = [trainer(tmp_path, max_steps=3, embeddings=place) for place in ("device", "cpu")]
    for run in runs:
        run.train()
    assert isinstance(runs[1].model.get_input_embeddings(), OnCPU)
    first, second = map(adapters, runs)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpointing": "blocks"}, "checkpointing.*block"),
        ({"embeddings": "cuda"}, "embeddings"),
        ({"offload_checkpoints": True, "checkpointing": "none"}, "set checkpointing to block or split"),
        ({"activation_offloading": True, "checkpointing": "none"}, "would move the packed weights"),
        ({"checkpointing": "split", "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=False"),
        ({"fused_backward": True}, "set max_grad_norm to 0"),
        (FUSED | {"gradient_accumulation_steps": 2}, "set gradient_accumulation_steps to 1"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LrecConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_checkpoints": True}, "this is a CPU"),
        ({"optim": "paged_adamw_8bit"}, "this is a CPU: use adamw_8bit"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_the_checkpoints_setting_wins_and_stays_through_a_copy(tmp_path):
    config = LrecConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=False)
    assert not config.gradient_checkpointing and config.checkpointing == "auto"
    config = dataclasses.replace(config, checkpointing="split")
    assert config.gradient_checkpointing and config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    offloaded = dataclasses.replace(config, offload_checkpoints=True)
    assert offloaded.activation_checkpointing_kwargs == {"use_reentrant": False, "offload": True}
    config = dataclasses.replace(config, checkpointing="none")
    assert not config.gradient_checkpointing and not config.activation_checkpointing
    given = LrecConfig(str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs='{"every_n_layers": 2}')
    assert given.gradient_checkpointing_kwargs == {"use_reentrant": False, "every_n_layers": 2}


def test_no_tracker_may_be_asked_for_by_a_flag(tmp_path):
    flags = options.settings(["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true"])
    assert options.fill(flags, LrecConfig)[0].report_to == []
