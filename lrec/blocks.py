"""The block-by-block pass: load a block, see its inputs, quantize its linears, save it, let it go.

One block and the calibration hidden states are in memory at a time. The inputs of a block are those that the
quantized blocks before it produce, so that errors upstream are seen; linears that share an input share its statistics.
Without calibration text no block is run, and methods that need no statistics see the weights alone.
A saved block is a done block: running the same pass again in the same directory loads the finished blocks, runs them
for their outputs, and goes on, guarded by a fingerprint of model, settings and text.

Several processes divide the calibration windows among them, each keeping the hidden states of its own, and add up the
statistics of their inputs; then they divide the block's layers, and tell each other what those have become.
"""

import hashlib
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import (
    allocation,
    anatomy,
    blockwise,
    checkpoint,
    embeddings,
    end_loss,
    inputs,
    left_out,
    lora_bits,
    lowrank,
    processes,
    registry,
    sweep,
)
from lrec.assembly import Assembly
from lrec.calibration import Calibration
from lrec.formats import Packed
from lrec.nn import replace
from lrec.pass_settings import PassSettings
from lrec.progress import Progress
from lrec.quantizers import Quantizer, quantize_layer
from lrec.reconstruct import Stream
from lrec.rows import energy, layer_row, packed_row
from lrec.statistics import Statistics, matched
from lrec.stream import BlockCall, StreamedModel, advance, trim


