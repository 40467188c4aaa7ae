"""Model cards: the README.md of a Hub repository, filled from what a packed model or an adapter tells of itself.

The head is in the Hub's vocabulary (https://huggingface.co/docs/hub/model-cards), so that the repository is listed
under its base and loads by the right library; the body says what was done, what was measured, and how to load it.
"""

from dataclasses import dataclass, field

UNMEASURED = "No evaluation is on record."


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a repository was made from: Hub id (or a folder), revision, and what carries over from its own card."""

    name: str
    revision: str | None = None
    carried: dict = field(default_factory=dict)  # license, license_name, license_link, language

    def link(self) -> str:
        """Its name as Markdown, with the revision."""
        at = f" at revision `{self.revision}`" if self.revision else ""
        return f"[{self.name}](https://huggingface.co/{self.name}){at}"


def packed(repo_id: str, base: Base, quantization: dict, size: int, measured: list[dict]) -> str:
    """The card of a packed model: `quantization` is its quantization_config, `size` its bytes."""
    meta, widths = quantization.get("meta", {}), sorted(widths_of(quantization))
    bits = meta.get("bits_per_weight", 0.0)
    head = front_matter(
        base, "quantized", "transformers", [*(f"{width}-bit" for width in widths), quantization.get("method")]
    )
    made = {"method": quantization.get("method"), **quantization.get("settings", {})}
    told = {key: value for key, value in meta.items() if key in ("calibration", "bits_map", "target_bpw", "versions")}
    return f"""{head}
# {repo_id.rpartition("/")[2]}

{base.link()} with its linear layers in {bits:.2f} bits per weight, quantized by
lrec with `{quantization.get("method")}`. Bits per weight count every stored byte of the packed layers.

## Quality

{evaluation_table(measured)}

## Memory

{size / 1e6:,.1f} MB of weights, on disk and in memory alike: they stay packed while the model runs. Activations and the
KV cache come on top.

## Load it

```python
import lrec  # registers the packed format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```

## Limits

- It loads with lrec installed and imported only: without, transformers warns of an unknown method and fills the layers
  with random numbers. `lrec export` writes files for other tools.
- What the base model gets wrong, this one does too; what quantization added is told above as far as it was measured.

## How it was made

{listing(made | told)}
"""


def adapter(repo_id: str, base: Base, meta: dict, config: dict, stamp: dict, size: int, measured: list[dict]) -> str:
    """The card of an adapter: `meta` is its packed base's, `config` peft's, `stamp` what `lrec train` told of it."""
    head = front_matter(base, "adapter", "peft", ["lora"])
    lora = {key: config.get(key) for key in ("r", "lora_alpha", "target_modules")}
    left_out = ("packed_sha256", "format_version", "history", "parts", "base_model", "lora_r")
    told = {key: value for key, value in stamp.items() if key not in left_out}
    itself = f", {meta['base_model']} at {meta['bits_per_weight']:.2f} bits per weight" if meta else ""
    return f"""{head}
# {repo_id.rpartition("/")[2]}

A LoRA (rank {config.get("r")}) that corrects the quantization error of {base.link()}{itself}.

## Quality

{evaluation_table(measured)}

## Memory

{size / 1e6:,.1f} MB on top of the base.

## Load it

```python
import lrec  # registers the packed format with transformers and peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base.name}")
model = PeftModel.from_pretrained(base, "{repo_id}")
```

## Limits

- It is valid on that packed base only, whose weights it names by their hash: peft refuses it on others. On the
  full-precision model it does harm.
- It was trained to say what the full-precision model says, and can be no better than that.

## How it was made

{listing(lora | told)}
"""


def front_matter(base: Base, relation: str, library: str, tags: list[str]) -> str:
    """The card's head between its marks, in YAML."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base.name,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lrec", "quantized", *filter(None, tags)],
        base_model_relation=relation,
        **base.carried,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def widths_of(quantization: dict) -> set[int]:
    """The widths of a packed model's layers, of formats that have one."""
    return {entry["spec"]["bits"] for entry in quantization.get("layers", []) if "bits" in entry["spec"]}


def evaluation_table(measured: list[dict]) -> str:
    """What was measured as a Markdown table, or that nothing was."""
    if not measured:
        return UNMEASURED
    lines = [
        "| text | tokens | perplexity | KL to full precision | top-1 agreement | bits per weight |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured:
        numbers = [row.get(key) for key in ("perplexity", "kl", "top1_agreement", "bits_per_weight")]
        cells = ["" if number is None else f"{number:.4g}" for number in numbers]
        lines.append(f"| {' | '.join([str(row['dataset']), str(row['num_tokens']), *cells])} |")
    return "\n".join(lines)


def listing(facts: dict) -> str:
    """Facts as a Markdown list; what is None is left out."""
    return "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None)
