"""Predicted memory: the rehearsal counts what autograd really keeps, the weights are the model's own, and the verb
answers in cards and flags."""

import dataclasses
import json

import pytest
import torch
from checks import tiny_llama, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lrec import anatomy, embeddings, memory, options, rehearsal, shapes
from lrec.bench.shape import ShapeStep
from lrec.blocks import PassSettings
from lrec.cli import main
from lrec.correction import Train
from lrec.ends import keep_stored
from lrec.estimate import Estimate, size_of
from lrec.rehearsal import LiveBytes, rehearse
from lrec.stream import record_calls
from lrec.trainer import LrecConfig


def test_live_bytes_are_those_of_storages_from_birth_to_death():
    with FakeTensorMode():
        w, x = torch.empty(8, 8, requires_grad=True), torch.empty(4, 8)
        with LiveBytes([w, x]) as found:
            y = x @ w.t()  # 128 bytes, and a view of w that is none
            assert found.live == found.peak == 128
            z = functional.silu(y)  # keeps y
            del y
            assert found.live == 256
            z.backward(torch.ones_like(z))
            # The gradient of z is freed; w's, of 256 bytes, and z stay.
            assert found.live == 128 + 256 and found.peak >= found.live
            del z
            assert found.live == 256
        w.grad = None
        assert found.live == 0


def test_the_parts_of_the_weights_are_those_of_the_filled_model():
    config = shapes.config_of("smollm2-135m", 2)
    for bits, group_size in ((2, 128), (3, 64)):
        setup = memory.Setup(bits=bits, group_size=group_size, lora_r=8, max_length=32)
        parts = memory.training(config, setup).parts
        model = shapes.packed_model(
            keep_stored(shapes.skeleton(config, torch.float32), torch.bfloat16), bits, group_size
        )
        packed = [b for n, b in model.named_buffers() if n.rpartition(".")[2] in ("qweight", "scale", "zero")]
        assert parts["packed weights"] == sum(b.numel() * b.element_size() for b in packed)
        assert parts["embeddings"] == 49152 * 576 * 2 and "head" not in parts, "tied"
        assert parts["norms"] == 4 * 576 * 5
        per_rank = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
        assert parts["adapters"] == 2 * 8 * per_rank * 4 and parts["optimizer"] == 2 * parts["adapters"]


def test_what_a_block_keeps_follows_from_checkpointing_and_length():
    config = shapes.config_of("smollm2-135m", 3)
    width = 576 * 4

    def kept(**changes):
        setup = memory.Setup(**({"max_length": 64} | changes))
        return rehearse(memory.adapted_skeleton(config, setup), setup.batch_size, setup.max_length)

    checkpointed, longer, without = kept(), kept(max_length=128), kept(checkpointing="none")
    assert len(checkpointed) == 3
    # Its output, and the state of the random generator.
    assert 64 * width <= checkpointed[0].kept <= 64 * width + 6000
    # All but the adapters' gradients grows with the tokens.
    own = 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)) * 4
    assert longer[0].backward - own == pytest.approx(2 * (checkpointed[0].backward - own), rel=0.1)
    # Inputs of seven linears, their outputs that silu and attention need, and more: above ten widths a token.
    assert without[0].kept > 10 * 64 * width
    assert without[0].backward < checkpointed[0].backward


