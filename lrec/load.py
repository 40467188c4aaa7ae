"""A model ready to run: base and adapter from a directory, a data script's name or the Hub, checked to fit together."""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from lrec import checkpoint, foreign, processes, text, trained


def quiet() -> None:
    """Leaves the screen to lrec's own progress: other libraries say only errors."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at import what its own formats lack here
    warnings.filterwarnings("ignore", module="transformers|peft|trl|accelerate")
    warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # said by torch of every training on a CPU


def device_of(name: str = "auto") -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU; of several processes each has its own.

    Raises ValueError for a device torch does not have."""
    if name == "auto" and processes.count() > 1:
        return processes.state().device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu or auto"
        ) from error


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on the CPU, where half precision is slower, and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {name!r} is not offered; allowed: auto, float32, bfloat16, float16")
    return dtype


def tokenizer(model: str):
    """The tokenizer of a model. Raises ValueError if the directory has none."""
    from transformers import AutoTokenizer

    path = text.model_path(model)
    checkpoint.check_files(path)
    try:
        with foreign.reading(path, "a folder with a tokenizer that transformers can read"):
            found = AutoTokenizer.from_pretrained(path, trust_remote_code=foreign.trusted())
            found("A token.")  # what is damaged often shows in use alone
            return found
    except ValueError as error:
        raise ValueError(f"{path} has no tokenizer that transformers can read: {str(error).splitlines()[0]}") from error


def model(name: str, adapter: str | None = None, device: str = "auto", dtype: str = "auto") -> nn.Module:
    """The causal LM, or model of images and text, in evaluation mode, dense or packed, under a peft adapter if one is
    named.

    Raises ValueError for a missing or damaged directory, and for an adapter made for another base.
    """

    path = text.model_path(name)
    checkpoint.check_files(path)
    checkpoint.weight_files(path)
    place = device_of(device)
    config = foreign.config(path)
    with foreign.reading(path, "a model that transformers can load"):
        found = foreign.auto_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype_of(dtype, place),
            device_map={"": place},
            use_safetensors=True,
            trust_remote_code=foreign.trusted(),
        )
    if adapter is not None:
        found = with_adapter(found, adapter)
    return found.eval()


def with_adapter(base: nn.Module, adapter: str) -> nn.Module:
    """A base under what `lrec train` saved: the peft model of it, on top of the correcting adapter that it was trained
    on, if any; or the base itself where scales and zeros alone were trained.

    Raises ValueError if they were made for another base.
    """
    from peft import PeftModel

    path = adapter_path(adapter)
    stamp = checkpoint.check_stamp(path, checkpoint.packed_sha256(base))
    if not (path / "adapter_config.json").is_file():
        trained.load(base, path, stamp)
        return base
    below = checkpoint.correction_of(path)
    with foreign.reading(path, "an adapter that peft can load"):
        if below is None:
            return PeftModel.from_pretrained(base, path)
        foreign.lora_config(below)
        found = PeftModel.from_pretrained(base, below, adapter_name=checkpoint.CORRECTION)
        found.load_adapter(path, "default")
    activate(found, [checkpoint.CORRECTION, "default"], learning=None)
    return found


def adapter_path(adapter: str) -> Path:
    """The folder of what `lrec train` saved. Raises ValueError if it is none."""
    path = Path(adapter)
    if not (path / "adapter_config.json").is_file() and not (path / checkpoint.BASE_TENSORS).is_file():
        raise ValueError(
            f"{path} is not a peft adapter: it has no adapter_config.json; name the output_dir of `lrec train`"
        )
    if (path / "adapter_config.json").is_file():
        foreign.lora_config(path)
    return path


def activate(model: nn.Module, names: list[str], learning: str | None) -> None:
    """Makes adapters of a peft model active together, of which at most one is trained."""
    model.base_model.set_adapter(names)
    model.set_requires_grad([name for name in names if name != learning], requires_grad=False)
