"""lrec as a quantization method of transformers.

The `quantization_config` of a packed checkpoint lists every distinct spec once, with the names of the modules that
have it. That is all loading needs: each named `nn.Linear` of the empty model becomes a `PackedLinear` of empty buffers
(an `nn.Embedding` a `PackedEmbedding`, and a head tied to it a `TiedLinear`, which has none), and the ordinary loader
fills them, as stored. Mixed precision and new formats need no code here.

On the fly, the config holds a quantizer's settings instead. Each weight is packed as it comes off the disk, and
the model's config then becomes that of a packed checkpoint, so that saving and loading need not know.
"""

import copy
import dataclasses
import math
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import __version__ as transformers_version
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import lrec
from lrec import anatomy, checkpoint, documents, embeddings, experts, formats
from lrec.integrations.on_the_fly import PackWeight, plan, quantizer_of
from lrec.nn import PackedModule, packed_modules, replace

FORMAT_VERSION = 1
WHERE = "the quantization_config of lrec in config.json"


class LrecQuantConfig(QuantizationConfigMixin):
    """What `config.json` says about a packed model, or how to pack a full-precision one while it loads.

    Packed: `layers` is a list of `{"spec": Packed.spec(), "modules": [names]}`; `method` and `settings` tell how it was
    made, `meta` from what. Unknown keys are kept and ignored: a later lrec wrote them.

    On the fly: no `layers`; keywords are settings of the quantizer `method`, as in
    `from_pretrained(model, quantization_config=LrecQuantConfig(method="rtn", bits=3, group_size=64))`. Output and
    tied embeddings stay as they are, and so does every module that `modules_to_not_convert` names.

    Raises ValueError for a `format_version` of a later lrec, and on the fly for an unknown method or setting, or a
    method that needs calibration.
    """

    def __init__(
        self,
        method: str = "rtn",
        layers: list[dict] | None = None,
        settings: dict | None = None,
        meta: dict | None = None,
        modules_to_not_convert: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        **others,
    ):
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"the model is packed in lrec format {format_version}, but lrec {lrec.__version__} reads formats up to "
                f"{FORMAT_VERSION}; upgrade lrec"
            )
        others.pop("quant_method", None)
        documents.check({"layers": layers, "settings": settings, "meta": meta}, documents.PackedConfig, WHERE)
        self.quant_method = "lrec"
        self.format_version = format_version
        self.method = method
        self.layers = layers
        self.meta = meta or {}
        self.modules_to_not_convert = modules_to_not_convert
        if layers is None:
            self.settings = dataclasses.asdict(quantizer_of(method, (settings or {}) | others))
        else:
            self.settings = settings or {}
            self.__dict__.update(others)

    def to_dict(self) -> dict:
        """As `config.json` has it; what is None is left out."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


class LrecHfQuantizer(HfQuantizer):
    """Loads, packs on the fly, saves and dequantizes models for transformers."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = False  # until lrec.trained makes parameters of scales or zeros
    is_compileable = True

    def __init__(self, quantization_config: LrecQuantConfig, **kwargs):
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        # Full names of the weights to pack on the fly -> their bytes per weight when packed.
        self.targets: dict[str, float] = {}
        # What went wrong with which layer; transformers would swallow an exception raised while it loads.
        self.refused: dict[str, str] = {}

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def validate_environment(self, *args, **kwargs) -> None:
        """Raises ValueError if the config is of the other kind than the checkpoint."""
        layers = self.quantization_config.layers
        if self.pre_quantized and not layers:
            raise ValueError("quantization_config in config.json names no packed `layers`; quantize the model again")
        if layers and not self.pre_quantized:
            raise ValueError(
                "LrecQuantConfig with `layers` describes a packed checkpoint, but this one is in full precision; "
                "give `method` and its settings instead"
            )

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        """Whether this weight is packed as it is loaded."""
        return param_name in self.targets

    def param_element_size(self, model, param_name: str, param) -> float:
        """Bytes per element once loaded, for `device_map`; packed buffers count as they are."""
        return self.targets.get(param_name, param.element_size())

    def get_quantize_ops(self) -> PackWeight:
        """The step that packs one weight."""
        return PackWeight(self._quantizer(), self.targets, self.refused)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not self.pre_quantized:
            config = self.quantization_config
            skip = self.get_modules_to_not_convert(
                model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
            )
            self.targets = plan(model, self._quantizer(), skip)
            return
        if checkpoint_files:
            checkpoint.verify(Path(checkpoint_files[0]).parent)
        install(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(self, model, **kwargs):
        layers = packed_modules(model)
        if self.pre_quantized:
            check_loaded(model, layers)
            return
        absent = [name for name in self.targets if name.removesuffix(".weight") not in {*layers, *self.refused}]
        problems = [f"{name}: the checkpoint has no such tensor" for name in absent]
        problems += [f"{name}: {reason}" for name, reason in self.refused.items()]
        if problems:
            raise ValueError(f"{len(problems)} layers could not be packed:\n" + "\n".join(problems))
        versions = {"lrec": lrec.__version__, "torch": torch.__version__, "transformers": transformers_version}
        origin = {
            "base_model": model.config._name_or_path,
            "base_revision": getattr(model.config, "_commit_hash", None),
        }
        packed = sum(layer.in_features * layer.out_features for layer in layers.values())
        share = packed / (packed + sum(p.numel() for p in model.parameters() if p.ndim > 1))
        if share < 0.5:
            warnings.warn(
                f"only {share:.0%} of the weights are packed; embeddings, output and what is not an nn.Linear (fused "
                "experts, say) stay as they are",
                stacklevel=2,
            )
        measured = {"bits_per_weight": bits_per_weight(layers), "quantized_share": share}
        self.quantization_config.meta = origin | {"versions": versions} | measured
        self.quantization_config.layers = group_by_spec({name: layer.spec for name, layer in layers.items()})

    def get_state_dict_and_metadata(self, model):
        """What `save_pretrained` is to write: all of it. First brings the config in line with the model's layers.

        Raises ValueError while adapters are attached by peft, under whose names nothing could be loaded.
        """
        layers = packed_modules(model)
        if any(layer.visit is not None for layer in layers.values()):
            raise ValueError("this model's packed weights are streamed from files, which hold them already; copy those")
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        if any(name.endswith(".base_layer") for name in layers):
            raise ValueError(
                "this base model carries peft adapters; save them by `save_pretrained` of the peft model, or call its "
                "`unload()` or `merge_and_unload()` first and save what that returns"
            )
        held, specs = self.quantization_config, {name: layer.spec for name, layer in layers.items()}
        experts.fuse(model)  # those that were merged into dense ones
        if not layers:
            self.remove_quantization_config(model)
        elif {name: group["spec"] for group in held.layers for name in group["modules"]} != specs:
            # Some layers were replaced, so that the identity of the packed weights no longer holds either.
            held.meta = {key: value for key, value in held.meta.items() if key != "packed_sha256"}
            held.meta["bits_per_weight"] = bits_per_weight(layers)
            held.layers = group_by_spec(specs)
        return None, {}

    def _quantizer(self):
        return quantizer_of(self.quantization_config.method, self.quantization_config.settings)

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name once the model has been saved
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        for name, layer in layers.items():
            model.set_submodule(name, layer.to_dense(dtype))
        experts.fuse(model)
        embeddings.untie(model)
        # Buffers keep their dtype: rotary frequencies are float32 in every model.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model


def group_by_spec(specs: dict[str, dict]) -> list[dict]:
    """`layers` of a config, from each module's spec: the distinct specs with the names of their modules, in order."""
    groups: dict[str, dict] = {}
    for name, spec in specs.items():
        groups.setdefault(formats.spec_key(spec), {"spec": spec, "modules": []})["modules"].append(name)
    return list(groups.values())


def bits_per_weight(layers: dict[str, PackedModule]) -> float:
    """Stored bits of the packed layers inside blocks over their number of weights."""
    inside = [layer.packed for name, layer in layers.items() if anatomy.in_block(name)]
    return 8 * sum(packed.nbytes for packed in inside) / max(sum(math.prod(packed.shape) for packed in inside), 1)


def install(model: nn.Module, layers: list[dict]) -> None:
    """Puts an empty packed layer in the place of every module that `layers` names, and ties what is tied to it.

    Raises ValueError naming each one that the model lacks, or that is no linear layer or embedding of the packed shape.
    """
    prefix = f"{model.base_model_prefix}."
    # A checkpoint of a model with a head also loads into the model without, and the other way round.
    names = [name for group in layers for name in group["modules"]]
    spellings = {name: (name, name.removeprefix(prefix), prefix + name) for name in names}
    experts.unfuse(model, (spelling for own in spellings.values() for spelling in own))
    modules = dict(model.named_modules())
    problems = []
    for group in layers:
        spec = group["spec"]
        formats.check_spec(spec)
        for name in group["modules"]:
            own = next((spelling for spelling in spellings[name] if spelling in modules), None)
            module = modules.get(own)
            if module is None:
                is_head = model.base_model is model and "." not in name
                problems += [] if is_head else [f"{name}: {type(model).__name__} has no such module"]
            elif not isinstance(module, (nn.Linear, nn.Embedding)):
                problems.append(f"{name}: is a {type(module).__name__}, not a linear layer or an embedding")
            elif list(module.weight.shape) != spec["shape"]:
                problems.append(f"{name}: packed as {spec['shape']}, but the model's is {list(module.weight.shape)}")
            else:
                layer = replace(model, own, formats.empty(spec, "meta"))
                # Otherwise transformers decodes every layer to draw a random weight for it, in vain.
                layer._is_hf_initialized = True
    if problems:
        raise ValueError(
            f"quantization_config does not fit the model in {len(problems)} places; config.json was altered or belongs "
            "to another model:\n" + "\n".join(problems)
        )
    embeddings.tie(model)


def check_loaded(model: nn.Module, layers: dict[str, PackedModule]) -> None:
    """Raises ValueError naming every tensor of a packed layer that the checkpoint did not have."""
    for layer in layers.values():
        for name, (dtype, _) in layer.spec["tensors"].items():
            # Models that keep some modules in float32 have widened their scales, which loses nothing.
            layer._buffers[name] = _restore(layer._buffers[name], getattr(torch, dtype))
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return  # accelerate has moved the tensors, and with that dropped transformers' mark of what was loaded
    tensors = {
        f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict(keep_vars=True).items()
    }
    missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors that config.json names:\n" + "\n".join(missing))
    wrong = [f"{name}: {fault}" for name, layer in layers.items() if (fault := _odd_values(layer))]
    if wrong:
        raise ValueError(f"{len(wrong)} packed layers are damaged:\n" + "\n".join(wrong))


def _odd_values(layer: PackedModule) -> str | None:
    """What of a layer's stored numbers points outside of its weight."""
    try:
        layer.packed.check_values()
    except ValueError as error:
        return str(error)
    return None


def _restore(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    restored = tensor.to(dtype)
    if hasattr(tensor, "_is_hf_initialized"):
        restored._is_hf_initialized = True
    return restored


def register() -> None:
    """Makes `quant_method: "lrec"` known to transformers. Calling it again changes nothing."""
    if "lrec" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config("lrec")(LrecQuantConfig)
        auto.register_quantizer("lrec")(LrecHfQuantizer)


register()
