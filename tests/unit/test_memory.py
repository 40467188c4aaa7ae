"""Predicted memory: the rehearsal counts what autograd really keeps, the weights are the model's own, and the verb
answers in cards and flags."""

import json

import pytest
import torch
from checks import tiny_llama, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lrec import memory, shapes
from lrec.cli import main
from lrec.ends import keep_stored
from lrec.estimate import size_of
from lrec.rehearsal import LiveBytes


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
        return memory.rehearsed(memory.adapted_skeleton(config, setup), setup)

    checkpointed, longer, without = kept(), kept(max_length=128), kept(gradient_checkpointing=False)
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
