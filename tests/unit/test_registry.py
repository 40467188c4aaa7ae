"""Laws of the registry: a file is a member, found by its name, and a wrong name is answered with the nearest one."""

import importlib
from pathlib import Path

import pytest

from lrec import registry

FOLDERS = ("formats", "quantizers", "kernels", "export", "imports")


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_are_the_files_of_the_folder(folder):
    files = Path(importlib.import_module(f"lrec.{folder}").__file__).parent.glob("*.py")
    assert registry.names(folder) == tuple(sorted(f.stem for f in files if f.stem != "__init__"))
    assert registry.names(folder), f"lrec.{folder} has no members"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_holds_one_class_of_its_folder(folder):
    base = importlib.import_module(f"lrec.{folder}").Base
    for name, member in registry.members(folder).items():
        assert issubclass(member, base) and member is not base
        assert member.__module__ == f"lrec.{folder}.{name}"


def test_two_classes_in_one_file_are_refused(monkeypatch):
    rtn = importlib.import_module("lrec.quantizers.rtn")
    second = type("Second", (rtn.RTN,), {"__module__": rtn.__name__})
    monkeypatch.setattr(rtn, "Second", second, raising=False)
    with pytest.raises(AssertionError, match="exactly one Quantizer"):
        registry.find.__wrapped__("quantizers", "rtn")


@pytest.mark.parametrize(
    ("folder", "wrong", "right"),
    [("quantizers", "gtpq", "gptq"), ("quantizers", "RTN", None), ("formats", "unifrom", "uniform")],
)
def test_wrong_name_is_answered_with_the_nearest(folder, wrong, right):
    with pytest.raises(ValueError, match=f"unknown {folder.rstrip('s')} {wrong!r}") as raised:
        registry.find(folder, wrong)
    message = str(raised.value)
    for name in registry.names(folder):
        assert name in message
    assert (f"Did you mean {right!r}?" in message) == (right is not None)


def test_name_far_from_all_gets_no_hint():
    assert "Did you mean" not in registry.nearest("zzzz", ["gptq", "rtn"], "quantizer")
    assert "allowed: none." in registry.nearest("zzzz", [], "quantizer")