def test_a_bfloat16_end_gives_the_same_bits_as_a_widened_one():
    model = tiny_llama().requires_grad_(False)
    ids = torch.arange(24).reshape(2, 12)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.weight.data = end.weight.bfloat16().float()
    with torch.no_grad():
        expected = model(ids).logits
        stored = keep_stored(model, torch.bfloat16)
        assert stored.get_output_embeddings().weight.dtype == torch.bfloat16
        torch.testing.assert_close(stored(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_estimate_answers_for_a_config_and_says_what_would_fit(tmp_path, capsys):
    tiny_model(tmp_path / "M")
    words = ["estimate", "--model", str(tmp_path / "M" / "config.json"), "--group_size", "32"]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(card["fits"] for card in told["cards"])
    assert told["train_peak_bytes"] == sum(row["bytes"] for row in told["parts"] if row["run"] == "train")
    assert main(["estimate", "--model", "llama-70b", "--num_layers", "20", "--gpu", "4GB"]) == 3
    assert "fits with --stream_weights" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["6parsec", "-6GB", "0GB", "", "GB", "1e9TB", "100MB", "20000GB", "nan"])
def test_a_size_that_makes_no_sense_is_exit_2(size, capsys):
    assert main(["estimate", "--model", "llama-7b", f"--gpu={size}"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_sizes_are_read_in_their_units():
    assert size_of("6GB") == size_of("6") == 6 * 10**9
    assert size_of("6 GiB") == 6 * 2**30 and size_of("512mb") == 512 * 10**6 and size_of("1.5g") == 15 * 10**8


def test_an_unknown_shape_names_the_known_ones(capsys):
    assert main(["estimate", "--model", "llama-7c"]) == 2
    assert "llama-70b" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_ends_are_counted_as_they_are_stored(tied, bits):
    config = tiny_llama(tie_word_embeddings=tied, vocab_size=250).config
    setup = memory.Setup(bits=2, group_size=32, lora_r=4, max_length=32, quantize_embeddings=bits)
    parts = memory.training(config, setup).parts
    model = tiny_llama(tie_word_embeddings=tied, vocab_size=250)
    found = embeddings.pack(model, bits)
    assert parts["embeddings"] == found["model.embed_tokens"][0].nbytes < 250 * 64 * 2
    assert parts.get("head") == (None if tied else found["lm_head"][0].nbytes)


def test_dtype_and_optimizer_of_the_adapters_decide_what_stands_and_what_piles_up():
    config = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=3).config

    def predicted(**changes):
        # One token of logits: the fullest moment is then where the gradients are.
        setup = memory.Setup(group_size=32, lora_r=32, max_length=8, loss_chunk_tokens=1, **changes)
        return memory.training(config, setup)

    number = 3 * 32 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
    plain = predicted()
    assert plain.parts["adapters"] == 4 * number and plain.parts["optimizer"] == 8 * number
    narrow = predicted(lora_dtype=torch.bfloat16)
    # States of a float32 step: they do not shrink with the adapters.
    assert narrow.parts["adapters"] == 2 * number and narrow.parts["optimizer"] == 8 * number
    eight = predicted(optimizer="adamw_8bit").parts["optimizer"]
    # No matrix here is too small for 8 bits; a float32 scale for each 256 of both states.
    assert eight == 2 * number + 2 * 4 * number // 256
    assert plain.parts["gradients"] + plain.parts.get("freed gradients", 0) >= 4 * number
    # Fused, one gradient is alive at a time: nearly all of them are saved.
    fused = predicted(fused_backward=True)
    assert "gradients" not in fused.parts and plain.peak_bytes - fused.peak_bytes > 0.5 * 4 * number


def test_split_blocks_keep_one_more_tensor_and_need_half_as_much():
    config = shapes.config_of("smollm2-135m", 2)
    block, split = (
        rehearse(memory.adapted_skeleton(config, memory.Setup(checkpointing=parts)), 1, 512)[0]
        for parts in ("block", "split")
    )
    assert split.kept - block.kept == pytest.approx(512 * 576 * 4, abs=6000)
    assert split.backward < 0.85 * block.backward


def test_offloaded_checkpoints_and_embeddings_leave_the_gpu():
    config = shapes.config_of("llama-7b", 4)
    base = memory.Setup(device="cuda", dtype=torch.bfloat16, max_length=2048)
    plain = memory.training(config, base).parts
    away = memory.training(config, dataclasses.replace(base, embeddings="cpu", offload_checkpoints=True)).parts
    assert plain["embeddings"] == 32000 * 4096 * 2 and "embeddings" not in away
    assert away.get("checkpoints", 0) < plain["checkpoints"] + 2048 * 4096 * 2
    assert memory.training(config, dataclasses.replace(base, device="cpu", embeddings="cpu")).parts["embeddings"]


def test_advice_is_spelled_in_flags_of_lrec_train(tmp_path):
    estimate = Estimate(model="llama-7b", lora_r=64, batch_size=2, checkpointing="none")
    flags = [flag for flag, _ in estimate.changes(estimate.setup())]
    assert len(flags) == 13
    for flag in flags:
        words = flag.removesuffix(" of lrec quantize").split()
        values = options.settings(words)
        if flag.endswith("of lrec quantize"):
            options.fill(values, PassSettings)
        else:
            needed = {"model": "m", "output_dir": str(tmp_path), "dataset": "d", "use_cpu": True, "max_steps": 1}
            options.fill(needed | values, Train, LrecConfig)


@pytest.mark.parametrize("parts", ["none", "block", "split"])
def test_a_rehearsed_block_keeps_what_a_real_one_keeps(parts):
    config = shapes.config_of("smollm2-135m", 2)
    fake = rehearse(memory.adapted_skeleton(config, memory.Setup(checkpointing=parts)), 1, 48)[0]
    step = ShapeStep(shape="smollm2-135m", checkpointing=parts, device="cpu")
    base = shapes.packed_model(keep_stored(shapes.skeleton(config, torch.float32), torch.bfloat16), 2, 128)
    model = step.adapted(base)
    blocks = anatomy.find_blocks(model).modules
    hidden, calls = record_calls(model, blocks, torch.ones(1, 48, dtype=torch.int64))
    assert rehearsal._block(blocks[0], calls[0], hidden) == fake
