"""lrec: quantize a language model to 2-4 bits, win the loss back with a KL-trained LoRA, export the result.

`import lrec` is cheap and touches no GPU: public names load at first use, and lrec registers itself with transformers
and peft when those are imported, before or after it. From then on their `from_pretrained`, `get_peft_model` and
`load_adapter` know packed models.
"""

import importlib

from lrec import integrations

__version__ = "0.1.0"

# Public name -> the module that defines it.
PUBLIC = {
    "LrecConfig": "lrec.trainer",
    "LrecQuantConfig": "lrec.integrations.transformers",
    "LrecTrainer": "lrec.trainer",
    "PackedLinear": "lrec.nn",
    "prepare_model_for_training": "lrec.integrations.peft",
}

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module 'lrec' has no attribute {name!r}; public names: {', '.join(PUBLIC)}")
    value = getattr(importlib.import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


integrations.arrange()
