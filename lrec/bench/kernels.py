"""How fast the kernels multiply here, beside what people use today: same shapes, same run, calls interleaved.

Each contender multiplies by several copies of its weight in turn, together larger than the last-level cache, so that
weights come from memory as they do when a model decodes. Times are medians: of wall time, or with one thread of that
thread's CPU time, which others on the machine disturb less. `OMP_NUM_THREADS=1` asks for one.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lrec import kernels, registry
from lrec.bench import gpu, keep
from lrec.bench.samples import SAMPLES, sample
from lrec.formats import Packed
from lrec.kernels import Call, native
from lrec.options import setting

ROWS = (1, 4, 16, 256, 1024)
# With how many rows of x each shape is multiplied. The largest is what no cache holds, for the rate of one row alone.
SHAPES = {(4096, 4096): ROWS, (11008, 4096): ROWS, (576, 1536): ROWS, (8192, 8192): (1,)}
QUICK = {(4096, 4096): (1, 256)}
BACKWARD_ROWS = (256, 1024)
MANY_ROWS = 256
MANY_ROWS_REPEATS = 3
CACHE_BYTES = 2**27
MAX_COPIES = 32


@dataclass(frozen=True)
class Contender:
    """A way to multiply (T, K) by a weight's transpose, or with a true third argument (T, N) by the weight.

    The second argument says by which copy of the weight; None comes back where the contender does not serve.
    """

    name: str
    multiply: Callable[[Tensor, int, bool], Tensor | None]
    nbytes: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """`lrec bench kernels`: packed products against torch fp32, torch bf16 and bitsandbytes NF4."""

    device: str = setting("cpu", "where to measure: cpu, or cuda, whose kernels are tuned on the way")
    group_size: int = setting(64, "columns that share a scale")
    formats: str = setting("all", f"all, or some of these, comma-separated: {', '.join(SAMPLES)}")
    repeats: int = setting(9, f"calls of each contender per row, {MANY_ROWS_REPEATS} from {MANY_ROWS} rows on; medians")
    quick: bool = setting(False, "only 4096 x 4096 with few and many rows of x, three calls each, nothing tuned")
    output: str | None = setting(None, "JSON file to which the report is added")

    def run(self) -> dict:
        """The machine, and a row per shape, number of rows of x, direction and contender.

        Raises ValueError for a device that is not offered or not here, and for a format that is not offered.
        """
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device {self.device} is not offered; allowed: cpu, cuda; leave --device out")
        if self.device == "cuda":
            if reason := gpu.unusable():
                raise ValueError(f"--device cuda cannot be measured here: {reason}; leave --device out")
            return keep(self.output, "kernels", gpu.run(self.group_size, 3 if self.quick else self.repeats, self.quick))
        names = list(SAMPLES) if self.formats == "all" else self.formats.split(",")
        for name in names:
            if name not in SAMPLES:
                raise ValueError(registry.nearest(name, SAMPLES, "sample of --formats"))
        return keep(self.output, "kernels", self.on_cpu(names))

    def on_cpu(self, names: list[str]) -> dict:
        """The report of these samples on the CPU."""
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        rows, absent = [], None
        for shape, counts in (QUICK if self.quick else SHAPES).items():
            contenders, absent = self.contenders(names, shape)
            for T in counts:
                repeats = MANY_ROWS_REPEATS if self.quick or T >= MANY_ROWS else self.repeats
                for transpose in (False, True) if T in BACKWARD_ROWS else (False,):
                    rows += measure(contenders, shape, (T, transpose), repeats, clock)
        return {
            "threads": torch.get_num_threads(),
            "instructions": instructions(),
            "clock": clock.__name__,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "read_gb_per_s": read_rate(clock),
            **({"bitsandbytes": absent} if absent else {}),
            "rows": rows,
        }

    def contenders(self, names: list[str], shape: tuple[int, int]) -> tuple[list[Contender], str | None]:
        """All that can run here for one shape, torch fp32 first; and why bitsandbytes is absent, if it is."""
        nf4, absent = bitsandbytes_nf4(*shape)
        ours = []
        for name in names:
            packed = sample(name, shape, self.group_size)
            ours += [ours_by(kernel, name, packed) for kernel in serving(packed)]
        return [dense(*shape, torch.float32), dense(*shape, torch.bfloat16), *([nf4] if nf4 else []), *ours], absent


def instructions() -> str:
    """What the native kernels run on here: avx512, avx2, portable, or why there are none."""
    return native.missing() or native.cpu_path()


def measure(
    contenders: list[Contender], shape: tuple[int, int], what: tuple[int, bool], repeats: int, clock: Callable
) -> list[dict]:
    """A row per contender that serves: median milliseconds, weights and bytes per second, ratios.

    `what` is the number of rows of x, and whether x is multiplied by W as for a gradient.
    """
    (N, K), (T, transpose) = shape, what
    times = {c.name: [] for c in contenders}
    x = {dtype: torch.randn(T, N if transpose else K).to(dtype) for dtype in {c.dtype for c in contenders}}
    for i in range(repeats + 1):  # the first call warms up and is not counted
        for c in contenders:
            start = clock()
            if c.multiply(x[c.dtype], i, transpose) is not None:
                times[c.name].append(clock() - start)
    medians = {c.name: statistics.median(times[c.name][1:]) for c in contenders if times[c.name]}
    nf4 = medians.get("bitsandbytes nf4")
    return [
        {
            "shape": f"{N}x{K}",
            "rows": T,
            "direction": "backward" if transpose else "forward",
            "contender": c.name,
            "ms": 1e3 * medians[c.name],
            "gweights_per_s": N * K / medians[c.name] / 1e9,
            "gb_per_s": c.nbytes / medians[c.name] / 1e9,
            "x_torch_fp32": medians["torch float32"] / medians[c.name],
            "x_nf4": nf4 and nf4 / medians[c.name],
        }
        for c in contenders
        if c.name in medians
    ]


def dense(N: int, K: int, dtype: torch.dtype) -> Contender:
    """torch's own product with a dense weight."""
    name = str(dtype).removeprefix("torch.")
    weights = copies(torch.randn(N, K).to(dtype))

    def multiply(x: Tensor, i: int, transpose: bool) -> Tensor:
        weight = weights[i % len(weights)]
        return x @ (weight if transpose else weight.t())

    return Contender(f"torch {name}", multiply, weights[0].nbytes, dtype)


