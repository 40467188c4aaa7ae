"""Models of a known shape, without their weights: what a memory figure or a timing needs, and no download.

A shape is a configuration. `packed_model` builds it with random packed weights put directly in place, so that a 7B
model of 2 bits takes 2 GB to make and never 14. Its activations are finite and its speed is that of the real model,
because neither depends on which codes a weight has.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint, embeddings, experts, foreign, formats, text
from lrec.eight_bits import RUN
from lrec.formats import Packed
from lrec.formats.uniform import Uniform, check, groups
from lrec.nn import PackedLinear, replace
from lrec.registry import nearest

LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
# name -> (transformers' model type, what differs from that type's defaults)
SHAPES = {
    "llama-7b": ("llama", LLAMA2 | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    }),
    "llama-13b": ("llama", LLAMA2 | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    }),
    "llama-70b": ("llama", LLAMA2 | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    }),
    "llama3-8b": ("llama", LLAMA2 | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    }),
    "qwen3-8b": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    }),
    "smollm2-135m": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def config_of(name: str, num_layers: int | None = None):
    """The configuration of a shape, a config.json, a model directory, a data/ script's model or a Hub id, with
    `num_layers` blocks if given. Raises ValueError if it is none of these."""
    from transformers import AutoConfig

    if name in SHAPES:
        kind, settings = SHAPES[name]
        config = AutoConfig.for_model(kind, **settings)
    else:
        path = Path(name)
        try:
            path = path if path.suffix == ".json" and path.is_file() else text.model_path(name)
            checkpoint.read_json(path if path.is_file() else path / "config.json")
            config = foreign.config(path) if path.is_dir() else AutoConfig.from_pretrained(path)
        except (OSError, KeyError, ValueError) as error:
            told = f"{str(error).splitlines()[0]} (known shapes: {', '.join(SHAPES)})"
            raise ValueError(told if isinstance(error, ValueError) else nearest(name, SHAPES, "shape")) from error
    if num_layers is not None:
        if num_layers < 1:
            raise ValueError(f"num_layers = {num_layers} must be at least 1")
        config.get_text_config().num_hidden_layers = num_layers
    return config


def uniform_spec(N: int, K: int, bits: int, group_size: int) -> dict:
    """The spec of a uniform weight as `gptq` and `rtn` store it: float16 scales and zeros; a group no longer than K."""
    group_size = min(group_size or K, K)
    check(bits, group_size, K)
    G = groups(K, group_size)
    kinds = {"qweight": ["int32", [N, -(-K // 32) * bits]], "scale": ["float16", [N, G]], "zero": ["float16", [N, G]]}
    return {"format": "uniform", "bits": bits, "group_size": group_size, "shape": [N, K], "tensors": kinds}


def random_uniform(spec: dict, generator: torch.Generator) -> Packed:
    """A weight of a uniform spec with random codes and entries of mean 0 and variance 1 / K, so that a layer keeps
    its input's scale. Nothing of size N*K is made."""
    packed = formats.empty(spec, "cpu")
    assert isinstance(packed, Uniform)
    packed.qweight.view(-1).random_(-(2**31), 2**31, generator=generator)
    levels = 2**packed.bits
    packed.scale.fill_((12 / ((levels**2 - 1) * packed.shape[1])) ** 0.5)
    packed.zero.fill_((levels - 1) / 2)
    return packed


