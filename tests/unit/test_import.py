"""`import lrec`: what it costs, which names it offers, and that registration waits for transformers and peft."""

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lrec
from lrec import integrations
from lrec.integrations import AFTER, ImportAfter

ROOT = Path(__file__).parents[2]

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from peft import LoraModel
from lrec.integrations import ImportAfter
from lrec.integrations.peft import LoraPackedLinear
from lrec.integrations.transformers import LrecHfQuantizer, LrecQuantConfig
assert AUTO_QUANTIZATION_CONFIG_MAPPING["lrec"] is LrecQuantConfig
assert AUTO_QUANTIZER_MAPPING["lrec"] is LrecHfQuantizer
assert LoraModel._create_new_module.by_lrec
import peft.utils.transformers_weight_conversion  # which peft itself imports late
import sys
assert not any(isinstance(finder, ImportAfter) for finder in sys.meta_path)
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_import_brings_no_other_library():
    run("import sys, lrec; assert not {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)")


@pytest.mark.parametrize(
    "first",
    [
        "import lrec, transformers, peft",
        "import transformers.quantizers.auto, peft, lrec",
        "import lrec; lrec.LrecQuantConfig; lrec.prepare_model_for_training",
    ],
)
def test_registers_in_any_order(first):
    run(first + REGISTERED)


@pytest.mark.parametrize("name", lrec.PUBLIC)
def test_public_names_resolve(name):
    value = getattr(lrec, name)
    assert value.__name__ == name and value.__module__ == lrec.PUBLIC[name]
    assert name in dir(lrec) and name in lrec.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'PackedLinaer'.*PackedLinear"):
        _ = lrec.PackedLinaer


def test_version_is_the_one_of_the_package():
    assert lrec.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_registering_again_changes_nothing():
    from peft import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.quantizers import auto

    def state():
        return (
            auto.AUTO_QUANTIZER_MAPPING["lrec"],
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lrec"],
            LoraModel._create_new_module,
            BaseTuner._check_merge_allowed,
            list(sys.meta_path),
        )

    for awaited in AFTER:
        importlib.import_module(awaited)
    before = state()
    integrations.arrange()
    for module in AFTER.values():
        importlib.import_module(module).register()
    importlib.reload(lrec)
    assert state() == before


@pytest.fixture
def awaited(tmp_path, monkeypatch):
    """A module `awaited` that fails while the file `broken` exists, and `follower`; both write down their execution."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "ran", [], raising=False)
    broken = tmp_path / "broken"
    (tmp_path / "lrec_awaited.py").write_text(
        f"import os, sys\nif os.path.exists({str(broken)!r}): raise RuntimeError('broken')\nsys.ran.append(__name__)\n"
    )
    (tmp_path / "lrec_follower.py").write_text("import sys\nsys.ran.append(__name__)\n")
    finder = ImportAfter("lrec_awaited", "lrec_follower")
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield finder, broken
    for name in ("lrec_awaited", "lrec_follower"):
        sys.modules.pop(name, None)


def test_the_follower_is_imported_after_the_awaited_and_the_finder_leaves(awaited):
    finder, _ = awaited
    assert importlib.util.find_spec("lrec_awaited") is not None
    assert sys.ran == [] and finder in sys.meta_path, "looking for a module is not importing it"
    importlib.import_module("lrec_awaited")
    assert sys.ran == ["lrec_awaited", "lrec_follower"]
    assert finder not in sys.meta_path


def test_a_failed_import_leaves_the_finder_waiting(awaited):
    finder, broken = awaited
    broken.touch()
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("lrec_awaited")
    assert finder in sys.meta_path and "lrec_follower" not in sys.modules
    broken.unlink()
    importlib.import_module("lrec_awaited")
    assert sys.ran == ["lrec_awaited", "lrec_follower"]
