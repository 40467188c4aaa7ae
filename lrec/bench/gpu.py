"""How fast packed products are on this GPU beside torch bfloat16 and bitsandbytes NF4: tuned first, then in one run.

A contender's calls are captured in a CUDA graph, over copies of its weight that together exceed the last-level cache
three times, as when a model decodes: a launch costs what it costs there, and weights come from memory. The graphs of
all contenders are replayed in turn, so that clocks and neighbours hit them alike; times are medians. Data are random,
since zeros multiply faster. Beside each time stands the error against float64 arithmetic on the same decoded weight.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from lrec import formats, registry
from lrec.bench.gpu_weights import others, weights
from lrec.formats import Packed
from lrec.kernels import Call, gpu
from lrec.kernels.gpu import tiling, tuning
from lrec.kernels.gpu.tiling import Weight

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
ROWS = (1, 4, 16, 64, 256, 2048)
TRAINING_ROWS = 2048  # from here on the gradient of x is measured too
GRADIENT_ROWS = (16,)  # where the gradient of x is measured alone
TUNED = ((1, False), (16, False), (16, True))  # rows of x, and whether for its gradient
CROSSOVER_SHAPE, CROSSOVER_ROWS = (14336, 4096), (16, 32, 64, 128, 256)
SERVING = ("fused_triton", "slab_triton")
ERROR_WEIGHTS = 2**26  # of larger weights float64 takes longer than the measurement


@dataclass(frozen=True)
class Contender:
    """A way to multiply x (T, K) by copy i of a weight: y (T, N), or its gradient too, if there is one."""

    name: str
    forward: Callable[[Tensor, int], Tensor]
    backward: Callable[[Tensor, int], Tensor] | None
    nbytes: int
    weight: Packed | None = None
    most_rows: int = 2**30


def unusable() -> str | None:
    """Why nothing can be measured on a GPU here, in words, or None."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device on this machine"
    return gpu.missing(Call("cuda", torch.bfloat16, 1))


def run(group_size: int, repeats: int, quick: bool) -> dict:
    """The GPU, the crossovers found by tuning, a row per shape, rows of x and contender. Records what was tuned."""
    shapes, counts = (SHAPES[:1], (1, 2048)) if quick else (SHAPES, ROWS)
    crossovers = {} if quick else tune(group_size)
    rows = []
    for N, K in shapes:
        dense = bfloat16(N, K)
        nf4, absent = bitsandbytes_nf4(N, K)
        kinds = weights(N, K, group_size) + (others(N, K, group_size) if (N, K) == CROSSOVER_SHAPE else [])
        packed = [contender(p, name) for p in kinds for name in SERVING]
        for T in counts:
            rows += measure([dense, *nf4, *packed], (N, K), T, repeats)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "group_size": group_size,
        "copy_gb_per_s": copy_rate(),
        **({"bitsandbytes": absent} if absent else {}),
        "crossover_rows": crossovers,
        "rows": rows,
    }


def tune(group_size: int) -> dict[str, int]:
    """Measures and records the fastest Config of each shape, then each format's crossovers, which it returns."""
    from lrec.kernels.gpu.fused import product
    from lrec.kernels.gpu.gradient import gradient

    configs = {}
    for N, K in SHAPES:
        for packed in weights(N, K, group_size) + (others(N, K, group_size)[:-1] if (N, K) == CROSSOVER_SHAPE else []):
            copied, weight = copies(packed), Weight.of(packed)
            for T, transpose in TUNED:
                if tiling.refuses(packed.spec(), transpose):
                    continue
                x, way = random_x(T, N if transpose else K), gradient if transpose else product
                calls = {
                    config: lambda i, x=x, copied=copied, config=config, way=way: way(
                        x, copied[i % len(copied)], config
                    )
                    for config in tiling.candidates(weight, T, transpose)
                }
                times = medians({c: call for c, call in calls.items() if fits(call)}, repeats=3, launches=40)
                configs[tuning.shape_class(weight, T, transpose)] = min(times, key=times.get)
    tuning.record(configs, {})
    crossovers = {}
    for packed in weights(*CROSSOVER_SHAPE, group_size) + others(*CROSSOVER_SHAPE, group_size):
        for transpose in (False, True):
            if tiling.refuses(packed.spec(), transpose):
                continue
            crossovers[tuning.kind(Weight.of(packed), transpose)] = crossover(packed, transpose)
    tuning.record({}, crossovers)
    return crossovers


def crossover(packed: Packed, transpose: bool) -> int:
    """The most rows of `CROSSOVER_ROWS`, for gradients a quarter of each, with which fused is faster than slabs."""
    ways = {name: contender(packed, name, most_rows=2**30) for name in SERVING}
    faster = 0
    for rows in CROSSOVER_ROWS:
        T = rows // 4 if transpose else rows
        x = random_x(T, packed.shape[0 if transpose else 1])
        calls = {name: lambda i, c=c, x=x: (c.backward if transpose else c.forward)(x, i) for name, c in ways.items()}
        times = medians(calls, repeats=3, launches=10)
        faster = T if times["fused_triton"] < times["slab_triton"] else faster
    return faster


def fits(call: Callable[[int], Tensor]) -> bool:
    """Whether this GPU has the shared memory and the registers that a call's kernels were compiled for."""
    from triton.runtime.errors import OutOfResources

    try:
        call(0)
    except OutOfResources:
        return False
    return True


