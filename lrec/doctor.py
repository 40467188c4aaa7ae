"""`lrec doctor`: what this machine has, which of it lrec can use, and what would make it faster.

A check is `ok`, `slower` (it works, and something would make it work better) or `broken`; only what is broken makes
the exit code 1. Nothing is installed, changed or fetched.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from lrec import kernels, load, machine, registry
from lrec.formats import Packed
from lrec.kernels import gpu, native
from lrec.options import setting
from lrec.quantizers import quantize_layer
from lrec.statistics import Collector

# A method for each format, small settings where its own would not fit a small weight.
METHODS = {"rtn": {}, "nf4": {}, "bcq": {}, "ternary": {}, "icquant": {}, "ptq161": {"refine_epochs": 0}}
EXTRAS = {
    "matplotlib": ("pictures of lrec compare and lrec report", "pip install 'lrec[plots]'"),
    "gguf": ("GGUF exports and imports", "pip install 'lrec[gguf]'"),
    "bitsandbytes": ("8-bit optimizers", "pip install 'lrec[gpu]'"),
    "lm_eval": ("tasks of lm-evaluation-harness", "pip install 'lrec[eval]'"),
}
TOLERANCE = 1e-4  # relative, of float32 products with another order of summing
LITTLE_MEMORY, LITTLE_DISK = 2 * 10**9, 5 * 10**9


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, how that is, and what to do about it ("" if nothing)."""

    check: str
    state: str
    found: str
    to_do: str = ""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """`lrec doctor`: checks of this machine, and which kernels run here."""

    device: str = setting("auto", "device to look at: auto (first GPU, else CPU), cpu, cuda ...")

    def run(self) -> dict:
        """Rows of checks, of kernels and of places, and `failed`, the number of checks that are broken."""
        device = load.device_of(self.device)
        weights = samples()
        checks = [*libraries(), *extras(), *processor(), *graphics(), *room(device), *products(weights, device)]
        counts = {state: sum(check.state == state for check in checks) for state in ("broken", "slower")}
        return {
            "failed": counts["broken"],
            "could_be_faster": counts["slower"],
            "device": str(device),
            "python": f"{sys.version.split()[0]} at {sys.executable}",
            "checks": [vars(check) for check in checks],
            "kernels": served(weights),
            "places": places(),
        }