def skeleton(config, dtype: torch.dtype) -> nn.Module:
    """The causal LM of a configuration on the meta device, frozen. Raises ValueError if transformers has none."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = foreign.auto_class(config).from_config(config, dtype=dtype, trust_remote_code=foreign.trusted())
    except (KeyError, ValueError) as error:
        raise ValueError(f"transformers builds no causal LM from a {type(config).__name__}: {error}") from error
    experts.unfuse(model)
    model.tie_weights()  # the context manager has made a parameter of each use
    return model.requires_grad_(False)


def packed_model(model: nn.Module, bits: int, group_size: int, device: str | torch.device = "cpu") -> nn.Module:
    """The skeleton filled: each linear of its blocks a random uniform weight, all else random in its own dtype, block
    after block, on `device`. Raises ValueError for bits or groups that a layer cannot have.
    """
    generator = torch.Generator().manual_seed(0)
    for block in anatomy.find_blocks(model).modules:
        for name, linear in anatomy.linears(block).items():
            packed = random_uniform(uniform_spec(linear.out_features, linear.in_features, bits, group_size), generator)
            block.set_submodule(name, PackedLinear(packed.to(device), linear.bias, linear.weight.dtype))
    return fill(model, generator, device)


def table_spec(V: int, H: int, bits: int) -> dict:
    """The spec of embeddings of V rows as `lrec.embeddings` packs them: that of a run of rows, with more of them."""
    spec = embeddings.pack_rows("embeddings", torch.ones(RUN, H), bits).spec()
    runs = {RUN: V, 1: -(-V // RUN)}
    tensors = {name: [dtype, [runs[shape[0]], *shape[1:]]] for name, (dtype, shape) in spec["tensors"].items()}
    return spec | {"shape": [V, H], "tensors": tensors}


def pack_empty(model: nn.Module, config, bits: int, group_size: int, embedding_bits: int | None = None) -> None:
    """Puts an empty `PackedLinear` on the meta device for each linear of the skeleton's blocks, and packs embeddings
    and head to `embedding_bits`: as the configuration of a packed model says, else uniform. Raises ValueError for bits
    or groups that a layer cannot have."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        from lrec.integrations.transformers import install

        return install(model, quantization["layers"] if isinstance(quantization, dict) else quantization.layers)
    for block in anatomy.find_blocks(model).modules:
        for name, linear in anatomy.linears(block).items():
            spec = uniform_spec(linear.out_features, linear.in_features, bits, group_size)
            block.set_submodule(name, PackedLinear(formats.empty(spec, "meta"), linear.bias, linear.weight.dtype))
    if embedding_bits:
        embeddings.check_bits(embedding_bits)
        for name, table in embeddings.tables(model).items():
            replace(model, name, formats.empty(table_spec(*table.weight.shape, embedding_bits), "meta"))
        embeddings.tie(model)


def packed_files(model: nn.Module, config, bits: int, group_size: int, directory: Path) -> dict[str, Path]:
    """`pack_empty`, and one file of random packed weights for each block; the file of each tensor by its full name."""
    pack_empty(model, config, bits, group_size)
    generator, blocks, files = torch.Generator().manual_seed(0), anatomy.find_blocks(model), {}
    for index, block in enumerate(blocks.modules):
        tensors = {
            f"{blocks.name(index)}.{name}.{field}": tensor
            for name, layer in anatomy.linears(block).items()
            for field, tensor in random_uniform(layer.spec, generator).tensors().items()
        }
        path = directory / f"block-{index}.safetensors"
        checkpoint.write_tensors(path, tensors)
        files |= dict.fromkeys(tensors, path)
    return files


def fill(model: nn.Module, generator: torch.Generator, device: str | torch.device) -> nn.Module:
    """The same model with its meta parameters made on `device`: matrices random, norms ones, biases zeros."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta and p not in made:
                made[p] = nn.Parameter(_values(name, p, generator).to(device), requires_grad=False)
            module._parameters[name] = made.get(p, p)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.empty(like.shape, dtype=like.dtype)
    if like.ndim >= 2:
        return values.normal_(std=like.shape[-1] ** -0.5, generator=generator)
    return values.fill_(0 if name == "bias" else 1)


def linear_sides(name: str) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear in the blocks of a model, by its full name; `name` as in `config_of`."""
    blocks = anatomy.find_blocks(skeleton(config_of(name), torch.float32))
    return {
        f"{blocks.name(index)}.{inside}": (linear.out_features, linear.in_features)
        for index, block in enumerate(blocks.modules)
        for inside, linear in anatomy.linears(block).items()
    }