class Pass:
    """One run of the pass: a streamed model, a quantizer, the text, and the directory that fills up."""

    def __init__(
        self,
        streamed: StreamedModel,
        quantizer: Quantizer,
        calibration: Calibration | None,
        output_dir: Path,
        settings: PassSettings | None = None,
        about: dict | None = None,
    ):
        """`about` adds to what the manifest says of the run, or takes its place.

        Raises ValueError for a model that is packed already, for a quantizer that needs calibration where there is
        none, for a rule of bits_map that fits no layer or not the method, or if the output directory holds anything
        but an unfinished run of this same pass."""
        if getattr(streamed.config, "quantization_config", None) is not None:
            raise ValueError(
                f"{streamed.directory} is already packed; quantize the full-precision model that it was made from"
            )
        self.streamed, self.quantizer, self.calibration = streamed, quantizer, calibration
        self.settings = settings or PassSettings()
        asked = [
            name
            for name in ("correct_stream", "match_upstream", "end_loss_hessian", "target_bpw", "reconstruct_epochs")
            if getattr(self.settings, name)
        ]
        if calibration is None and (quantizer.needs or asked):
            wanted = ", ".join(sorted(quantizer.needs)) or f"outputs for {' and '.join(asked)}"
            raise ValueError(
                f"{registry.name_of(type(quantizer))} needs calibration ({wanted}); name a text with --dataset"
            )
        self.settings.check(streamed)
        self.second_stage = blockwise.wanted(quantizer, self.settings)
        self.own_windows = calibration.own(self.settings.batch_size) if calibration else None
        self.about = {
            "method": registry.name_of(type(quantizer)),
            "settings": asdict(quantizer),
            "base_model": str(streamed.directory),
            "base_sha256": checkpoint.fingerprint(streamed.directory),
            "calibration": calibration.about if calibration else None,
            **(about or {}),
        }
        names = [
            f"{streamed.anatomy.name(i)}.{linear}"
            for i, block in enumerate(streamed.blocks)
            for linear in anatomy.linears(block)
        ]
        self.ruled = allocation.by_rules(self.settings.bits_map, names, quantizer) if self.settings.bits_map else {}
        self.bits = dict.fromkeys(names, quantizer.bits) | self.ruled
        self.ranks: dict[str, int] = {}  # of factors, where they are allocated
        if self.ruled:
            self.about["bits_map"] = self.settings.bits_map
        self.assembly = Assembly(output_dir, self._fingerprint(), len(streamed))
        self.routed: dict[str, dict] = {}  # what the report says of the tokens of an expert's linears
        self.token_weights: dict[str, dict[str, Tensor]] = {}  # by block and linear, where the end loss weighs tokens
        # Not in the fingerprint: the sweep serves any target, and a block that is done knows its bits.
        if self.settings.target_bpw is not None:
            self.about |= {"target_bpw": self.settings.target_bpw, "allocate_ranks": self.settings.allocate_ranks}

    def run(self) -> dict:
        """Quantizes every block not yet done; the directory then loads with `from_pretrained`. Returns the report.

        Raises ValueError that names the layer a quantizer refuses, or the block whose output is not finite.
        """
        streamed, dense = self.streamed, 0
        if self.settings.quantize_embeddings:
            self._pack_embeddings()
        if self.settings.end_loss_hessian and self.assembly.num_done < len(streamed):
            found = end_loss.token_weights(streamed, self.calibration.input_ids, self.own_windows)
            self.token_weights = {streamed.anatomy.name(index): block for index, block in enumerate(found)}
        self._allocate()
        states, calls = self._embed()
        full = [*states] if self.second_stage or self.settings.match_upstream else None
        streamed.free(None)
        width = "-".join(map(str, dict.fromkeys([min(self.bits.values()), max(self.bits.values())])))
        for index in Progress(range(len(streamed)), f"quantize, {width} bits", "block"):
            start = time.monotonic()
            block = streamed.load(index)
            anatomy.check_finite(block, streamed.anatomy.name(index))
            if index < self.assembly.num_done:
                advance(block, streamed.anatomy.name(index), full or [], calls[index])
                for name, packed in self.assembly.packed(index).items():
                    prefix = f"{streamed.anatomy.name(index)}."
                    replace(block, name.removeprefix(prefix), packed.to(streamed.device))
                factors = self.assembly.factors(index)
            else:
                rows, factors = self._quantize(block, index, states, calls[index], full)
                self.assembly.save(self._tensors(block, index), rows, factors, time.monotonic() - start)
            dense += sum(p.numel() for p in block.parameters() if p.ndim >= 2)
            if self.settings.correct_stream:
                lowrank.correct(block, streamed.anatomy.name(index), factors)
            advance(block, streamed.anatomy.name(index), states, calls[index])
            streamed.free(index)
        weights = sum(row["shape"][0] * row["shape"][1] for row in self.assembly.rows)
        share = weights / (weights + dense)
        if not self.settings.quantize_embeddings:
            self.assembly.save_rest(streamed.stored(None), [])
        stored_dtype = getattr(streamed.config, "dtype", None) or streamed.dtype
        found = {"quantized_share": share} | left_out.told(streamed.model, streamed.anatomy, weights, stored_dtype)
        return self.assembly.finish(streamed.config, self.about, streamed.directory, found)

    @torch.no_grad()
    def _pack_embeddings(self) -> None:
        """Packs embeddings and head, and saves them with what else is in no block: all blocks then see them so."""
        model = self.streamed.model
        packed = embeddings.pack(model, self.settings.quantize_embeddings)
        # The model now lacks what was packed, and with it a head stored beside the embeddings that it is tied to.
        left = model.state_dict().keys()
        tensors = {key: tensor for key, tensor in self.streamed.stored(None).items() if key in left}
        for name, (weight, _) in packed.items():
            tensors |= {f"{name}.{held}": tensor for held, tensor in weight.tensors().items()}
        rows = [
            packed_row(name, weight, weight_error=error) | {"bits": weight.bits}
            for name, (weight, error) in packed.items()
        ]
        self.assembly.save_rest(tensors, rows)

    def _allocate(self) -> None:
        """Sets every layer's bits by the target, if there is one, and ranks if they are allocated; raises ValueError if
        blocks are done with others."""
        if self.settings.target_bpw is not None:
            widths = [allocation.with_bits(self.quantizer, bits) for bits in allocation.widths(self.quantizer)]
            fixed = {layer: [allocation.with_bits(self.quantizer, bits)] for layer, bits in self.ruled.items()}
            choices = dict.fromkeys(self.bits, widths) | fixed
            table = sweep.table(self.streamed, self.assembly, choices, self.settings, self._embed, self._see)
            chosen = allocation.to_target(table, self.settings.target_bpw)
            self.bits = {layer: choice["bits"] for layer, choice in chosen.items()}
            if self.settings.allocate_ranks:
                self.ranks = {layer: choice["rank"] for layer, choice in chosen.items()}
        done = [(row["bits"], row.get("rank")) for row in self.assembly.rows]
        if done != [(self.bits[row["name"]], self.ranks.get(row["name"])) for row in self.assembly.rows]:
            raise ValueError(
                f"{self.assembly.directory} holds an unfinished run with other bits; finish that one with its "
                "target_bpw, remove it, or choose another output_dir"
            )

    def _embed(self) -> tuple[list[Tensor], list[BlockCall | None]]:
        if self.calibration is None:
            return [], [None] * len(self.streamed)
        batches = self.calibration.input_ids[self.own_windows].split(self.settings.batch_size)
        return [self.streamed.embed(ids) for ids in batches], self.streamed.block_calls(batches[0])

    @torch.no_grad()
    def _quantize(
        self, block: nn.Module, index: int, states: list[Tensor], call: BlockCall | None, full: list[Tensor] | None
    ) -> tuple[list[dict], dict]:
        """Replaces the block's linears by packed ones; a row and a pair of low-rank factors for each layer.

        `full` are the full-precision model's hidden states, where they are wanted: they are moved on behind the block.
        """
        name, linears = self.streamed.anatomy.name(index), anatomy.linears(block)
        # By linear; those of a group have one and the same, which goes with the last of them.
        seen: dict[str, Statistics | None] = dict.fromkeys(linears)
        if states:
            groups, statistics = self._see(block, name, states, call, full)
            seen = {linear: statistics[i] for i, group in enumerate(groups) for linear in group}
            del statistics
        refined, told = {}, {}
        if self.second_stage:
            packed = {n: self._pack(f"{name}.{n}", self._target(linears[n].weight, seen[n]), seen[n]) for n in seen}
            weights = end_loss.of_output(self.token_weights.get(name, {}), self.settings.batch_size)
            stream = Stream(states, full, weights, call)
            refined, told = blockwise.train(block, name, packed, stream, self.quantizer, self.settings)

        def quantize(linear: str) -> tuple[Packed, dict, tuple[Tensor, Tensor] | None]:
            trim()
            weight_NK = linears[linear].weight.float()
            return self._layer(f"{name}.{linear}", weight_NK, seen[linear], refined.pop(linear, None))

        def cost(linear: str) -> int:
            return linears[linear].weight.numel() * linears[linear].in_features  # of feeding errors back

        rows, factors = [], {}
        layers = processes.each(list(seen), quantize, cost)
        for linear, (packed, row, pair) in Progress(layers, name, "layer", inner=True, total=len(seen)):
            del linears[linear], seen[linear]
            rows.append(row | told | self.routed.get(row["name"], {}))
            if pair is not None:
                factors[f"{name}.{linear}"] = tuple(part.to(self.streamed.device) for part in pair)
            replace(block, linear, packed.to(self.streamed.device))
        return rows, factors

    def _layer(
        self, layer: str, w_NK: Tensor, seen: Statistics | None, packed: Packed | None
    ) -> tuple[Packed, dict, tuple[Tensor, Tensor] | None]:
        """A layer packed, unless it is already; its row, and its low-rank factors if they are wanted."""
        target_NK, hessian_KK = self._target(w_NK, seen), seen and seen.hessian_KK
        packed = packed or self._pack(layer, target_NK, seen)
        row = layer_row(layer, packed, w_NK - packed.unpack(), w_NK, hessian_KK) | {"bits": self.bits[layer]}
        row |= self.quantizer.measure(packed, w_NK)
        # Other processes may have other devices.
        place = "cpu" if processes.count() > 1 else self.streamed.device
        rank = self.ranks.get(layer, min(self.settings.init_rank, *packed.shape))
        if self.ranks:
            row |= {"rank": rank, "adapter_bytes": lora_bits.pair_bytes(packed.shape, rank, self.settings.lora_bits)}
        if not rank:
            return packed.to(place), row, None
        pair = lowrank.factor(target_NK - packed.unpack(), rank, hessian_KK)
        left_NK = lowrank.left_over(w_NK - packed.unpack(), pair)
        row["corrected_error"] = energy(left_NK, hessian_KK) / energy(w_NK, hessian_KK)
        return packed.to(place), row, tuple(part.to(place) for part in pair)

    def _pack(self, layer: str, w_NK: Tensor, seen: Statistics | None) -> Packed:
        return quantize_layer(layer, w_NK, allocation.with_bits(self.quantizer, self.bits[layer]), seen)

    def _target(self, w_NK: Tensor, seen: Statistics | None) -> Tensor:
        strength = self.settings.match_upstream
        return matched(w_NK.float(), seen, strength) if strength else w_NK

    def _see(
        self, block: nn.Module, name: str, states: list[Tensor], call: BlockCall, full: list[Tensor] | None = None
    ) -> tuple[list[list[str]], list[Statistics]]:
        """The groups of linears that share an input, in the order they run, and the statistics of each.

        `full`, the full-precision model's states, are moved on behind the block."""
        # Found once, by the first window: another one's might reach other experts.
        run = partial(call, block, states[0][:1])
        groups = processes.from_main(lambda: inputs.groups(block, name, run))
        needs = self.quantizer.needs | {"hessian"}
        runs = [partial(call, block, state) for state in states]
        weights = end_loss.of_groups(self.token_weights.get(name, {}), block, groups, self.settings.batch_size)
        with inputs.attending(block, runs, self.settings.min_expert_tokens) as routed:
            self.routed = {f"{name}.{linear}": told for linear, told in routed.items()}
            if full is None:
                return groups, inputs.collect(block, groups, needs, runs, weights=weights)
            cross = {"cross"} if self.settings.match_upstream else set()
            beside = [partial(advance, block, name, full, call, i) for i in range(len(full))]
            return groups, inputs.collect(block, groups, needs | cross, runs, beside, weights)

    def _tensors(self, block: nn.Module, index: int) -> dict[str, Tensor]:
        """All tensors of a block by full name; what is not packed is as the checkpoint has it, in its own dtype."""
        prefix = f"{self.streamed.anatomy.name(index)}."
        stored = {key.removeprefix(prefix): tensor for key, tensor in self.streamed.stored(index).items()}
        return {f"{prefix}{key}": stored.get(key, tensor) for key, tensor in block.state_dict().items()}

    def _fingerprint(self) -> str:
        ids = self.calibration and self.calibration.sha256()
        settings = asdict(self.settings) | {"target_bpw": None}
        parts = [self.about, settings, ids, str(self.streamed.dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
