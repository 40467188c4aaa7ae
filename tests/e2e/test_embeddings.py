"""Packed embeddings and heads, tied and not: one copy of a tied pair in memory and on disk, through every verb."""

import copy
import json
import shutil

import pytest
import torch
from checks import assert_close, tiny_llama, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import lrec
from lrec import embeddings
from lrec.blocks import Pass
from lrec.checkpoint import tokenizer_files
from lrec.cli import main
from lrec.head import Head, verify_head
from lrec.nn import PackedEmbedding, PackedLinear, TiedLinear
from lrec.stream import StreamedModel

IDS = torch.tensor([[3, 7, 7, 255, 0, 41, 100, 9], [200, 1, 2, 250, 7, 3, 90, 12]])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def settings(root):
    """How the blocks are quantized: with 8-bit scales and zeros, so that these go through every verb too."""
    grid = "--bits 4 --group_size 16 --zero_point float --scale_bits 8"
    return f"{grid} --dataset {root}/text.txt --num_samples 4 --max_length 32 --init_rank 4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Dense models D-<tied>, and Q-<tied>-<bits> packed from them with packed embeddings, by the command line."""
    root = tmp_path_factory.mktemp("embeddings")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    for tied in (True, False):
        # 300 rows are no multiple of 32; 48 columns are fewer than a group of 64.
        size = {"hidden_size": 48, "num_attention_heads": 4, "vocab_size": 300}
        tiny_model(root / f"D-{tied}", tie_word_embeddings=tied, **size)
        for bits in (8, 4):
            words = f"quantize --model {root}/D-{tied} --output_dir {root}/Q-{tied}-{bits} {settings(root)}"
            assert main([*words.split(), "--quantize_embeddings", str(bits)]) == 0
    return root


def stored(directory):
    """All tensors on disk by name."""
    return {k: t for path in sorted(directory.glob("*.safetensors")) for k, t in load_file(path).items()}


@TIED
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_those_of_the_quantized_table(tied, bits):
    model = tiny_llama(tie_word_embeddings=tied)
    dense = copy.deepcopy(model)
    packed = embeddings.pack(model, bits)
    assert list(packed) == ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    for name, (weight, error) in packed.items():
        w = dense.get_submodule(name).weight.detach()
        assert torch.equal(weight.unpack(), embeddings.pack_rows(name, w, bits).unpack())
        assert error == pytest.approx(float((w - weight.unpack()).square().sum() / w.square().sum()), rel=1e-4)
        assert error < {8: 1e-4, 4: 2e-2}[bits]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, PackedEmbedding) and isinstance(head, TiedLinear if tied else PackedLinear)
    assert torch.equal(table(IDS), table.weight[IDS]) and table(IDS[:0]).shape == (0, 8, 64)
    with pytest.raises(IndexError):
        table(torch.tensor([256]))
    # The same model with the decoded tables in it.
    dense.get_input_embeddings().weight.data = table.weight
    dense.get_output_embeddings().weight.data = head.weight
    with torch.no_grad():
        assert_close(model(IDS).logits, dense(IDS).logits, 1e-5)


def test_slices_of_a_table_equal_the_whole(monkeypatch):
    w = torch.randn(100, 72)
    for bits in (8, 4):
        whole = embeddings.pack_rows("table", w, bits)
        with monkeypatch.context() as small:
            small.setattr(embeddings, "SLICE_WEIGHTS", 33 * 72)
            parts = embeddings.pack_rows("table", w, bits)
        assert parts.spec() == whole.spec()
        assert all(torch.equal(t, whole.tensors()[name]) for name, t in parts.tensors().items())