def libraries() -> Iterator[Check]:
    """The versions of what lrec needs, beside what it asks for."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires("lrec") or []]
    except metadata.PackageNotFoundError:
        found = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
        yield Check("libraries", "slower", found, "lrec is not installed, only found: `pip install .` checks versions")
        return
    for needed in asked:
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield Check(needed.name, "broken", "missing", f"pip install '{needed}'")
            continue
        fits = needed.specifier.contains(found, prereleases=True)
        yield Check(needed.name, "ok" if fits else "broken", found, "" if fits else f"pip install '{needed}'")


def extras() -> Iterator[Check]:
    """Packages that some verbs use, each with what for."""
    for name, (use, how) in EXTRAS.items():
        there = importlib.util.find_spec(name) is not None
        yield Check(name, "ok", "installed" if there else f"missing: no {use}", "" if there else how)


def processor() -> Iterator[Check]:
    """The CPU, its threads and the native library."""
    about = machine.about()
    few = about["threads"] < about["cores"]
    yield Check(
        "threads",
        "slower" if few else "ok",
        f"{about['threads']} of {about['cores']} cores, {about['processor']}",
        f"OMP_NUM_THREADS={about['cores']} would use all cores" if few else "",
    )
    if reason := native.missing():
        compiler = os.environ.get("CXX", "c++").split()[0]
        first = "" if shutil.which(compiler) else f"install a C++17 compiler (there is no {compiler!r}), then "
        state = "broken" if native.PATH.exists() else "slower"
        yield Check("native CPU kernels", state, reason, f"{first}pip install . again")
        return
    path = native.cpu_path()
    slow = path == "portable"
    wanted = "a CPU with AVX2 multiplies several times as fast"
    limited = f"LREC_CPU={os.environ['LREC_CPU']} limits it: unset it" if os.environ.get("LREC_CPU") else wanted
    yield Check("native CPU kernels", "slower" if slow else "ok", path, limited if slow else "")


def graphics() -> Iterator[Check]:
    """The GPUs, Triton, and whether kernels were tuned on them."""
    if not torch.cuda.is_available():
        there = any(Path("/dev").glob("nvidia[0-9]*"))
        built = f"torch {torch.__version__} " + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs")
        to_do = "install a torch built for its driver's CUDA version" if there else ""
        yield Check(
            "GPU", "broken" if there else "ok", f"{'one that torch cannot use' if there else 'none'}; {built}", to_do
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        old = capability < (8, 0)
        found = f"{name}, compute capability {capability[0]}.{capability[1]}, {size(free)} of {size(total)} free"
        yield Check(f"GPU {index}", "slower" if old else "ok", found, "bfloat16 is slow before 8.0" if old else "")
    if reason := gpu.missing(kernels.Call("cuda", torch.bfloat16, 1)):
        yield Check("Triton kernels", "slower", reason, "pip install 'lrec[gpu]'")
        return
    from lrec.kernels.gpu import tuning

    tuned = tuning.path().exists() and tuning.device() in tuning.path().read_text()
    found = f"{'measured' if tuned else 'not measured'} on {tuning.device()}"
    yield Check(
        "Triton kernels", "ok" if tuned else "slower", found, "" if tuned else "lrec bench kernels --device cuda"
    )


def room(device: torch.device) -> Iterator[Check]:
    """Free memory, and free disk where this is run."""
    free = machine.free_bytes(device)
    little = free < LITTLE_MEMORY
    yield Check("free memory", "slower" if little else "ok", size(free), "close other programs" if little else "")
    free = machine.free_disk_bytes(Path.cwd())
    little = free < LITTLE_DISK
    yield Check(
        "free disk", "slower" if little else "ok", f"{size(free)} at {Path.cwd()}", "free some" if little else ""
    )


def products(weights: dict[str, Packed], device: torch.device) -> Iterator[Check]:
    """A product with a weight of each format by the kernel that serves here, beside the decoded weight's."""
    for name, packed in weights.items():
        x_TK = torch.randn(4, packed.shape[1], generator=torch.Generator().manual_seed(0))
        exact = x_TK.double() @ packed.unpack().double().t()
        call = kernels.Call(device.type, torch.float32, len(x_TK))
        kernel = kernels.explain(call, packed.spec())[0]
        y_TN = kernels.multiply(x_TK.to(device), packed.to(device)).double().cpu()
        error = float((y_TN - exact).norm() / exact.norm())
        right = error <= TOLERANCE or os.environ.get("LREC_ACTIVATION_BITS") == "8"
        to_do = (
            "" if right else f"LREC_KERNEL=reference is right; report this with `lrec doctor --json`, {kernel} is not"
        )
        yield Check(f"{name} product", "ok" if right else "broken", f"{kernel}, relative error {error:.1e}", to_do)


def samples() -> dict[str, Packed]:
    """A small packed weight of each format that a method makes, by the format's name."""
    generator = torch.Generator().manual_seed(0)
    w_NK, x_TK = torch.randn(64, 128, generator=generator), torch.randn(256, 128, generator=generator)
    found = {}
    for method, settings in METHODS.items():
        quantizer = registry.find("quantizers", method)(**settings)
        collector = Collector(w_NK.shape[1], quantizer.needs | {"hessian"})
        collector.add(x_TK)
        packed = quantize_layer(method, w_NK, quantizer, collector.result())
        found[packed.spec()["format"]] = packed
    return found


def served(weights: dict[str, Packed]) -> list[dict]:
    """A row for each kernel: on what device it is at home, the formats that it serves here, or why it serves none."""
    rows = []
    for name, kernel in kernels.table().items():
        device = "cuda" if name.endswith("triton") else "cpu"
        call = kernels.Call(device, torch.float32, 1)
        reasons = {form: kernel.refuses(call, packed.spec()) for form, packed in weights.items()}
        serves = [form for form, reason in reasons.items() if reason is None]
        lacking = "no GPU here" if device == "cuda" and not torch.cuda.is_available() else ""
        own = reasons.get(name.partition("_")[0], next(iter(reasons.values())))
        why = lacking or ("" if serves else own)
        rows.append({"kernel": name, "device": device, "serves": ", ".join(serves) if not why else "", "why_not": why})
    return rows


def places() -> list[dict]:
    """Where lrec and the libraries below it keep things, whether they may write there, and the room."""
    from huggingface_hub.constants import HF_HUB_CACHE

    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrec"
    found = {"here": Path.cwd(), "models and data of the Hub": Path(HF_HUB_CACHE), "measurements of kernels": own}
    if data := os.environ.get("LREC_DATA"):
        found["data scripts"] = Path(data)
    rows = []
    for what, path in found.items():
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        may = "yes" if os.access(there, os.W_OK) else "no"
        rows.append({"place": what, "path": str(path), "writable": may, "free": size(machine.free_disk_bytes(path))})
    return rows


def size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.1f} GB"
