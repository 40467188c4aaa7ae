"""GGUF files: the container parsed from its bytes, blocks decoded by ggml's layouts, and the whole read by others."""

import math
import shutil
import struct

import numpy as np
import pytest
import torch
from checks import assert_close
from test_exports import export, packed_model, uniform

from lrec import checkpoint, load
from lrec.ggml import blocks, tokenizer
from lrec.ggml.model import rope_factors
from lrec.nn import packed_modules

gguf = pytest.importorskip("gguf")


def parse(path):
    """A GGUF file's settings and tensors, {name: (ggml type, shape with rows first, bytes)}, by its specification."""
    data, at = path.read_bytes(), 0

    def take(code):
        nonlocal at
        values = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return values[0]

    def text():
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take("BbHhIif?_QqQqd"[kind] if kind < 8 else {10: "Q", 11: "q", 12: "d"}[kind])

    assert data[:4] == b"GGUF"
    at = 4
    assert take("I") == 3
    num_tensors, num_settings = take("Q"), take("Q")
    settings = {text(): value(take("I")) for _ in range(num_settings)}
    infos = []
    for _ in range(num_tensors):
        name, num_dims = text(), take("I")
        infos.append((name, [take("Q") for _ in range(num_dims)][::-1], take("I"), take("Q")))
    start = -(-at // 32) * 32
    ends = [*(offset for *_, offset in infos[1:]), len(data) - start]
    return settings, {
        name: (kind, shape, data[start + offset : start + end])
        for (name, shape, kind, offset), end in zip(infos, ends, strict=True)
    }


def read_block(name, block):
    """The weights of one block in float64, element by element, by ggml's definitions."""
    d = np.float64(struct.unpack("<e", block[:2])[0])
    if name == "q2_0":
        return [((block[2 + i // 4] >> (2 * (i % 4))) % 4 - 1) * d for i in range(64)]
    if name == "q8_0":
        return [d * q for q in struct.unpack("32b", block[2:])]
    offset = {"q4_0": 2, "q4_1": 4, "q5_0": 6}[name]
    low = [(block[offset + i % 16] >> (4 * (i // 16))) % 16 for i in range(32)]
    if name == "q4_1":
        return [q * d + struct.unpack("<e", block[2:4])[0] for q in low]
    if name == "q5_0":
        high = int.from_bytes(block[2:6], "little")
        return [(q + 16 * (high >> i & 1) - 16) * d for i, q in enumerate(low)]
    return [(q - 8) * d for q in low]


def read_rows(name, data, K):
    """The weights (N, K) of a tensor of blocks."""
    size = {"q2_0": 18, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q8_0": 34}[name]
    values = [w for i in range(0, len(data), size) for w in read_block(name, data[i : i + size])]
    return torch.tensor(values, dtype=torch.float64).view(-1, K)


@pytest.mark.parametrize(
    ("bits", "symmetric", "shape", "name"),
    [
        (2, True, (5, 192, 64), "q2_0"),
        (2, True, (3, 64, 32), "q4_0"),
        (2, False, (5, 128, 64), "q4_0"),
        (3, False, (3, 96, 32), "q4_0"),
        (3, True, (3, 96, 96), "q4_0"),
        (4, True, (5, 64, 32), "q4_0"),
        (4, False, (7, 96, 32), "q5_0"),
        (8, True, (3, 64, 32), "q8_0"),
    ],
)
def test_blocks_hold_our_weights_bit_for_bit(bits, symmetric, shape, name):
    packed = uniform(shape[0], shape[1], bits, shape[2], symmetric)
    assert blocks.container(packed.spec(), "q5_0") == name
    rows = blocks.encode(packed, name)
    assert rows.shape == (shape[0], shape[1] // blocks.BLOCKS[name].size * blocks.BLOCKS[name].bytes)
    assert torch.equal(read_rows(name, rows.tobytes(), shape[1]), packed.unpack().double())
    narrow = uniform(shape[0], shape[1], bits, shape[2], symmetric, scale_bits=8)
    rows = blocks.encode(narrow, name)
    assert torch.equal(read_rows(name, rows.tobytes(), shape[1]), narrow.unpack().double())


def test_q4_1_rounds_the_minimum_alone():
    packed = uniform(9, 96, 4, 32, False)
    w = read_rows("q4_1", blocks.encode(packed, "q4_1").tobytes(), 96)
    scale = packed.scale.double().repeat_interleave(32, 1)
    minimum = (-packed.zeros().double() * packed.scale.double()).half().double().repeat_interleave(32, 1)
    assert torch.equal(w, packed.codes().double() * scale + minimum)
    assert (w - packed.unpack().double()).abs().max() <= 2**-11 * minimum.abs().max()


def test_dense_q8_0_is_the_package_s(tmp_path):
    w = torch.randn(5, 96)
    expected = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(blocks.encode_q8_0(w), expected)


def unrotated(rows, heads):
    """Rows of q or k in transformers' order: coordinate i of half j stands at 2 i + j of each head in the file."""
    D = len(rows) // heads
    order = [h * D + 2 * i + j for h in range(heads) for j in range(2) for i in range(D // 2)]
    return rows[order]


HF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def test_a_q2_0_file_holds_the_model(dense, tmp_path):
    model = packed_model(dense, "--bits", "2", "--group_size", "64", "--symmetric")
    assert export(model, tmp_path / "O", "gguf") == 0
    settings, tensors = parse(tmp_path / "O" / "model.gguf")
    layers = {name: layer.packed.unpack() for name, layer in packed_modules(load.model(str(model))).items()}
    for name, weight in layers.items():
        _, _, index, module = name.split(".", 3)
        kind, shape, data = tensors.pop(f"blk.{index}.{HF[module]}.weight")
        assert (kind, shape) == (42, list(weight.shape))
        rows = read_rows("q2_0", data, shape[1])
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        assert torch.equal(unrotated(rows, heads) if heads else rows, weight.double()), name
    norms = {f"blk.{i}.{norm}.weight" for i in range(2) for norm in ("attn_norm", "ffn_norm")}
    assert set(tensors) == norms | {"token_embd.weight", "output.weight", "output_norm.weight"}
    assert all(tensors[name][0] == (1 if name in ("token_embd.weight", "output.weight") else 0) for name in tensors)
    told = {
        "general.architecture": "llama",
        "general.file_type": 41,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.merges": ["t h", "th e"],
    }
    assert {key: settings[key] for key in told} == told
    assert settings["tokenizer.ggml.tokens"][0] == "<eos>" and len(settings["tokenizer.ggml.tokens"]) == 256
    assert settings["tokenizer.ggml.token_type"][:2] == [3, 1]


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--bits", "3", "--group_size", "32"], []),
        (["--bits", "4", "--group_size", "32"], ["--asymmetric", "q5_0", "--dense", "q8_0"]),
        (["--bits", "4", "--group_size", "64"], []),
    ],
)
def test_transformers_reads_the_file_as_our_model(dense, tmp_path, words, flags):
    model = packed_model(dense, *words)
    assert export(model, tmp_path / "O", "gguf", *flags) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "O", gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected = load.model(str(model))(ids).logits
        tolerance = 2e-2 if "q8_0" in flags else 1e-3
        assert_close(theirs(ids).logits, expected, tolerance, "logits by transformers from GGUF")
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / "O", gguf_file="model.gguf"), load.tokenizer(str(model)))
    assert theirs("the quick brown fox, 17!").input_ids == ours("the quick brown fox, 17!").input_ids


def test_gguf_lora_holds_the_pairs_in_the_order_of_the_file(dense, tmp_path):
    model = packed_model(dense, "--bits", "2", "--group_size", "64", "--symmetric")
    base = load.model(str(model))
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "A")
    assert export(model, tmp_path / "O", "gguf-lora", "--adapter", str(tmp_path / "A")) == 0
    settings, tensors = parse(tmp_path / "O" / "adapter.gguf")
    assert (settings["general.type"], settings["adapter.type"]) == ("adapter", "lora")
    assert settings["adapter.lora.alpha"] == 6.0 and settings["general.architecture"] == "llama"
    assert len(tensors) == 12
    held = adapted.state_dict()
    for name, heads in (("self_attn.q_proj", 4), ("self_attn.k_proj", 2), ("mlp.down_proj", None)):
        a, b = (
            torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
            for kind, shape, data in (tensors[f"blk.1.{HF[name]}.weight.lora_{half}"] for half in "ab")
        )
        prefix = f"base_model.model.model.layers.1.{name}"
        assert torch.equal(a, held[f"{prefix}.lora_A.default.weight"])
        assert torch.equal(unrotated(b, heads) if heads else b, held[f"{prefix}.lora_B.default.weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--group_size", "16"], "no block of ggml holds 2 bits"),
        (["--bits", "8", "--group_size", "32"], "no block of ggml holds 8 bits with zero points"),
        (["--zero_point", "float"], "zero points are floats"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(dense, tmp_path, capsys, words, message):
    model = packed_model(dense, *words)
    capsys.readouterr()
    assert export(model, tmp_path / "O", "gguf") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "O").exists()


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(dense, tmp_path, capsys):
    model = shutil.copytree(packed_model(dense, "--symmetric"), tmp_path / "Q")
    told = checkpoint.read_json(model / "tokenizer.json")
    told["pre_tokenizer"] = {"type": "Whitespace"}
    checkpoint.write_json(model / "tokenizer.json", told)
    assert export(model, tmp_path / "O", "gguf") == 2
    assert "is not byte-level BPE" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert export(model, tmp_path / "O", "gguf") == 2
    assert "tokenizer.json does not exist" in capsys.readouterr().err


def test_cuts_are_told_apart():
    level = {"type": "ByteLevel", "add_prefix_space": False}
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": next(iter(tokenizer.CUTS))}}

    def sequence(*steps):
        return {"type": "Sequence", "pretokenizers": list(steps)}

    assert tokenizer.cut_name(level) == "gpt-2"
    assert tokenizer.cut_name(sequence(digits, level)) == "smollm"
    assert tokenizer.cut_name(sequence(split, level | {"use_regex": False})) == "llama-bpe"
    assert tokenizer.cut_name(sequence(split, level)) is None
    assert tokenizer.cut_name(sequence({**digits, "individual_digits": False}, level)) is None
    assert tokenizer.cut_name(level | {"add_prefix_space": True}) is None


def test_llama_3_s_rotary_factors_are_llama_cpp_s():
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=512, rope_parameters=rope)
    expected = []
    for i in range(0, 64, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / 64)
        smooth = min(max((64 / wavelength - 1) / (4 - 1), 0), 1)
        expected.append(1 / ((1 - smooth) / 8 + smooth))
    factors = rope_factors(config)
    assert {1.0, 8.0} < {round(float(f), 3) for f in factors}
    assert_close(factors, torch.tensor(expected), 1e-5)