@TIED
@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_reloads_and_saves_again_bit_for_bit(place, tmp_path, tied, bits):
    directory = place / f"Q-{tied}-{bits}"
    held = stored(directory)
    assert "model.embed_tokens.qweight" in held and "model.embed_tokens.weight" not in held
    assert any(name.startswith("lm_head.") for name in held) != tied, "a tied pair is stored once"
    assert all(t.dtype == torch.uint8 for name, t in held.items() if name.endswith((".scale", ".zero")))
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.tie_weights()
    head = model.get_output_embeddings()
    assert isinstance(head, TiedLinear if tied else PackedLinear)
    assert (head.qweight is model.get_input_embeddings().qweight) == tied, "a tied pair is one tensor in memory"
    table = model.get_input_embeddings().packed
    assert all(torch.equal(t, held[f"model.embed_tokens.{name}"]) for name, t in table.tensors().items())
    model.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    held = {name: t for name, t in held.items() if "lora" not in name}
    assert again.keys() == held.keys() and all(torch.equal(t, held[name]) for name, t in again.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((directory / "config.json").read_text())["quantization_config"]
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(second(IDS).logits, logits)
        assert half(IDS).logits.dtype == torch.bfloat16
        assert_close(half(IDS).logits.float(), logits, 0.05)
        assert torch.equal(copy.deepcopy(model)(IDS).logits, logits)
        base = AutoModel.from_pretrained(directory)
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated[:, 8], logits[:, -1].argmax(-1))


@TIED
def test_dequantized_ties_are_transformers_own_again(place, tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(place / f"Q-{tied}-8")
    with torch.no_grad():
        logits = model(IDS).logits
        model.dequantize(torch.float32)
        assert_close(model(IDS).logits, logits, 1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


@TIED
def test_streamed_equals_loaded(place, tied):
    directory = place / f"Q-{tied}-8"
    streamed = StreamedModel(directory, torch.float32)
    for index in range(len(streamed)):
        streamed.load(index)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(streamed.model(IDS).logits, model(IDS).logits)
    verify_head(model, Head.of(model))


@TIED
def test_blocks_are_those_of_a_model_with_the_decoded_tables(place, tmp_path, tied):
    tables = AutoModelForCausalLM.from_pretrained(place / f"Q-{tied}-4")
    model = AutoModelForCausalLM.from_pretrained(place / f"D-{tied}")
    model.get_input_embeddings().weight.data = tables.get_input_embeddings().weight
    model.get_output_embeddings().weight.data = tables.get_output_embeddings().weight
    model.save_pretrained(tmp_path / "D")
    for path in tokenizer_files(place / f"D-{tied}"):
        shutil.copyfile(path, tmp_path / "D" / path.name)
    assert main(f"quantize --model {tmp_path}/D --output_dir {tmp_path}/Q {settings(place)}".split()) == 0
    held, expected = stored(place / f"Q-{tied}-4"), stored(tmp_path / "Q")
    blocks = [name for name in expected if "layers" in name]
    assert len(blocks) > 28 and all(torch.equal(held[name], expected[name]) for name in blocks)


@TIED
def test_adapters_leave_embeddings_and_head_alone(place, tmp_path, tied):
    base = AutoModelForCausalLM.from_pretrained(place / f"Q-{tied}-8")
    with torch.no_grad():
        before = base(IDS).logits
    base = lrec.prepare_model_for_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 14 and not any("lm_head" in name or "embed" in name for name in adapted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):  # the first step moves B alone, which starts at zero
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / f"Q-{tied}-8"), tmp_path / "adapter")
    with torch.no_grad():
        after = model.eval()(IDS).logits
        assert torch.equal(again.eval()(IDS).logits, after) and not torch.equal(after, before)
        merged = model.merge_and_unload()
        assert_close(merged(IDS).logits, after, 1e-4)
    assert isinstance(merged.get_input_embeddings(), PackedEmbedding)
    assert isinstance(merged.get_output_embeddings(), TiedLinear) == tied


