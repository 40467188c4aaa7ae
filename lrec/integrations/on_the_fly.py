"""Packing a full-precision checkpoint while transformers loads it, weight by weight, by a quantizer without data."""

import dataclasses
from collections.abc import Container

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import should_convert_module

from lrec import registry
from lrec.nn import PackedLinear
from lrec.quantizers import Quantizer


def quantizer_of(method: str, settings: dict) -> Quantizer:
    """The quantizer of these settings, if it can run without calibration.

    Raises ValueError for an unknown method or setting (the nearest is named), and for a method that needs calibration.
    """
    found = registry.find("quantizers", method)
    allowed = [field.name for field in dataclasses.fields(found)]
    unknown = [
        registry.nearest(key, allowed, f"setting of quantizer {method}") for key in settings if key not in allowed
    ]
    if unknown:
        raise ValueError("\n".join(unknown))
    quantizer = found(**settings)
    if quantizer.needs:
        free = [name for name, member in registry.members("quantizers").items() if not member.needs]
        raise ValueError(
            f"quantizer {method!r} needs calibration ({', '.join(sorted(quantizer.needs))}), which from_pretrained "
            f"cannot give; on the fly: {', '.join(free)}. Run `lrec quantize --method {method}` and load its output."
        )
    return quantizer


def plan(model: nn.Module, quantizer: Quantizer, skip: list[str]) -> dict[str, float]:
    """Full names of the weights to pack on the fly -> bytes per weight, found by packing 32 rows of each width.

    Raises ValueError naming the layers that the quantizer refuses, or if there is nothing to pack.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and should_convert_module(n, skip)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layer to pack; left out are: {', '.join(skip)}")
    sizes: dict[int, float] = {}
    problems: list[str] = []
    # transformers builds the model under torch.device("meta"), which tensors made here must not follow.
    with torch.device("cpu"):
        for K in {linear.in_features for linear in linears.values()}:
            try:
                sizes[K] = quantizer(torch.ones(32, K)).bits_per_weight / 8
            except ValueError as error:
                names = [name for name, linear in linears.items() if linear.in_features == K]
                problems.append(f"{names[0]} (and {len(names) - 1} more with {K} columns): {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return {f"{name}.weight": sizes[linear.in_features] for name, linear in linears.items()}


class PackWeight(ConversionOps):
    """Packs a weight that has just been read and puts a `PackedLinear` in its layer's place.

    `targets` holds the full names of the weights to pack. A layer that cannot be packed goes into `refused` with the
    reason, because transformers would swallow an exception raised here.
    """

    def __init__(self, quantizer: Quantizer, targets: Container[str], refused: dict[str, str]):
        self.quantizer = quantizer
        self.targets = targets
        self.refused = refused

    @torch.no_grad()
    def convert(self, input_dict: dict, model=None, missing_keys=None, **kwargs) -> dict:
        """What of `input_dict` (full name -> tensor) is not to be packed; the rest is in the model already."""
        rest = {}
        for key, value in input_dict.items():
            if key not in self.targets:
                rest[key] = value
                continue
            name = key.removesuffix(".weight")
            missing_keys.discard(key)
            try:
                self._replace(model, name, value[0] if isinstance(value, list) else value)
            except ValueError as error:
                self.refused[name] = str(error)
        return rest

    def _replace(self, model, name: str, w_NK: torch.Tensor) -> None:
        linear = model.get_submodule(name)
        if w_NK.shape != linear.weight.shape:
            raise ValueError(f"the checkpoint has {tuple(w_NK.shape)}, the model {tuple(linear.weight.shape)}")
        layer = PackedLinear(self.quantizer(w_NK), dtype=linear.weight.dtype)
        # The same parameter, not a new one: a bias read before its weight bears transformers' mark of what was loaded,
        # as the buffers must, or else both are initialised anew.
        layer.bias = linear.bias
        for buffer in layer.buffers():
            buffer._is_hf_initialized = True
        model.set_submodule(name, layer)
