"""Every export of packed integers, decoded by the layout that its tool documents and, where installed, by the tool."""

import importlib.util
import json
import re

import pytest
import torch
from checks import assert_close
from safetensors.torch import load_file

from lrec import load, registry, rewrite
from lrec.cli import main
from lrec.eight_bits import exponents, round_scales
from lrec.export import compressed_tensors, gptq
from lrec.formats.uniform import Uniform
from lrec.nn import packed_modules

PACKED = {}


def packed_model(dense, *words):
    """The model quantized with these settings (rtn if they name no method), once for all tests: not to be changed."""
    if words not in PACKED:
        directory = dense.parent / f"packed{len(PACKED)}"
        method = [] if "--method" in words else ["--method", "rtn"]
        where = ["--model", str(dense), "--output_dir", str(directory)]
        assert main(["quantize", *where, *method, "--init_rank", "0", *words]) == 0
        PACKED[words] = directory
    return PACKED[words]


def export(model, directory, format, *words):
    return main(["export", "--model", str(model), "--format", format, *words, "--output_dir", str(directory)])


def decoded(model) -> dict:
    """What lrec makes of each packed layer, float32 by name."""
    return {name: layer.packed.unpack() for name, layer in packed_modules(load.model(str(model))).items()}


def stored(directory) -> dict:
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


def stream(words, bits, n):
    """The first n fields of `bits` bits in a row of int32 words, read as one little-endian number."""
    number = int.from_bytes(words.contiguous().numpy().tobytes(), "little")
    return [(number >> (i * bits)) % 2**bits for i in range(n)]


def same_rest(directory, model, layers):
    """Whether what is not packed was carried over bit for bit."""
    theirs, ours = stored(directory), stored(model)
    rest = [key for key in ours if key.rpartition(".")[0] not in layers]
    assert rest and all(torch.equal(theirs[key], ours[key]) for key in rest)


def uniform(N, K, bits, group_size, symmetric, least_zero=0, scale_bits=16):
    """A random weight; zero points from `least_zero` up."""
    G = K // group_size
    codes = torch.randint(0, 2**bits, (N, K))
    zero = None if symmetric else torch.randint(least_zero, 2**bits, (N, G))
    scale = torch.rand(N, G).add(0.1).half()
    if scale_bits == 8:
        scale = round_scales(scale.float(), exponents(scale.float())).half()
    return Uniform.pack(codes, scale, zero, bits, group_size, scale_bits)


