"""`lrec doctor` on this machine, and on one that lacks something."""

import json

import pytest
import torch

from lrec import doctor, formats, kernels, registry
from lrec.cli import main
from lrec.kernels import native


@pytest.fixture(scope="module")
def weights():
    return doctor.samples()


def rows(checks):
    return {check.check: check for check in checks}


def test_this_machine_is_looked_at_and_what_serves_is_right(capsys):
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    checks = {row["check"]: row for row in told["checks"]}
    assert told["failed"] == 0 and told["could_be_faster"] == sum(row["state"] == "slower" for row in checks.values())
    assert checks["torch"]["found"] == torch.__version__.split("+")[0] or "+" in checks["torch"]["found"]
    assert all(row["to_do"] for row in checks.values() if row["state"] != "ok")
    assert [row["kernel"] for row in told["kernels"]] == list(kernels.table())
    assert all(bool(row["serves"]) != bool(row["why_not"]) for row in told["kernels"])
    assert all(row["path"] and row["writable"] in ("yes", "no") for row in told["places"])


def test_every_format_that_a_method_makes_is_multiplied(weights):
    made = set(registry.names("formats")) - {"indexed", "latent"}  # which imports and training make
    assert set(weights) == made
    assert all(isinstance(packed, formats.Packed) for packed in weights.values())
    found = rows(doctor.products(weights, torch.device("cpu")))
    assert {check.state for check in found.values()} == {"ok"}


def test_a_kernel_that_multiplies_wrongly_is_found(weights, monkeypatch):
    real = kernels.multiply
    monkeypatch.setattr(kernels, "multiply", lambda x, packed: real(x, packed) * 1.01)
    found = rows(doctor.products(weights, torch.device("cpu")))
    assert {check.state for check in found.values()} == {"broken"}
    assert all("LREC_KERNEL=reference" in check.to_do for check in found.values())


def test_without_the_native_library_the_build_is_told_and_nothing_is_broken(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "PATH", tmp_path / "none.so")
    monkeypatch.setattr(native, "BUILD_LOG", tmp_path / "build.log")
    (tmp_path / "build.log").write_text("c++ -O3\nfatal error: omp.h: no such file\n")
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.missing.cache_clear()
    try:
        check = rows(doctor.processor())["native CPU kernels"]
        served = {row["kernel"]: row for row in doctor.served(weights)}
    finally:
        native.missing.cache_clear()
    assert check.state == "slower" and "omp.h: no such file" in check.found and "no-such-compiler" in check.to_do
    assert "was not built" in served["uniform_cpu"]["why_not"] and not served["uniform_cpu"]["serves"]
    assert "uniform" in served["reference"]["serves"]


def test_a_library_that_does_not_load_fails_the_command(monkeypatch, tmp_path, capsys):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "PATH", broken)
    native.missing.cache_clear()
    try:
        assert main(["doctor", "--device", "cpu"]) == 1
    finally:
        native.missing.cache_clear()
    assert "does not load" in capsys.readouterr().out


def test_fewer_threads_than_cores_and_little_room_are_told(monkeypatch):
    about = {"cores": 8, "threads": 2, "processor": "EPYC", "memory_bytes": 10**9}
    monkeypatch.setattr(doctor.machine, "about", lambda: about)
    monkeypatch.setattr(doctor.machine, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(doctor.machine, "free_disk_bytes", lambda path: 10**9)
    assert rows(doctor.processor())["threads"].to_do == "OMP_NUM_THREADS=8 would use all cores"
    assert {check.state for check in doctor.room(torch.device("cpu"))} == {"slower"}


def test_an_old_or_missing_library_is_broken(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["torch>=99", "no-such-package>=1", "pytest; extra=='dev'"]
    )
    found = rows(doctor.libraries())
    assert set(found) == {"torch", "no-such-package"}
    assert {check.state for check in found.values()} == {"broken"}
    assert found["torch"].to_do == "pip install 'torch>=99'"
