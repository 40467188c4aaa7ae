"""The card of an export: what the files are, and how each tool they are for loads them."""

from dataclasses import dataclass

from lrec import card

TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```"""
VLLM = """```sh
vllm serve {repo_id}
```"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a format is to the Hub and to a reader; `load` and `limit` are Markdown."""

    what: str
    library: str
    relation: str  # to the base, in the Hub's vocabulary
    tags: tuple[str, ...]
    load: str
    limit: str


KINDS = {
    "merged": Kind(
        what="a dense bfloat16 model: the packed weights decoded{correction}",
        library="transformers",
        relation="finetune",  # the Hub's word for weights of the base's own size
        tags=(),
        load=f"{TRANSFORMERS}\n\n{VLLM}",
        limit="It takes as much memory as the full-precision model; the packed model it was made of takes less.",
    ),
    "gptq": Kind(
        what="packed integers in GPTQ's fields, no column reordered",
        library="transformers",
        relation="quantized",
        tags=("gptq",),
        load=f"After `pip install optimum gptqmodel`:\n\n{TRANSFORMERS}\n\n{VLLM}",
        limit="vLLM was not tried by lrec. It reads the `gptq` fields in 2, 3, 4 and 8 bits, not all on every GPU.",
    ),
    "compressed_tensors": Kind(
        what="packed integers in compressed-tensors' pack-quantized layout",
        library="transformers",
        relation="quantized",
        tags=("compressed-tensors",),
        load=f"After `pip install compressed-tensors`:\n\n{TRANSFORMERS}\n\n{VLLM}",
        limit="vLLM was not tried by lrec. It has kernels for this layout in 4 and 8 bits alone.",
    ),
    "gguf": Kind(
        what="a GGUF file with its tokenizer",
        library="gguf",
        relation="quantized",
        tags=("gguf",),
        load="""llama.cpp:

```sh
llama-cli --hf-repo {repo_id} --hf-file model.gguf
```

llama-cpp-python:

```python
from llama_cpp import Llama

model = Llama.from_pretrained("{repo_id}", filename="model.gguf")
```""",
        limit="llama.cpp rounds activations to 8 bits, so that its numbers are not quite those above.",
    ),
}


def exported(repo_id: str, base: card.Base, told: dict, size: int, measured: list[dict]) -> str:
    """The card: `told` is the export's lrec_export.json, `size` the bytes of its weights."""
    kind, meta, rank = KINDS[told["format"]], told["meta"], told["export"].get("folded_rank")
    widths = [f"{width}-bit" for width in told["bits"]]
    head = card.front_matter(base, kind.relation, kind.library, [*kind.tags, *widths, told["method"]])
    what = kind.what.format(correction=f", plus a LoRA of rank {rank} that corrects them" if rank else "")
    bits = meta.get("bits_per_weight", 0.0)
    made = {"method": told["method"], **(told["settings"] or {}), **told["export"], "lrec": told["lrec"]}
    return f"""{head}
# {repo_id.rpartition("/")[2]}

{base.link()}, its linear layers quantized to {bits:.2f} bits per weight by lrec with `{told["method"]}`, as {what}.

## Quality

{card.evaluation_table(measured)}

Measured by lrec on the model that was exported.

## Memory

{size / 1e6:,.1f} MB of weights on disk. Activations and the KV cache come on top.

## Load it

{kind.load.format(repo_id=repo_id)}

## Limits

- {kind.limit}
- What the base model gets wrong, this one does too; what quantization added is told above as far as it was measured.

## How it was made

{card.listing(made)}
"""
