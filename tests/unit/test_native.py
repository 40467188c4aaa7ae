"""The native library as a library: found or refused in words, both of its implementations, clean under sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrec import kernels
from lrec.formats.uniform import Uniform
from lrec.kernels import Call, native, uniform_cpu
from lrec.nn import PackedLinear
from lrec.quantizers.rtn import RTN
from tests.checks import assert_close

FOLDER = Path(native.__file__).parent
DRIVER = sorted(Path(__file__).parent.glob("native_*.cpp"))
needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def weight(bits=2):
    """A small seeded weight."""
    torch.manual_seed(0)
    return Uniform.pack(torch.randint(0, 2**bits, (41, 401)), torch.rand(41, 7) + 0.1, None, bits, 64)


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As after an install without a working compiler."""
    log = tmp_path / "build.log"
    log.write_text("c++ -O3 ...\nuniform.cpp:1: fatal error: cstdint: No such file or directory\n")
    monkeypatch.setattr(native, "PATH", tmp_path / "liblrec_native.so")
    monkeypatch.setattr(native, "BUILD_LOG", log)
    native.missing.cache_clear()
    kernels._choose.cache_clear()
    yield
    monkeypatch.undo()
    native.missing.cache_clear()
    kernels._choose.cache_clear()


def test_without_the_library_the_reference_serves_and_the_compiler_is_quoted(no_library):
    packed = weight()
    name, aside = kernels.explain(Call("cpu", torch.float32, 1), packed.spec())
    assert name == "reference"
    assert "fatal error: cstdint" in aside["uniform_cpu"] and "install a C++17 compiler" in aside["uniform_cpu"]
    x = torch.randn(3, 401)
    torch.testing.assert_close(kernels.matmul(x, packed), x @ packed.unpack().t())


def test_a_library_that_does_not_load_is_refused_in_words(monkeypatch, no_library, tmp_path):
    (tmp_path / "liblrec_native.so").write_text("not a library")
    assert "does not load" in native.missing() and "reinstall" in native.missing()


@needs_library
def test_int8_activations_serve_only_who_asks(monkeypatch):
    spec, call = weight().spec(), Call("cpu", torch.float32, 1)
    monkeypatch.delenv("LREC_ACTIVATION_BITS", raising=False)
    name, aside = kernels.explain(call, spec)
    assert name == "uniform_cpu" and "LREC_ACTIVATION_BITS=8" in aside["uniform_cpu_int8"]
    monkeypatch.setenv("LREC_ACTIVATION_BITS", "8")
    assert kernels.explain(call, spec)[0] == "uniform_cpu_int8"
    assert kernels.explain(Call("cpu", torch.float32, 1, transpose=True), spec)[0] == "uniform_cpu"
    assert kernels.explain(Call("cpu", torch.float32, 64), spec)[0] == "uniform_cpu_int8"
    x = torch.randn(1, 401)
    rounded = kernels.matmul(x, weight())
    monkeypatch.delenv("LREC_ACTIVATION_BITS")
    assert not torch.equal(kernels.matmul(x, weight()), rounded), "the choice outlived the setting"


@needs_library
def test_int8_activations_that_are_not_finite_stay_so(monkeypatch):
    monkeypatch.setenv("LREC_KERNEL", "uniform_cpu_int8")
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 401)
        x[1, 300] = bad
        y = kernels.matmul(x, weight())
        assert y[0].isfinite().all() and y[1].isnan().all()


@needs_library
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
def test_all_implementations_pass_the_kernel_tests(path):
    if path == native.cpu_path():
        pytest.skip(f"this process runs {path}, and tests/numeric/test_kernels.py tests it here")
    environment = {**os.environ, "LREC_CPU": path, "OMP_NUM_THREADS": "1"}
    shown = subprocess.check_output(
        [sys.executable, "-c", "from lrec.kernels import native; print(native.cpu_path())"], env=environment, text=True
    )
    if shown.strip() != path:
        pytest.skip(f"this machine has no {path}")
    selected = "_cpu and (product or identity)"
    tests = [sys.executable, "-m", "pytest", "-q", "tests/numeric/test_kernels.py", "-k", selected]
    done = subprocess.run(tests, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_every_function_is_clean_under_sanitizers(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler named c++")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([compiler, *sanitize, str(probe), "-o", str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    driver = tmp_path / "driver"
    sources = [*map(str, DRIVER), *map(str, sorted(FOLDER.glob("*.cpp")))]
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}"]
    built = subprocess.run([compiler, *flags, *sanitize, *sources, "-o", str(driver)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for path in ("", "avx2", "portable"):
        environment = {**os.environ, "LREC_CPU": path, "OMP_NUM_THREADS": "2"}
        done = subprocess.run([str(driver)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@needs_library
def test_8_bit_scales_are_decoded_once_a_weight_and_again_when_it_changes():
    first, second = (RTN(scale_bits=8, zero_point="float")(torch.randn(41, 401) * size) for size in (1, 3))
    layer, x = PackedLinear(first), torch.randn(2, 401)
    before = len(uniform_cpu._WIDE)
    assert_close(layer(x), x @ first.unpack().t(), 1e-6)
    made = uniform_cpu._WIDE[layer.scale]
    layer(x)
    assert uniform_cpu._WIDE[layer.scale] is made and len(uniform_cpu._WIDE) == before + 1
    layer.load_state_dict(second.tensors())
    assert_close(layer(x), x @ second.unpack().t(), 1e-6)
    with torch.inference_mode():
        assert_close(PackedLinear(first)(x), x @ first.unpack().t(), 1e-6)
    del layer, first, second
    assert len(uniform_cpu._WIDE) == before, "gone with the weight"