def ours_by(kernel: str, name: str, packed: Packed) -> Contender:
    """A kernel of ours through the one op, as a layer calls it."""
    spec = packed.spec()
    tensors = list(zip(*(copies(t, packed.nbytes) for t in packed.tensors().values()), strict=True))

    def multiply(x: Tensor, i: int, transpose: bool) -> Tensor | None:
        with forced(kernel):
            if registry.find("kernels", kernel).refuses(Call("cpu", x.dtype, len(x), transpose), spec):
                return None
            return kernels.apply(x, list(tensors[i % len(tensors)]), packed.key, transpose)

    return Contender(f"{name} {kernel}", multiply, packed.nbytes)


def serving(packed: Packed) -> list[str]:
    """Kernels that multiply one row by such a weight here if asked for by name; the reference if no other does."""
    names = []
    for name, kernel in kernels.table().items():
        with forced(name):
            if name != "reference" and not kernel.refuses(Call("cpu", torch.float32, 1), packed.spec()):
                names.append(name)
    return names or ["reference"]


def bitsandbytes_nf4(N: int, K: int) -> tuple[Contender | None, str | None]:
    """bitsandbytes' 4-bit product, or None and why it is absent."""
    try:
        import bitsandbytes
    except ImportError as error:
        return None, f"absent, so not compared: {error}"
    data, state = bitsandbytes.functional.quantize_4bit(torch.randn(N, K), quant_type="nf4")
    weights = copies(data)

    def multiply(x: Tensor, i: int, transpose: bool) -> Tensor | None:
        if transpose:
            return None
        return bitsandbytes.matmul_4bit(x, weights[i % len(weights)].t(), quant_state=state)

    return Contender("bitsandbytes nf4", multiply, data.nbytes + state.absmax.nbytes), None


def copies(tensor: Tensor, nbytes: int | None = None) -> list[Tensor]:
    """The tensor and clones of it: as many as exceed the cache together, where one weight takes `nbytes`."""
    count = min(MAX_COPIES, -(-CACHE_BYTES // (nbytes or tensor.nbytes)))
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def read_rate(clock: Callable) -> float:
    """GB/s at which torch sums a tensor larger than the cache: what memory gives to these threads."""
    data = torch.ones(CACHE_BYTES, dtype=torch.int8).view(torch.float32)
    times = []
    for _ in range(7):
        start = clock()
        data.sum()
        times.append(clock() - start)
    return data.nbytes / min(times) / 1e9


@contextmanager
def forced(kernel: str):
    """LREC_KERNEL set for a while."""
    before = os.environ.get("LREC_KERNEL")
    os.environ["LREC_KERNEL"] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ["LREC_KERNEL"]
        else:
            os.environ["LREC_KERNEL"] = before
