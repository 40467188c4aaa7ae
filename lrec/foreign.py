"""Where transformers and peft read files for us: what may go wrong there, and code that is not run.

Both interpret what a directory's JSON says, and raise whatever comes of it. `reading` makes one ValueError of that,
with the directory's name. A model directory may bring code of its own; it is run only after `trust_remote_code()`.
"""

import math
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lrec import checkpoint, documents

_trusted = False
# What an interpreter of damaged settings ends in. Out of memory is told apart below.
TROUBLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
)
# Settings of peft that make it import a module or open a file that an adapter's configuration names.
ACTING = ("megatron_config", "corda_config", "eva_config", "lora_ga_config", "loftq_config", "arrow_config")
ACTING += ("alora_invocation_tokens",)  # read as token ids while the model runs


def trust_remote_code() -> None:
    """From now on code that a model directory brings is run when the model is loaded (`--trust_remote_code`)."""
    global _trusted
    _trusted = True


def trusted() -> bool:
    """Whether `trust_remote_code` was called."""
    return _trusted


class reading:  # noqa: N801  (a context manager, as contextlib's own)
    """Turns what transformers or peft raise for damaged files into a ValueError: `directory` is no `what`."""

    def __init__(self, directory: Path, what: str):
        self.directory, self.what = directory, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback) -> None:
        if kind is None or issubclass(kind, torch.OutOfMemoryError):
            return
        if issubclass(kind, ValueError) and "trust_remote_code" in str(error) and not _trusted:
            raise ValueError(
                f"{self.directory} needs Python code that comes with it, which is not run: read it, then say "
                "--trust_remote_code"
            ) from error
        # The tokenizers library raises Exception itself, or panics.
        if issubclass(kind, TROUBLE) or kind is Exception or kind.__name__ == "PanicException":
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
            raise ValueError(
                f"{self.directory} is not {self.what}: {kind.__name__}: {reason}. Its files are damaged, or of a kind "
                "that this version of the library does not know"
            ) from error


def config(directory: Path, **how):
    """A directory's configuration, as transformers reads it.

    Raises ValueError if it is damaged, declares sizes that its weights cannot have, or needs code that is not trusted.
    """
    from transformers import AutoConfig

    if "gguf_file" not in how:
        check_sizes(documents.read(directory / "config.json"), directory)
    with reading(directory, "a model that transformers can configure"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=_trusted, **how)


def auto_class(config):
    """The class of transformers that builds a model of this configuration: for images and text, else a causal LM."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def skeleton(config, directory: Path, dtype: torch.dtype | None = None):
    """The model of a configuration (see `auto_class`), without weights. Raises ValueError if transformers has none."""
    from accelerate import init_empty_weights

    with (
        reading(directory, "a causal language model that transformers can build"),
        init_empty_weights(include_buffers=False),
    ):
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=_trusted)


def check_sizes(told: dict, directory: Path) -> None:
    """Raises ValueError for a configuration with more layers than there are tensors, or wider ones than all of them
    together: building it would take hours or all memory before a weight is missed."""
    files = [path for path in directory.glob("*.safetensors") if path.is_file()]
    if not files:
        return
    num_tensors, num_bytes = 0, 0
    for path in files:
        with checkpoint.open_tensors(path) as file:
            num_tensors += len(file.keys())
        num_bytes += path.stat().st_size
    most_layers, widest = max(num_tensors, 1), max(16 * num_bytes, 2**20)
    wrong = []
    for section in [told, *(value for value in told.values() if isinstance(value, dict))]:
        for key, value in section.items():
            built = key.startswith(("num_", "n_"))
            most = most_layers if built and "layer" in key else 2**16 if built else widest
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            sized = built or key.endswith(("_size", "_dim", "_rank"))
            if number and (not math.isfinite(value) or (sized and not -1 <= value <= most)):
                wrong.append(f"{key} = {value}")
    if wrong:
        raise ValueError(
            f"{directory / 'config.json'} says {', '.join(wrong[:4])}, but the weights beside it are {num_tensors} "
            f"tensors of {num_bytes} bytes; fetch or make it again"
        )


def lora_config(directory: Path) -> documents.LoraConfig:
    """The configuration of an adapter. Raises ValueError for one that is damaged, that makes peft import modules or
    open files of its choice, or whose weights are a pickle."""
    path = directory / "adapter_config.json"
    told = documents.read(path, documents.LoraConfig)
    if acting := [key for key in ACTING if told.get(key)]:
        raise ValueError(f"{path} sets {', '.join(acting)}, which a trained adapter does not need; remove that")
    if not (directory / checkpoint.ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{directory} has no {checkpoint.ADAPTER_WEIGHTS}; pickled weights (.bin) are never read")
    for file in (path, directory / checkpoint.ADAPTER_WEIGHTS):
        documents.own_file(file)
    return told