@TIED
def test_every_verb_takes_it(place, tmp_path, capsys, tied):
    directory, dense = place / f"Q-{tied}-8", place / f"D-{tied}"
    text = ["--dataset", str(place / "text.txt"), "--num_samples", "4", "--max_length", "32"]

    def report(*words):
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    told = report("inspect", "--model", directory)
    names = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    rows = {row["name"]: row for row in told["layers"]}
    assert len(rows) == 14 + len(names) and told["num_layers"] == 14 and told["quantized_share"] == 1.0
    held = stored(directory)
    for name in names:
        size = sum(t.numel() * t.element_size() for key, t in held.items() if key.startswith(f"{name}."))
        assert rows[name]["bytes"] == size and rows[name]["bits_per_weight"] == 8 * size / (300 * 48)
    inside = [row for name, row in rows.items() if name not in names]
    weights = sum(row["shape"][0] * row["shape"][1] for row in inside)
    assert told["bits_per_weight"] == 8 * sum(row["bytes"] for row in inside) / weights
    assert told["total_bytes"] == sum(path.stat().st_size for path in directory.glob("model-*.safetensors"))
    assert json.loads((directory / "lrec_report.json").read_text())["num_layers"] == 14
    assert sum(row["layers"] for row in report("explain", "--model", directory)["layers"] if row["rows"] == 1) == len(
        rows
    )
    words = ["train", "--model", directory, "--teacher", dense, "--output_dir", tmp_path / "A", *text]
    report(*words, "--max_steps", 2, "--lora_r", 4, "--use_cpu", "--gradient_checkpointing")
    found = report("evaluate", "--model", directory, "--adapter", tmp_path / "A", "--teacher", dense, *text)
    assert found["kl"] < 0.05
    plain = report("evaluate", "--model", directory, *text)
    assert plain["bits_per_weight"] == told["bits_per_weight"]
    assert (
        main(["export", "--format", "merged", "--model", str(directory), "--output_dir", str(tmp_path / "merged")]) == 0
    )
    assert any(name.startswith("lm_head.") for name in stored(tmp_path / "merged")) != tied
    merged, packed = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "merged", directory)
    )
    weight = packed.get_output_embeddings().weight.bfloat16().float()
    assert torch.equal(merged.get_output_embeddings().weight, weight)
    assert torch.equal(merged.get_input_embeddings().weight, packed.get_input_embeddings().weight.bfloat16().float())


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (3, lambda model: None, "quantize_embeddings = 3 is not offered; allowed: 8, 4, or 0"),
        (8, lambda model: model.set_input_embeddings(Scaled(256, 64)), "model.embed_tokens is a Scaled, which does mo"),
        (8, lambda model: model.lm_head.weight.data[3].fill_(float("nan")), "lm_head: 64 of 16384 weights are NaN"),
    ],
)
def test_what_cannot_be_packed_is_refused(bits, change, message):
    model = tiny_llama()
    change(model)
    with pytest.raises(ValueError, match=message):
        embeddings.pack(model, bits)


def test_a_width_that_is_not_offered_leaves_no_directory(place, tmp_path, capsys):
    words = ["quantize", "--model", place / "D-True", "--output_dir", tmp_path / "Q", "--method", "rtn"]
    assert main([*map(str, words), "--dataset", "none", "--quantize_embeddings", "5"]) == 2
    assert "quantize_embeddings = 5 is not offered" in capsys.readouterr().err
    assert not (tmp_path / "Q").exists()


@TIED
def test_an_interrupted_run_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch, tied):
    quantize = Pass._quantize

    def stop(self, block, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return quantize(self, block, index, *rest)

    words = f"quantize --model {place}/D-{tied} --output_dir {tmp_path}/Q {settings(place)} --quantize_embeddings 8"
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Pass, "_quantize", stop)
        assert main(words.split()) == 130
    assert not (tmp_path / "Q" / "config.json").exists()
    assert main(words.split()) == 0
    for path in (place / f"Q-{tied}-8").glob("*.safetensors"):
        assert (tmp_path / "Q" / path.name).read_bytes() == path.read_bytes(), path.name


@TIED
def test_compiles_without_a_break(place, tied):
    model = AutoModelForCausalLM.from_pretrained(place / f"Q-{tied}-8")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    compiled = torch.compile(lambda ids: head(table(ids)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDS), head(table(IDS)))


class Scaled(torch.nn.Embedding):
    """As Gemma's."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 8
