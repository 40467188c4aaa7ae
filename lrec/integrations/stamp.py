"""An adapter that corrects one packed model is refused on another, whoever loads it: peft or transformers; the scales
and zeros that were trained with it come along; and one that was trained on top of a correcting adapter is refused where
that one is not loaded.

Both have a `load_adapter`; each is wrapped once its library has been imported.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from lrec import checkpoint, lora_bits, trained
from lrec.nn import PackedLinear

LOADERS = {"peft.peft_model": "PeftModel", "transformers.integrations.peft": "PeftAdapterMixin"}


def checked(load: Callable) -> Callable:
    """A `load_adapter` that raises ValueError for an adapter stamped for other packed weights than the model's, and
    puts the adapter's trained scales and zeros into the base.

    A folder is looked at before it is loaded; of the Hub's files, the one that was fetched, after.
    """

    @functools.wraps(load)
    def load_adapter(self, source=None, *args, **kwargs):
        packed = any(isinstance(module, PackedLinear) for module in self.modules())
        if not packed or not isinstance(source, (str, os.PathLike)):
            return load(self, source, *args, **kwargs)
        if Path(source).is_dir():
            check(self, Path(source))
            return load(self, source, *args, **kwargs)
        loaded = load(self, source, *args, **kwargs)
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        revision = kwargs.get("revision")
        fetched = try_to_load_from_cache(source, "adapter_model.safetensors", revision=revision)
        if isinstance(fetched, str):
            stamp = checkpoint.read_stamp(Path(fetched).parent)
            if "base_tensors_sha256" in stamp:
                hf_hub_download(source, checkpoint.BASE_TENSORS, revision=revision)
            check(self, Path(fetched).parent)
        return loaded

    load_adapter.by_lrec = True
    return load_adapter


def check(model: nn.Module, directory: Path) -> None:
    """Raises ValueError for an adapter that does not belong on this model; remembers one that does, and puts its
    trained scales and zeros into the base."""
    weights = directory / checkpoint.ADAPTER_WEIGHTS
    stamp = checkpoint.check_stamp(directory, checkpoint.packed_sha256(model))
    if not hasattr(model, "get_base_model") and weights.exists() and lora_bits.holds_codes(weights):
        raise ValueError(
            f"{directory} holds int8 factors, which transformers' load_adapter does not decode: load it by peft "
            "(PeftModel.from_pretrained), or make it plain (lrec export --format adapter)"
        )
    loaded = model.__dict__.setdefault("_lrec_adapters", set())
    checkpoint.check_correction(directory, stamp, loaded)
    trained.load(model, directory, stamp)
    if weights.exists():
        loaded.add(checkpoint.adapter_hash(directory))


def register() -> None:
    """Wraps those of the two that have been imported. Calling it again changes nothing."""
    for module, name in LOADERS.items():
        owner = getattr(sys.modules.get(module), name, None)
        if owner is not None and not hasattr(owner.load_adapter, "by_lrec"):
            owner.load_adapter = checked(owner.load_adapter)


register()
