"""LoRA on packed layers, by peft.

peft takes a `PackedLinear` for the `nn.Linear` it is, and is right about everything but one thing: it would merge an
adapter by adding to `weight`, which here is a copy that nobody keeps. So peft is taught, when it is imported, to put
`LoraPackedLinear` there instead. Its forward pass, y = base(x) + scaling * B A dropout(x), is `lrec.lora`'s for a
plain adapter, which keeps x itself and A x for backward. Others below it that are plain, as a frozen correction is
under the adapter of a task, are added to that, and keep nothing if they are frozen. Files of int8 codes are decoded
when they are loaded (`lrec.lora_bits`). All else is peft's own.
"""

import functools

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrec import lora_bits
from lrec.lora import add_low_rank, lora_linear
from lrec.nn import PackedLinear, packed_modules

# Initialisations that leave the base weight alone; peft's others subtract the adapter from it.
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class LoraPackedLinear(LoraLinear):
    """peft's LoRA layer around a `PackedLinear`, whose weight it never writes.

    With DoRA each forward decodes the weight once for its norm, and keeps it for backward if there is dropout too.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base's output and the active adapters' added to it; see the head of this file."""
        names = [] if args or kwargs else self._plain_adapters()
        if not names:
            return super().forward(x, *args, **kwargs)
        *below, name = names
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a_RK, b_NR = self.lora_A[name].weight, self.lora_B[name].weight
        y = lora_linear(x, self.base_layer, a_RK, b_NR, self.scaling[name], p)
        for other in below:
            a_RK, b_NR = self.lora_A[other].weight, self.lora_B[other].weight
            y = add_low_rank(y, self.lora_dropout[other](x), a_RK, b_NR, self.scaling[other])
        return y

    def _plain_adapters(self) -> list[str]:
        """The active adapters if each is nothing but its two matrices and a dropout; else none."""
        if self.disable_adapters or self.merged or type(self.base_layer) is not PackedLinear:
            return []
        names = [name for name in self.active_adapters if name in self.lora_A]
        parts = [part[name] for name in names for part in (self.lora_A, self.lora_B, self.lora_dropout)]
        plain = not any(name in self.lora_variant or self.lora_B[name].bias is not None for name in names)
        plain = plain and all(isinstance(self.lora_dropout[name], nn.Dropout | nn.Identity) for name in names)
        # Whoever hooks into a part of the adapter expects that part to be called.
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        hooked = hooked or any(part._backward_hooks or part._backward_pre_hooks for part in (*parts, self.base_layer))
        return names if plain and not hooked else []

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        """Adds an adapter. Raises ValueError for an `init_lora_weights` that rewrites the base weight."""
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} subtracts the adapter from the base weight, but that "
                f"is packed and stays as it is; allowed: {', '.join(map(repr, INITS))}. To start from what quantizing "
                "lost, keep True and copy factors from lrec.lowrank into the adapter."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError while the base is packed: adding to it would mean quantizing again, and losing the gain."""
        base = self.get_base_layer()
        if isinstance(base, PackedLinear):
            raise ValueError(
                f"an adapter cannot be merged into a packed weight ({base.extra_repr()}) without quantizing it again; "
                "call merge_and_unload() for a dense model (`lrec export --format merged`), or keep base and adapter "
                "apart and save the adapter alone (`lrec export --format adapter`)"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """For peft's `unload`, the packed layer; for `merge_and_unload`, W + sum of scaling B A as a dense `nn.Linear`.

        The sum is taken in float32 and rounded once, to the packed layer's `dtype`.
        """
        base = self.get_base_layer()
        if not merge:
            return base
        self.base_layer = base.to_dense(torch.float32)
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        merged, self.base_layer = self.base_layer, base
        return merged.to(base.dtype)

    # For both of these peft would ask `weight`, and so decode it.

    def _get_in_out_features(self, module):
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer):
        if isinstance(base_layer, PackedLinear):
            return base_layer.qweight.device, base_layer.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)


def prepare_model_for_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict | None = None
) -> nn.Module:
    """The same model, frozen and ready for adapters; call it before or after `get_peft_model`.

    Takes the place of peft's `prepare_model_for_kbit_training`, which would cast embeddings and head to float32 and
    leave gradient checkpointing off. Nothing is cast here. Checkpointing defaults to `use_reentrant=False`. DDP will
    not broadcast the packed weights at every forward, as it does other buffers.

    Raises ValueError for packed weights that accelerate brings in for the forward pass alone.
    """
    # A skeleton has no tensors either, but nothing that would bring them in.
    packed = packed_modules(model).items()
    away = [name for name, module in packed if module.qweight.is_meta and hasattr(module, "_hf_hook")]
    if away:
        raise ValueError(
            f"{len(away)} packed layers, such as {away[0]}, are offloaded with offload_buffers=True: they are there in "
            "forward but not in backward. To train, leave it out, or use `lrec train --stream_weights true`"
        )
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        model.requires_grad_(False)
    if use_gradient_checkpointing:
        # This also lets the embeddings' output require gradients, without which a reentrant checkpoint passes none on.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
    buffers = [
        f"{place}.{key}"
        for name, module in packed_modules(model).items()
        # The names that DDP will know them by if adapters come later.
        for place in (name, f"{name}.base_layer", f"base_model.model.{name}", f"base_model.model.{name}.base_layer")
        for key in module.spec["tensors"]
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    return model


def register() -> None:
    """Teaches peft about packed layers. Calling it again changes nothing."""
    if hasattr(LoraModel._create_new_module, "by_lrec"):
        return
    create, check = LoraModel._create_new_module, BaseTuner._check_merge_allowed
    remap = LoraModel._remap_adapter_state_dict_for_load.__func__

    @functools.wraps(create)
    def create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, PackedLinear):
            return create(lora_config, adapter_name, target, **kwargs)
        if kwargs.pop("parameter_name", None) is not None:
            raise ValueError("target_parameters cannot name the weight of a packed layer; use target_modules instead")
        if lora_config.fan_in_fan_out:
            raise ValueError(
                "fan_in_fan_out=True is for transposed weights, but packed ones are (out, in); set it to False"
            )
        return LoraPackedLinear(target, adapter_name, config=lora_config, **kwargs)

    @functools.wraps(check)
    def check_merge_allowed(self):
        lost = [
            f"{name} ({type(module).__name__})"
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraPackedLinear)
            if isinstance(module.get_base_layer(), PackedLinear)
        ]
        if lost:
            raise ValueError(
                f"only LoRA can be merged on packed layers, but here are {', '.join(lost[:3])} and "
                f"{max(len(lost) - 3, 0)} more. Call dequantize() of the base model first, or keep the adapter apart."
            )
        check(self)

    @functools.wraps(remap)
    def remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        return remap(cls, model, config, adapter_name, lora_bits.decode(state_dict))

    create_new_module.by_lrec = True
    LoraModel._create_new_module = staticmethod(create_new_module)
    LoraModel._remap_adapter_state_dict_for_load = classmethod(remap_adapter_state_dict_for_load)
    BaseTuner._check_merge_allowed = check_merge_allowed


register()
