"""What is imported when: heavy libraries wait until they are needed. Counted, not timed."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "peft", "trl", "accelerate", "datasets", "matplotlib", "jinja2", "pandas")


def imported(code: str) -> tuple[set[str], int]:
    """The heavy libraries in memory after a piece of code in a fresh interpreter, and the number of lrec's modules."""
    told = f"""
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
{code}
print(json.dumps([[n for n in {HEAVY!r} if n in sys.modules], sum(n.split(".")[0] == "lrec" for n in sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    heavy, own = json.loads(done.stdout)
    return set(heavy), own


@pytest.mark.parametrize(
    "code",
    ["import lrec", *(f"from lrec.cli import main; main({words})" for words in (["--help"], [], ["qantize"]))],
    ids=["import lrec", "lrec --help", "lrec", "a wrong verb"],
)
def test_nothing_heavy_is_imported_for(code):
    heavy, own = imported(f"    {code}")
    assert heavy == set() and own <= 12


def test_a_packed_layer_needs_torch_alone():
    assert imported("    from lrec import PackedLinear")[0] <= {"torch", "numpy"}


def test_lrec_waits_for_transformers_and_peft_to_register():
    code = "    import lrec\n    import transformers\n    from transformers import AutoConfig"
    heavy, _ = imported(code)
    assert "transformers" in heavy and not heavy & {"peft", "trl", "datasets"}
