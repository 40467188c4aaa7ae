"""The one reader of JSON: a document of the shape that was asked for, or a ValueError; and laws of packing, flags and
manifests, on examples that hypothesis makes up."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrec import checkpoint, documents, formats, options, report
from lrec.blocks import PassSettings
from lrec.formats import pack_codes, unpack_codes
from lrec.formats.uniform import Uniform
from lrec.imports import gguf
from lrec.lora_files import LoraFiles

QUIET = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = [documents.Manifest, documents.CacheManifest, documents.Index, documents.Stamp, documents.LoraConfig]
SHAPES += [documents.Progress, documents.Comparison, documents.Record, documents.PackedConfig, documents.TrainerState]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "/etc/passwd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def known(shape):
    """Objects with the shape's own keys and anything in them."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(shape.__annotations__, VALUES))


@QUIET
@given(st.data())
def test_a_document_has_its_shape_or_is_refused(data):
    shape = data.draw(st.sampled_from(SHAPES))
    value = data.draw(VALUES | known(shape))
    try:
        found = documents.check(value, shape, "it")
    except ValueError as error:
        assert str(error).startswith("it is damaged")
        return
    assert found is value and isinstance(found, dict)
    for name in (found.get("weight_map") or {}) if shape is documents.Index else found.get("files", {}):
        held = found["weight_map"][name] if shape is documents.Index else name
        assert os.path.basename(held) == held and held not in ("", "..")


@QUIET
@given(st.binary(max_size=64) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_bytes_are_json_or_refused(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    try:
        assert isinstance(documents.read(path), dict)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[1]", "holds a list, expected an object"),
    ],
)
def test_what_json_alone_can_do(tmp_path, text, message):
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        documents.read(tmp_path / "x.json")


def test_a_document_too_large_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ValueError, match="at most"):
        documents.read(tmp_path / "x.json")


def test_links_of_the_hub_cache_stay_within_their_repository(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f").write_text("{}")
    (tmp_path / "other").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f")
    assert documents.read(snapshot / "config.json") == {}
    (snapshot / "out.json").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="outside its directory"):
        documents.read(snapshot / "out.json")


@pytest.mark.parametrize(
    "name",
    ["é" * 128, "a" * 256, "\ud800", "..", ".", ""],
    ids=["bytes", "letters", "half a letter", "up", "here", "none"],
)
def test_a_name_that_no_file_has_is_refused(name):
    with pytest.raises(ValueError, match=r"weight_map\.w"):
        documents.check({"weight_map": {"w": name}}, documents.Index, "index")


def test_a_weight_of_no_rows_is_refused():
    spec = Uniform.pack(torch.zeros(4, 32, dtype=torch.int64), torch.ones(4, 1), None, 2, 32).spec()
    with pytest.raises(ValueError, match=r"shape\.0"):
        formats.check_spec(spec | {"shape": [0, 32]})


def test_names_are_sorted_by_their_numbers_whatever_they_begin_with():
    names = ["2.a", "h.10.b", "h.2.b", "h.b", "10.a"]
    assert sorted(names, key=report.by_numbers) == ["2.a", "10.a", "h.2.b", "h.10.b", "h.b"]


def test_a_gguf_file_that_is_a_pipe_or_a_link_out_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="not an ordinary file"):
        gguf.only_file(tmp_path)
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "model.gguf").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="outside its directory"):
        gguf.only_file(tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_an_adapter_that_leaves_out_its_rank_or_alpha_is_refused(tmp_path, key):
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({name: told[name] for name in told if name != key}))
    checkpoint.write_tensors(tmp_path / checkpoint.ADAPTER_WEIGHTS, {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"does not say {key}"):
        LoraFiles(tmp_path, None)


@QUIET
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_codes_come_back_and_fill_no_more_words_than_they_need(bits, rows, n, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, formats.words(n, bits))
    assert torch.equal(unpack_codes(packed, bits, n).long(), codes)


@QUIET
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 70), st.integers(16, 80), st.data())
def test_a_weight_passes_its_own_check_and_no_other_shape_does(bits, N, K, group_size, data):
    group_size = min(group_size, max(K, 16))
    G = -(-K // group_size)
    weight = Uniform.pack(torch.zeros(N, K, dtype=torch.int64), torch.ones(N, G), None, bits, group_size)
    weight.check()
    formats.check_spec(json.loads(formats.spec_key(weight.spec())))
    spec = json.loads(formats.spec_key(weight.spec()))
    name = data.draw(st.sampled_from(sorted(spec["tensors"])))
    axis = data.draw(st.integers(0, 1))
    spec["tensors"][name][1][axis] += data.draw(st.sampled_from([-1, 1, 1000]))
    with pytest.raises(ValueError, match=name):
        formats.empty(spec, "meta")


@QUIET
@given(
    st.dictionaries(
        st.text("abc_-=", max_size=6) | st.sampled_from(["init_rank", "batch_size", "no_correct_stream"]), VALUES
    )
)
def test_settings_are_filled_or_refused(values):
    try:
        (found,) = options.fill(values, PassSettings)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(found.init_rank, int) and isinstance(found.correct_stream, bool)


@QUIET
@given(st.lists(st.text(max_size=12), max_size=6))
def test_words_of_a_command_are_flags_or_refused(words):
    try:
        found = options.read_flags(words)
    except ValueError as error:
        assert str(error)
        return
    assert len(found) <= len(words) and all(value is True or isinstance(value, str) for value in found.values())


@QUIET
@given(
    st.dictionaries(st.sampled_from(["model-1.safetensors", "model-2.safetensors"]), st.binary(max_size=64), min_size=1)
)
def test_a_manifest_tells_every_change(tmp_path_factory, files):
    directory = tmp_path_factory.mktemp("manifest")
    for name, data in files.items():
        (directory / name).write_bytes(data)
    entries = {name: checkpoint.file_entry(directory / name) for name in files}
    checkpoint.write_json(directory / checkpoint.MANIFEST, {"format_version": 1, "files": entries})
    checkpoint.verify(directory)
    name = next(iter(files))
    (directory / name).write_bytes(files[name] + b"x")
    with pytest.raises(ValueError, match=name):
        checkpoint.verify(directory)
    (directory / name).write_bytes(files[name])
    (directory / "model-3.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is not in"):
        checkpoint.verify(directory)