def read_gptq(tensors, bits, version):
    """w[n, k] = scales[g_idx[k], n] * (q[n, k] - zero[g_idx[k], n]) in float64, by AutoGPTQ's layout."""
    qweight, qzeros, scales, g_idx = (tensors[f] for f in ("qweight", "qzeros", "scales", "g_idx"))
    N, K = qweight.shape[1], len(g_idx)
    assert qweight.shape[0] * 32 == K * bits and qzeros.shape[1] * 32 == N * bits
    assert scales.dtype == torch.float16 and g_idx.dtype == qweight.dtype == qzeros.dtype == torch.int32
    q = torch.tensor([stream(qweight[:, n], bits, K) for n in range(N)], dtype=torch.float64)
    zero = torch.tensor([stream(row, bits, N) for row in qzeros], dtype=torch.float64) + (version == "gptq")
    return scales.double()[g_idx.long()].t() * (q - zero[g_idx.long()].t())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_fields_decode_to_our_weights(bits, symmetric, version):
    for N, K, group_size in [(32, 64, 32), (96, 160, 32), (64, 96, 96)]:
        packed = uniform(N, K, bits, group_size, symmetric, least_zero=int(version == "gptq"))
        tensors = gptq.fields(packed, version)
        assert torch.equal(read_gptq(tensors, bits, version), packed.unpack().double())
        narrow = uniform(N, K, bits, group_size, symmetric, int(version == "gptq"), scale_bits=8)
        assert torch.equal(read_gptq(gptq.fields(narrow, version), bits, version), narrow.unpack().double())
        assert tensors["g_idx"].tolist() == [k // group_size for k in range(K)]


@pytest.mark.parametrize(
    ("words", "version", "told"),
    [
        (["--bits", "3", "--group_size", "0", "--symmetric"], "gptq", {"bits": 3, "group_size": -1, "sym": True}),
        (["--bits", "2", "--group_size", "16"], "gptq_v2", {"bits": 2, "group_size": 16, "sym": False}),
    ],
)
def test_gptq_writes_a_model_in_the_version_that_holds_it(dense, tmp_path, words, version, told):
    model = packed_model(dense, *words)
    assert export(model, tmp_path / "O", "gptq") == 0
    config = json.loads((tmp_path / "O" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "O" / "quantize_config.json").read_text())
    assert json.loads((tmp_path / "O" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {"quant_method": "gptq", "desc_act": False, "checkpoint_format": version, **told}
    assert {key: config[key] for key in expected} == expected and "dynamic" not in config
    tensors, layers = stored(tmp_path / "O"), decoded(model)
    for name, weight in layers.items():
        held = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{name}.")}
        assert torch.equal(read_gptq(held, told["bits"], version), weight.double()), name
    same_rest(tmp_path / "O", model, layers)
    assert (tmp_path / "O" / "tokenizer.json").exists()


def test_gptq_version_1_refuses_a_zero_of_0(dense, tmp_path, capsys):
    model = packed_model(dense, "--group_size", "16")
    assert any(not layer.packed.zeros().all() for layer in packed_modules(load.model(str(model))).values())
    assert export(model, tmp_path / "O", "gptq", "--checkpoint_format", "gptq") == 2
    assert "zero point of 0" in capsys.readouterr().err and not (tmp_path / "O").exists()


def test_gptq_tells_layers_of_other_widths(dense, tmp_path):
    words = ["--symmetric", "--group_size", "32", "--bits_map", "re:.*0\\.mlp\\.down_proj=4"]
    model = packed_model(dense, *words)
    assert export(model, tmp_path / "O", "gptq") == 0
    told = json.loads((tmp_path / "O" / "config.json").read_text())["quantization_config"]
    name = r"+:^model\.layers\.0\.mlp\.down_proj$"
    assert told["bits"] == 2 and told["dynamic"] == {name: {"bits": 4, "group_size": 32, "sym": True}}


def read_compressed(tensors, bits):
    """weight_scale[n, g] * (q[n, k] - zero[n, g]) in float64, by compressed-tensors' pack-quantized layout."""
    packed, scale = tensors["weight_packed"], tensors["weight_scale"].double()
    N, K = tensors["weight_shape"].tolist()
    half, G = 2 ** (bits - 1), scale.shape[1]
    assert packed.shape == (N, -(-K * bits // 32)) and scale.shape[0] == N
    q = torch.tensor([stream(row, bits, K) for row in packed], dtype=torch.float64) - half
    zero = torch.zeros(N, G, dtype=torch.float64)
    if "weight_zero_point" in tensors:
        assert tensors["weight_zero_point"].shape == (-(-N * bits // 32), G)
        columns = tensors["weight_zero_point"].t()
        zero = torch.tensor([stream(column, bits, N) for column in columns], dtype=torch.float64).t() - half
    group = torch.arange(K) // (K // G)
    return scale[:, group] * (q - zero[:, group])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_fields_decode_to_our_weights(bits, symmetric):
    for N, K, group_size in [(32, 64, 32), (41, 100, 20), (7, 96, 96)]:
        packed = uniform(N, K, bits, group_size, symmetric)
        assert torch.equal(read_compressed(compressed_tensors.fields(packed), bits), packed.unpack().double())


@pytest.mark.parametrize(
    "words",
    [
        ["--bits", "2", "--group_size", "32"],
        ["--bits", "3", "--group_size", "0", "--symmetric"],
        ["--bits", "4", "--group_size", "32", "--symmetric", "--bits_map", "down_proj=2"],
    ],
)
def test_compressed_tensors_are_read_by_their_package(dense, tmp_path, words):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = packed_model(dense, *words)
    assert export(model, tmp_path / "O", "compressed-tensors") == 0
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected = load.model(str(model))(ids).logits
        assert_close(load.model(str(tmp_path / "O"))(ids).logits, expected, 1e-3, "logits by compressed-tensors")
    same_rest(tmp_path / "O", model, decoded(model))


@pytest.mark.parametrize(
    ("words", "format", "message"),
    [
        (["--zero_point", "float"], "gptq", "zero points are floats.*--format merged"),
        (["--group_size", "48"], "gptq", "64 columns are no multiple of the group, 48"),
        (["--method", "nf4", "--block_size", "32"], "gptq", "codebook, not uniform"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_with_the_nearest(dense, tmp_path, capsys, words, format, message):
    model = packed_model(dense, *words)
    capsys.readouterr()
    assert export(model, tmp_path / "O", format) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_packed_embeddings_are_decoded_for_others(dense, tmp_path):
    model = packed_model(dense, "--bits", "2", "--group_size", "32", "--quantize_embeddings", "4")
    embeddings = load.model(str(model)).get_input_embeddings()
    expected = embeddings.packed.unpack().bfloat16()
    for format in ("gptq", "merged"):
        assert export(model, tmp_path / format, format) == 0
        assert torch.equal(stored(tmp_path / format)["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize("format", ["merged", "gptq", "compressed-tensors", "gguf"])
def test_check_reads_it_again_or_tells_who_was_not_there(dense, tmp_path, capsys, format):
    model = packed_model(dense, "--bits", "4", "--group_size", "32", "--symmetric")
    capsys.readouterr()
    assert export(model, tmp_path / "O", format, "--check", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    readers = registry.find("export", format.replace("-", "_")).readers
    absent = [name for name in readers if importlib.util.find_spec(name) is None]
    if absent:
        assert told["checked"] == f"no: {', '.join(absent)} not installed"
    else:
        assert told["checked"].startswith("by ") and told["logits_error"] < 2e-2


def test_check_lets_no_wrong_export_appear(dense, tmp_path, capsys, monkeypatch):
    model = packed_model(dense, "--bits", "4", "--group_size", "32")
    monkeypatch.setattr(rewrite, "rewrite", wrong_by_a_column)
    assert export(model, tmp_path / "O", "merged", "--check") == 2
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "O").exists()


def wrong_by_a_column(streamed, output_dir, convert, dtype, real=rewrite.rewrite):
    real(streamed, output_dir, lambda name, packed: {"weight": convert(name, packed)["weight"].roll(1, 1)}, dtype)