def measure(contenders: list[Contender], shape: tuple[int, int], T: int, repeats: int) -> list[dict]:
    """A row per contender that takes T rows of x, and per direction: microseconds, rates, ratios to torch, error."""
    N, K = shape
    x, dy, rows = random_x(T, K), random_x(T, N), []
    served = [c for c in contenders if c.most_rows >= T]
    directions = {
        "forward": lambda c, i: c.forward(x, i),
        **({"backward": lambda c, i: c.backward(dy, i)} if T in GRADIENT_ROWS else {}),
        **({"forward+backward": lambda c, i: c.backward(c.forward(x, i), i)} if T >= TRAINING_ROWS else {}),
    }
    for direction, run in directions.items():
        able = [c for c in served if c.backward or direction == "forward"]
        calls = {c.name: lambda i, c=c, run=run: run(c, i) for c in able}
        times = medians(calls, repeats, launches=40 if T <= 64 else 4)
        for c in able:
            ratios = {"x_bfloat16": times["torch bfloat16"] / times[c.name]}
            if "bitsandbytes nf4" in times:
                ratios["x_nf4"] = times["bitsandbytes nf4"] / times[c.name]
            rows.append(
                {
                    "shape": f"{N}x{K}",
                    "rows": T,
                    "direction": direction,
                    "contender": c.name,
                    "us": 1e6 * times[c.name],
                    "gb_per_s": (c.nbytes + 2 * T * (N + K)) / times[c.name] / 1e9,
                    **ratios,
                    "error": error(c, x, dy, direction) if N * K <= ERROR_WEIGHTS else None,
                }
            )
    return rows


def medians(calls: dict, repeats: int, launches: int) -> dict:
    """Median seconds of one call for each of these functions of i, which run i = 0 to launches - 1 in a CUDA graph."""
    graphs = {name: captured(call, launches) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):  # the first replay warms up and is not counted
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / launches)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def captured(call: Callable[[int], Tensor], launches: int) -> torch.cuda.CUDAGraph:
    """The CUDA graph of call(0) to call(launches - 1), compiled and warmed up before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(launches):  # each copy of a weight: what is made once a weight is not part of a call
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    return graph


def error(c: Contender, x: Tensor, dy: Tensor, direction: str) -> float | None:
    """Relative error of a packed product or gradient against float64; NaN if one is in it."""
    if c.weight is None or direction == "forward+backward":
        return None
    w_NK = c.weight.unpack().double()
    if direction == "backward":
        actual, expected = c.backward(dy, 0), dy.double() @ w_NK
    else:
        actual, expected = c.forward(x, 0), x.double() @ w_NK.t()
    return float((actual.double() - expected).norm() / expected.norm())


def contender(packed: Packed, kernel: str, most_rows: int | None = None) -> Contender:
    """A kernel of ours, called as the op calls it."""
    copied, found = copies(packed), registry.find("kernels", kernel)
    if most_rows is None:
        most_rows = 256 if kernel == "fused_triton" else 2**30
    alone = kernel == "fused_triton" and tiling.refuses(packed.spec(), True) is not None
    return Contender(
        f"{tuning.kind(Weight.of(packed))} {kernel}",
        lambda x, i: found.matmul(x, copied[i % len(copied)], False),
        None if alone else lambda dy, i: found.matmul(dy, copied[i % len(copied)], True),
        packed.nbytes,
        packed,
        most_rows,
    )


def bfloat16(N: int, K: int) -> Contender:
    """torch's own product with a dense weight."""
    w = clones(torch.randn(N, K, device="cuda", dtype=torch.bfloat16))
    return Contender(
        "torch bfloat16", lambda x, i: x @ w[i % len(w)].t(), lambda dy, i: dy @ w[i % len(w)], w[0].nbytes
    )


def bitsandbytes_nf4(N: int, K: int) -> tuple[list[Contender], str | None]:
    """bitsandbytes' 4-bit product, or none and why it is absent."""
    try:
        from bitsandbytes import functional, matmul_4bit
    except ImportError as reason:
        return [], f"absent, so not compared: {reason}"
    data, state = functional.quantize_4bit(
        torch.randn(N, K, device="cuda", dtype=torch.bfloat16), quant_type="nf4", blocksize=64
    )
    w = clones(data)
    forward = lambda x, i: matmul_4bit(x, w[i % len(w)].t(), quant_state=state)  # noqa: E731
    backward = lambda dy, i: dy @ functional.dequantize_4bit(w[i % len(w)], state)  # noqa: E731
    return [Contender("bitsandbytes nf4", forward, backward, data.nbytes + state.absmax.nbytes)], None


def copies(packed: Packed) -> list[Packed]:
    """A weight and copies of it that exceed the last-level cache three times together."""
    parts = [clones(t, packed.nbytes) for t in packed.tensors().values()]
    return [formats.build(list(tensors), packed.spec()) for tensors in zip(*parts, strict=True)]


def clones(tensor: Tensor, nbytes: int | None = None) -> list[Tensor]:
    """A tensor and clones of it, as many as a weight of `nbytes` needs for that."""
    cache = torch.cuda.get_device_properties(tensor.device).L2_cache_size
    return [tensor, *(tensor.clone() for _ in range(-(-3 * cache // (nbytes or tensor.nbytes))))]


def random_x(T: int, K: int) -> Tensor:
    """bfloat16 activations on the GPU."""
    return torch.randn(T, K, device="cuda", dtype=torch.bfloat16)


def copy_rate() -> float:
    """GB/s, read and written, at which this GPU copies a gigabyte."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda i: target.copy_(source)}, 7, 4)["copy"] / 1e9
