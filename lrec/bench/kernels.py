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

from lrec import formats, kernels, registry
from lrec.formats.uniform import Uniform, groups
from lrec.kernels import Call
from lrec.options import setting

SHAPES = ((4096, 4096), (11008, 4096), (576, 1536))
ROWS = (1, 4, 16, 256, 1024)
CACHE_BYTES = 2**27
MAX_COPIES = 32


@dataclass(frozen=True)
class Contender:
    """A way to multiply (T, K) by a weight: copy i of it, the bytes a copy stores, the dtype of x."""

    name: str
    multiply: Callable[[Tensor, int], Tensor]
    nbytes: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """`lrec bench kernels`: packed products against torch fp32, torch bf16 and bitsandbytes NF4."""

    device: str = setting("cpu", "where to measure: cpu")
    group_size: int = setting(64, "columns that share a scale")
    repeats: int = setting(9, "calls of each contender per row; medians are reported")
    quick: bool = setting(False, "only 4096 x 4096 with 1 and 256 rows of x, three calls each")

    def run(self) -> dict:
        """The machine, and a row per shape, number of rows of x and contender.

        Raises ValueError for a device that is not the CPU.
        """
        if self.device != "cpu":
            raise ValueError(f"--device {self.device} is not offered; allowed: cpu; leave --device out")
        shapes, counts, repeats = (SHAPES[:1], (1, 256), 3) if self.quick else (SHAPES, ROWS, self.repeats)
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        rows, absent = [], None
        for N, K in shapes:
            contenders, absent = self.contenders(N, K)
            for T in counts:
                rows += measure(contenders, (N, K), T, repeats, clock)
        return {
            "threads": torch.get_num_threads(),
            "clock": clock.__name__,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "read_gb_per_s": read_rate(clock),
            **({"bitsandbytes": absent} if absent else {}),
            "rows": rows,
        }

    def contenders(self, N: int, K: int) -> tuple[list[Contender], str | None]:
        """All that can run here for one shape, torch fp32 first; and why bitsandbytes is absent, if it is."""
        nf4, absent = bitsandbytes_nf4(N, K)
        packed = [uniform(N, K, bits, self.group_size, name) for bits in (2, 3, 4) for name in serving(bits)]
        return [dense(N, K, torch.float32), dense(N, K, torch.bfloat16), *([nf4] if nf4 else []), *packed], absent


def measure(contenders: list[Contender], shape: tuple[int, int], T: int, repeats: int, clock: Callable) -> list[dict]:
    """A row per contender that takes T rows of x: median milliseconds, weights and bytes per second, ratios."""
    N, K = shape
    times = {c.name: [] for c in contenders}
    x = {dtype: torch.randn(T, K).to(dtype) for dtype in {c.dtype for c in contenders}}
    for i in range(repeats + 1):  # the first call warms up and is not counted
        for c in contenders:
            start = clock()
            if c.multiply(x[c.dtype], i) is not None:
                times[c.name].append(clock() - start)
    medians = {c.name: statistics.median(times[c.name][1:]) for c in contenders if times[c.name]}
    nf4 = medians.get("bitsandbytes nf4")
    return [
        {
            "shape": f"{N}x{K}",
            "rows": T,
            "contender": c.name,
            "ms": 1e3 * medians[c.name],
            "gweights_per_s": N * K / medians[c.name] / 1e9,
            "gb_per_s": c.nbytes / medians[c.name] / 1e9,
            "x_torch_fp32": medians["torch float32"] / medians[c.name],
            **({"x_nf4": nf4 / medians[c.name]} if nf4 else {}),
        }
        for c in contenders
        if c.name in medians
    ]


def dense(N: int, K: int, dtype: torch.dtype) -> Contender:
    """torch's own product with a dense weight."""
    name = str(dtype).removeprefix("torch.")
    weights = copies(torch.randn(N, K).to(dtype))
    return Contender(f"torch {name}", lambda x, i: x @ weights[i % len(weights)].t(), weights[0].nbytes, dtype)


def uniform(N: int, K: int, bits: int, group_size: int, kernel: str) -> Contender:
    """A kernel of ours through the one op, as a layer calls it; None for numbers of rows that it refuses."""
    G = groups(K, group_size)
    codes, zeros = torch.randint(0, 2**bits, (N, K)), torch.randint(0, 2**bits, (N, G))
    packed = Uniform.pack(codes, (torch.rand(N, G) + 0.1).half(), zeros, bits, group_size)
    spec, key = packed.spec(), formats.spec_key(packed.spec())
    tensors = list(zip(*(copies(t, packed.nbytes) for t in packed.tensors().values()), strict=True))

    def multiply(x: Tensor, i: int) -> Tensor | None:
        with forced(kernel):
            if registry.find("kernels", kernel).refuses(Call("cpu", x.dtype, len(x)), spec):
                return None
            return kernels.apply(x, list(tensors[i % len(tensors)]), key)

    return Contender(f"{bits}-bit {kernel}", multiply, packed.nbytes)


def serving(bits: int) -> list[str]:
    """Kernels that multiply one row by a uniform weight of this width here, if asked for by name; not the reference."""
    packed = Uniform.pack(torch.zeros(1, 64, dtype=torch.int), torch.ones(1, 1), None, bits, 64)
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

    def multiply(x: Tensor, i: int) -> Tensor:
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
