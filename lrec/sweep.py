"""What each width of each layer costs and saves, measured one block of the full-precision model at a time.

The error of a layer at a width is what packing that layer alone does to the output of its block, residual connections
included: the mean over tokens of ||f(x) - f_q(x)||^2 / ||f(x)||^2. All layers' errors are then noise in the same
stream relative to its power, so they add up across layers; the layer's own relative output error does not, since
a small output may hardly matter to the stream and a large one much.

Measured with every other block of SmolLM2-135M packed by gptq in 2 to 4 bits, 2.78 on average (KL on 1024 held-out
tokens, 2-core CPU machine, 2026-11): 1.33 allocated by this error, 2.16 by the layer's relative output error, 2.54 by
its absolute one, 2.37 by the block's error relative to what the block adds to the stream.

Under closed-form factors the error is not measured again: it falls with the layer's own output error, whose share that
factors of a rank leave is known from one spectrum a width (`lowrank.left_by_rank`).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrec import anatomy, lora_bits, lowrank, processes
from lrec.assembly import Assembly
from lrec.pass_settings import PassSettings
from lrec.progress import Progress
from lrec.quantizers import Quantizer, quantize_layer
from lrec.statistics import Statistics
from lrec.stream import BlockCall, StreamedModel, advance

# Windows of calibration text that a block is run on, once for every layer and width.
WINDOWS = 4


@torch.no_grad()
def table(
    streamed: StreamedModel,
    assembly: Assembly,
    choices: dict[str, list[Quantizer]],
    settings: PassSettings,
    embed: Callable,
    see: Callable,
) -> list[dict]:
    """The table that `allocation.to_target` takes, of every layer under its `choices` and the ranks of `settings`.

    `embed()` gives the states that enter the first block and the blocks' calls, `see(block, name, states, call)` the
    groups of linears that share an input and the statistics of each. Measured blocks are noted in the unfinished run,
    so that going on does not measure them again.
    """
    done = len(assembly.sweep)
    states, calls = embed() if done < len(streamed) else ([], [])
    for index in Progress(range(len(calls)), "measure widths", "block"):
        start, name = time.monotonic(), streamed.anatomy.name(index)
        block = streamed.load(index)
        if index >= done:
            anatomy.check_finite(block, name)
            probe = Probe(block, name, calls[index], states, settings)
            jobs = [
                (linear, choices[f"{name}.{linear}"], statistics)
                for group, statistics in zip(*see(block, name, states, calls[index]), strict=True)
                for linear in group
            ]
            measured = processes.each(jobs, probe.measure, probe.cost)
            rows = [row for _, row in Progress(measured, name, "layer", inner=True, total=len(jobs))]
            assembly.keep_sweep(rows, time.monotonic() - start)
        advance(block, name, states, calls[index])
        streamed.free(index)
    return [row for rows in assembly.sweep for row in rows]


class Probe:
    """A block in full precision and a few windows of calibration text, on which it is run with one layer packed."""

    def __init__(self, block: nn.Module, name: str, call: BlockCall, states: list[Tensor], settings: PassSettings):
        """`name` is the block's; of its input `states`, batches (B, L, H), the first WINDOWS windows are taken, among
        those of all processes."""
        self.block, self.name, self.call, self.settings = block, name, call, settings
        self.input_BLH = processes.together(torch.cat(states[:WINDOWS])[:WINDOWS])[:WINDOWS]
        self.exact_BLH = call(block, self.input_BLH)

    def cost(self, job: tuple[str, list[Quantizer], Statistics]) -> int:
        """What `measure(job)` takes, relative to other layers of the block."""
        linear, quantizers, _ = job
        weight_NK = self.block.get_submodule(linear).weight
        return len(quantizers) * weight_NK.numel() * weight_NK.shape[1]

    def measure(self, job: tuple[str, list[Quantizer], Statistics]) -> dict:
        """The row of a (linear, quantizers, statistics) in the table of `allocation.to_target`: bytes and error under
        each of the quantizers, with adapters of each rank."""
        linear, quantizers, statistics = job
        module, layer, choices = self.block.get_submodule(linear), f"{self.name}.{linear}", []
        exact_NK = module.weight.data
        for quantizer in quantizers:
            packed = quantize_layer(layer, exact_NK.float(), quantizer, statistics)
            module.weight.data = packed.unpack().to(exact_NK)
            error = relative_error(self.call(self.block, self.input_BLH), self.exact_BLH)
            choice = {"bits": quantizer.bits, "bytes": packed.nbytes, "error": error}
            residual_NK = exact_NK.float() - packed.unpack()
            choices += self.with_adapters(choice, residual_NK, statistics.hessian_KK)
        module.weight.data = exact_NK
        return {"name": layer, "weights": exact_NK.numel(), "choices": choices}

    def with_adapters(self, choice: dict, residual_NK: Tensor, hessian_KK: Tensor) -> list[dict]:
        """A choice beside those of the same width with closed-form adapters of each rank."""
        ranks = self.settings.ranks()
        left = lowrank.left_by_rank(residual_NK, hessian_KK).tolist() if ranks != [0] else [1.0]
        return [
            {
                "bits": choice["bits"],
                "rank": rank,
                "bytes": choice["bytes"] + lora_bits.pair_bytes(residual_NK.shape, rank, self.settings.lora_bits),
                "error": choice["error"] * left[rank],
            }
            for rank in ranks
        ]


def relative_error(out_BLH: Tensor, exact_BLH: Tensor) -> float:
    """Mean over tokens of ||out - exact||^2 / ||exact||^2."""
    power_BL = exact_BLH.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((out_BLH.float() - exact_BLH.float()).square().sum(-1) / power_BL).mean())
