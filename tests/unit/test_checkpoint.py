"""Files are whole or absent, and a directory that was damaged is never loaded."""

import json

import pytest
import torch

from lrec import checkpoint


@pytest.fixture
def directory(tmp_path):
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, shard in enumerate(shards):
        checkpoint.write_tensors(shard, {f"w{i}": torch.arange(12.0).reshape(3, 4).t()})
    checkpoint.write_index(tmp_path, shards)
    checkpoint.write_manifest(tmp_path, {"method": "rtn"})
    return tmp_path


def test_what_is_written_is_read_back(directory):
    checkpoint.verify(directory)
    assert [path.name[:11] for path in checkpoint.weight_files(directory)] == ["model-00001", "model-00002"]
    with checkpoint.open_tensors(checkpoint.weight_files(directory)[1]) as file:
        assert torch.equal(file.get_tensor("w1"), torch.arange(12.0).reshape(3, 4).t())
    assert not list(directory.glob(".*partial"))


def test_a_directory_without_a_manifest_passes(tmp_path):
    checkpoint.verify(tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, .* were written"),
        (flip, "was altered"),
    ],
)
def test_every_damaged_file_is_named(directory, damage, message):
    for path in checkpoint.weight_files(directory):
        damage(path)
    with pytest.raises(ValueError, match=rf"model-00001-of-00002.safetensors .*{message}.*model-00002.*{message}"):
        checkpoint.verify(directory)


def test_names_that_leave_the_directory_are_refused(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": ""}
    checkpoint.write_json(directory / checkpoint.MANIFEST, manifest)
    with pytest.raises(ValueError, match="outside its directory"):
        checkpoint.verify(directory)
    index = directory / "model.safetensors.index.json"
    checkpoint.write_json(index, {"weight_map": {"w": "/etc/passwd"}})
    with pytest.raises(ValueError, match="outside its directory"):
        checkpoint.weight_files(directory)


def test_a_newer_manifest_says_to_upgrade(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text()) | {"format_version": 99}
    checkpoint.write_json(directory / checkpoint.MANIFEST, manifest)
    with pytest.raises(ValueError, match="upgrade lrec"):
        checkpoint.verify(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff\xfe"])
def test_broken_json_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|holds a list)"):
        checkpoint.read_json(path)


def test_pickled_weights_are_pointed_out_and_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: convert to safetensors"):
        checkpoint.weight_files(tmp_path)


def test_identity_of_tensors_knows_names_dtypes_shapes_and_bytes():
    base = {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.int32)}
    hashes = {
        checkpoint.tensors_hash(tensors)
        for tensors in (
            base,
            {"c": base["a"], "b": base["b"]},
            {**base, "a": base["a"].reshape(2, 3)},
            {**base, "a": base["a"].half()},
            {**base, "a": base["a"] + 1},
        )
    }
    assert len(hashes) == 5
    assert checkpoint.tensors_hash({"b": base["b"], "a": base["a"].clone()}) == checkpoint.tensors_hash(base)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    assert checkpoint.check_stamp(tmp_path, "abc") == {}
    checkpoint.write_json(tmp_path / checkpoint.ADAPTER_STAMP, {"packed_sha256": "abc"})
    assert checkpoint.check_stamp(tmp_path, "abc") == {"packed_sha256": "abc"}
    with pytest.raises(ValueError, match="was made for a base with packed weights abc, but this base has def"):
        checkpoint.check_stamp(tmp_path, "def")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
