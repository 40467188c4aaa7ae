"""Checkpoints of other tools, taken over: what is decoded is what they decode, bit for bit."""

import json

import numpy as np
import pytest
import torch
from checks import assert_close
from safetensors.torch import load_file, save_file
from test_exports import decoded, export, packed_model, read_compressed, read_gptq, uniform
from test_gguf import HF, parse, read_rows, unrotated

from lrec import load, registry
from lrec.cli import main
from lrec.export import compressed_tensors, gptq
from lrec.formats.indexed import Indexed
from lrec.ggml import blocks
from lrec.imports.awq import ORDER


def read(source, tensors, config):
    return registry.find("imports", source).read("layer", tensors, None, config)


def take_over(source, directory):
    return main(["import", "--model", str(source), "--output_dir", str(directory)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["sorted", "absent", "act-order"])
def test_gptq_layers_decode_by_the_layout(bits, version, order):
    for symmetric, group_size in [(True, 32), (False, 32), (False, 96)]:
        tensors = gptq.fields(uniform(64, 96, bits, group_size, symmetric, least_zero=int(version == "gptq")), version)
        if order == "act-order":
            tensors["g_idx"] = tensors["g_idx"][torch.randperm(96)]
        expected = read_gptq(tensors, bits, version)
        if order == "absent":
            del tensors["g_idx"]
        packed = read("gptq", tensors, {"bits": bits, "checkpoint_format": version})
        assert torch.equal(packed.unpack().double(), expected)
        assert isinstance(packed, Indexed) == (order == "act-order" and group_size < 96)
        assert ("zero" in packed.tensors()) == (not symmetric)


def test_gptq_version_1_wraps_a_zero_point_of_0_as_autogptq_does():
    v2 = gptq.fields(uniform(32, 32, 4, 32, False), "gptq_v2")
    v1 = {**v2, "qzeros": torch.full_like(v2["qzeros"], -1)}  # every field is 15, which plus one is 0
    packed = read("gptq", v1, {"bits": 4})
    assert not packed.zeros().any() and packed.codes().any()


def test_gptq_layers_that_dynamic_names_have_their_own_width():
    tensors = gptq.fields(uniform(32, 64, 3, 32, True), "gptq")
    expected = read_gptq(tensors, 3, "gptq")
    config = {"bits": 4, "dynamic": {"-:.*head": {}, r"+:^lay.*$": {"bits": 3}}}
    assert torch.equal(read("gptq", tensors, config).unpack().double(), expected)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("words", [["--bits", "2", "--group_size", "16"], ["--bits", "3", "--symmetric"]])
def test_what_we_export_comes_back_bit_for_bit(dense, tmp_path, format, words):
    model = packed_model(dense, *words)
    assert export(model, tmp_path / "O", format) == 0
    assert take_over(tmp_path / "O", tmp_path / "I") == 0
    ours, theirs = decoded(model), decoded(tmp_path / "I")
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(load.model(str(model))(ids).logits, load.model(str(tmp_path / "I"))(ids).logits)


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_bitsandbytes_decodes_to_the_same_bits(dense, tmp_path, quant_type, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "B")
    (tmp_path / "B" / "tokenizer.json").write_bytes((dense / "tokenizer.json").read_bytes())
    assert take_over(tmp_path / "B", tmp_path / "I") == 0
    layers = decoded(tmp_path / "I")
    assert len(layers) == 14
    for name, weight in layers.items():
        module = theirs.get_submodule(name)
        expected = functional.dequantize_4bit(module.weight, module.weight.quant_state)
        assert expected.dtype == torch.float32 and torch.equal(weight, expected), name


def test_awq_decodes_by_the_layout():
    torch.manual_seed(1)
    N, K, G = 32, 96, 3
    q, zero = torch.randint(0, 16, (K, N)), torch.randint(0, 16, (G, N))
    scales = torch.rand(G, N).half()

    def words(fields):
        """Column 8 j + ORDER[i] in field i of word j, as unsigned sums brought into int32."""
        packed = torch.zeros(len(fields), N // 8, dtype=torch.int64)
        for j in range(N // 8):
            for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, j] += fields[:, 8 * j + column] * 16**i
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    tensors = {"qweight": words(q), "qzeros": words(zero), "scales": scales}
    group = torch.arange(K) // (K // G)
    expected = (scales.double()[group] * (q - zero[group])).t()
    packed = read("awq", tensors, {"bits": 4, "version": "gemm"})
    assert torch.equal(packed.unpack().double(), expected) and ORDER == (0, 2, 4, 6, 1, 3, 5, 7)
    with pytest.raises(ValueError, match="allowed: gemm with 4 bits"):
        read("awq", tensors, {"bits": 4, "version": "gemv"})


def test_compressed_tensors_of_odd_sizes_and_act_order():
    for bits in (2, 3, 4, 8):
        tensors = compressed_tensors.fields(uniform(41, 100, bits, 20, False))
        expected = read_compressed(tensors, bits)
        assert torch.equal(read("compressed_tensors", dict(tensors), {}).unpack().double(), expected)
        order = torch.randperm(100)
        tensors["weight_g_idx"] = (torch.arange(100) // 20)[order].int()
        scale, zero = tensors["weight_scale"].double(), uniform(41, 100, bits, 20, False)
        packed = read("compressed_tensors", tensors, {})
        group = tensors["weight_g_idx"].long()
        assert isinstance(packed, Indexed) and zero.shape == packed.shape
        levels = (expected / scale.repeat_interleave(20, 1)).round()
        zeros = read_zeros(tensors, bits)
        codes = levels + zeros.repeat_interleave(20, 1)
        assert_close(packed.unpack().double(), scale[:, group] * (codes - zeros[:, group]), 1e-12)


def read_zeros(tensors, bits):
    """Zero points (N, G) as unsigned codes."""
    N, G = tensors["weight_scale"].shape
    columns = tensors["weight_zero_point"].t().contiguous()
    numbers = [int.from_bytes(column.numpy().tobytes(), "little") for column in columns]
    return torch.tensor([[(number >> (n * bits)) % 2**bits for number in numbers] for n in range(N)]).double()


def hqq_words(rows, bits, fields):
    """Blocks of rows side by side in a word, the first one highest, as hqq packs; rows are filled up with zeros."""
    step = -(-len(rows) // fields)
    words = torch.zeros(step, rows.shape[1], dtype=torch.int64)
    for i, row in enumerate(rows):
        words[i % step] += row.long() * 2 ** (bits * (fields - 1 - i // step))
    return words.int() if fields == 10 else words.to(torch.uint8)


def hqq_layer(N, K, bits, group_size, axis=1, dtype=torch.float16):
    """(tensors of a random layer in hqq's layout, its weight in float32 by hqq's equation)."""
    R = N * K // group_size
    rows = torch.randint(0, 2**bits, (R, group_size))
    scale, zero = torch.rand(R, 1).to(dtype) + 0.1, (torch.rand(R, 1) * 2**bits).to(dtype)
    packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[bits]
    tensors = {
        "W_q": hqq_words(rows, bits, 10 if bits == 3 else 8 // bits),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor([N, K]),
        "group_size": torch.tensor(group_size, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": torch.tensor(list(packing.encode()), dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, ((rows.float() - zero.float()) * scale.float()).view(N, K)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hqq_layers_decode_by_the_layout(bits, dtype):
    for N, K, group_size in [(24, 64, 32), (8, 96, 96), (40, 24, 24)]:
        tensors, expected = hqq_layer(N, K, bits, group_size, dtype=dtype)
        viewed = {**tensors, "W_q": tensors["W_q"].view(torch.float32 if bits == 3 else torch.float16)}
        stacked = {key: tensor for key, tensor in tensors.items() if key not in ("scale", "zero")}
        stacked["zero_scale"] = torch.stack([tensors["zero"], tensors["scale"]])
        for form in (tensors, viewed, stacked):
            packed = read("hqq", form, {})
            assert torch.equal(packed.unpack(), expected) and packed.group_size == group_size


def test_hqq_layers_that_no_format_holds_are_refused():
    for changes, message in [
        ({"axis": torch.tensor(0)}, "quantize it again with axis=1"),
        ({"shape": torch.tensor([32, 48])}, "groups of 32 run over the ends of rows of 48"),
        ({"quant_scale": torch.tensor(1)}, "quantized again"),
        ({"packing": torch.tensor(list(b"5bit"), dtype=torch.uint8)}, "packing '5bit' is unknown"),
        ({"scale": torch.ones(1)}, "1 scales for 1536 weights"),
    ]:
        tensors, _ = hqq_layer(24, 64, 4, 32)
        with pytest.raises(ValueError, match=message):
            read("hqq", tensors | changes, {})


def test_pickles_of_hqq_are_not_read(tmp_path, capsys):
    (tmp_path / "qmodel.pt").write_bytes(b"pickled")
    (tmp_path / "config.json").write_text("{}")
    assert take_over(tmp_path, tmp_path / "I") == 2
    assert "is a pickle, which lrec never reads" in capsys.readouterr().err


@pytest.mark.parametrize(("bits", "from_transformers"), [(2, False), (3, True), (4, False), (8, True)])
def test_hqq_checkpoints_decode_as_hqq_does(dense, tmp_path, bits, from_transformers):
    quantize = pytest.importorskip("hqq.core.quantize")
    from hqq.models.hf.base import AutoHQQHFModel

    theirs = load.model(str(dense), dtype="float32")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(theirs, quant_config=config, compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_to_safetensors(theirs, str(tmp_path / "H"), verbose=False)
    for path in dense.glob("tokenizer*"):
        (tmp_path / "H" / path.name).write_bytes(path.read_bytes())
    if from_transformers:
        told = json.loads((tmp_path / "H" / "config.json").read_text())
        told["quantization_config"] = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
        (tmp_path / "H" / "config.json").write_text(json.dumps(told))
    assert take_over(tmp_path / "H", tmp_path / "I") == 0
    layers = decoded(tmp_path / "I")
    assert len(layers) == 14
    for name, weight in layers.items():
        layer = theirs.get_submodule(name)
        assert_close(weight, layer.dequantize().float(), 1e-3, "hqq's own decoding, rounded to float16")
        meta = {key: t.float() if key in ("scale", "zero") else t for key, t in layer.meta.items()}
        expected = quantize.Quantizer.dequantize(layer.W_q, meta | {"compute_dtype": torch.float32})
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize(("name", "quantize"), [("Q4_0", True), ("Q4_1", True), ("Q8_0", True), ("Q2_0", False)])
def test_blocks_of_gguf_decode_as_the_package_does(name, quantize):
    gguf = pytest.importorskip("gguf")
    if quantize:
        kind = gguf.GGMLQuantizationType[name]
        rows = gguf.quants.quantize(torch.randn(50, 128).numpy(), kind)
        expected = torch.from_numpy(gguf.quants.dequantize(rows, kind))
    else:
        rows = np.random.default_rng(0).integers(0, 256, (5, 36), dtype=np.uint8)
        steps = np.random.default_rng(1).normal(size=(5, 2, 1)).astype(np.float16)
        rows.reshape(5, 2, 18)[..., :2] = steps.view(np.uint8)
        expected = read_rows("q2_0", rows.tobytes(), 128).float()
    assert torch.equal(blocks.decode(rows, name.lower()).unpack(), expected)


def test_a_block_of_q4_1_that_no_format_holds_is_refused():
    """A minimum so far from the step that their sums need more than 24 bits."""
    rows = np.zeros((1, 20), np.uint8)
    rows[:, :4] = np.array([[3e4, 6e-8]], np.float16).view(np.uint8)
    rows[:, 4:] = 0x10
    with pytest.raises(ValueError, match="float32"):
        blocks.decode(rows, "q4_1")


@pytest.mark.parametrize("words", [["--bits", "2", "--group_size", "64"], ["--bits", "4", "--group_size", "32"]])
def test_a_gguf_file_comes_back_with_config_and_tokenizer(dense, tmp_path, words):
    pytest.importorskip("gguf")
    model = packed_model(dense, "--symmetric", *words)
    assert export(model, tmp_path / "O", "gguf") == 0
    assert {path.name for path in (tmp_path / "O").iterdir()} == {"model.gguf", "lrec_export.json"}
    assert take_over(tmp_path / "O", tmp_path / "I") == 0
    ours, theirs = decoded(model), decoded(tmp_path / "I")
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())
    ids = load.tokenizer(str(model))("the quick fox", return_tensors="pt").input_ids
    assert torch.equal(load.tokenizer(str(tmp_path / "I"))("the quick fox", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        expected = load.model(str(model))(ids).logits
        assert_close(load.model(str(tmp_path / "I"))(ids).logits, expected, 1e-3, "embeddings went by float16")


def test_a_q4_1_file_is_taken_over_bit_for_bit(dense, tmp_path):
    pytest.importorskip("gguf")
    model = packed_model(dense, "--bits", "4", "--group_size", "32")
    assert export(model, tmp_path / "O", "gguf") == 0
    _, tensors = parse(tmp_path / "O" / "model.gguf")
    assert take_over(tmp_path / "O", tmp_path / "I") == 0
    layers = decoded(tmp_path / "I")
    assert len(layers) == 14
    for name, weight in layers.items():
        _, _, index, module = name.split(".", 3)
        kind, shape, data = tensors[f"blk.{index}.{HF[module]}.weight"]
        rows, heads = read_rows("q4_1", data, shape[1]), {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        assert kind == 3 and torch.equal(weight, (unrotated(rows, heads) if heads else rows).float()), name


@pytest.mark.parametrize("keep", [0.001, 0.02, 0.2, 0.9999])
def test_a_truncated_gguf_file_is_refused(dense, tmp_path, capsys, keep):
    pytest.importorskip("gguf")
    model = packed_model(dense, "--symmetric", "--bits", "2", "--group_size", "64")
    assert export(model, tmp_path / "O", "gguf") == 0
    whole = (tmp_path / "O" / "model.gguf").read_bytes()
    (tmp_path / "O" / "model.gguf").write_bytes(whole[: int(len(whole) * keep)])
    capsys.readouterr()
    assert take_over(tmp_path / "O", tmp_path / "I") == 2
    told = capsys.readouterr().err
    assert "model.gguf is not a whole GGUF file" in told and not (tmp_path / "I" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quant_method": "aqlm"},
            "unknown import 'aqlm'; allowed: awq, bitsandbytes, compressed_tensors, gguf, gptq",
        ),
        ({"checkpoint_format": "marlin"}, "layers.0.self_attn.q_proj: the layout is 'marlin'"),
        (None, "is not quantized: use `lrec quantize`"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(dense, tmp_path, capsys, change, message):
    model = packed_model(dense, "--bits", "4", "--symmetric")
    assert export(model, tmp_path / "O", "gptq") == 0
    config = json.loads((tmp_path / "O" / "config.json").read_text())
    told = config.pop("quantization_config")
    config |= {} if change is None else {"quantization_config": told | change}
    (tmp_path / "O" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert take_over(tmp_path / "O", tmp_path / "I") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "I" / "config.json").exists()


def test_a_missing_tensor_is_named(dense, tmp_path, capsys):
    model = packed_model(dense, "--bits", "4")
    assert export(model, tmp_path / "O", "gptq") == 0
    path = tmp_path / "O" / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert take_over(tmp_path / "O", tmp_path / "I") == 2
    assert "model.layers.0.mlp.up_proj: the tensor or setting 'scales' is missing" in capsys.readouterr().err
