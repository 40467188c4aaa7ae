"""What llama.cpp calls the tensors and settings of a model, for the architectures whose conversion is plain renaming.

In files of architecture `llama` the rows of each head of q and k stand so that the two coordinates a rotation turns
are neighbours; in transformers they are half a head apart. `row_order` is that permutation.
"""

import importlib.util

import torch
from torch import Tensor

# transformers' class -> llama.cpp's architecture, and whether rows of q and k change places.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}


class Names:
    """The names of a model's tensors in its GGUF file, and the order of their rows there."""

    def __init__(self, class_name: str, config):
        """Raises ValueError for an architecture whose conversion is not known here, or a rotation llama.cpp lacks."""
        if importlib.util.find_spec("gguf") is None:
            raise ValueError("writing GGUF needs the gguf package, which is not installed: pip install 'lrec[gguf]'")
        import gguf

        if class_name not in ARCHITECTURES:
            raise ValueError(
                f"gguf knows {', '.join(ARCHITECTURES)}, not {class_name}; nearest that can: --format merged, then "
                "llama.cpp's convert_hf_to_gguf.py"
            )
        self.architecture, self.permuted = ARCHITECTURES[class_name]
        self.config = config
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self.map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def name(self, key: str) -> str:
        """The tensor's name in the file. Raises ValueError if llama.cpp's architecture has none."""
        found = self.map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's {self.architecture} has no tensor for {key}; use --format merged")
        return found

    def row_order(self, key: str) -> Tensor | None:
        """Which row of ours stands at each row of the file; None if they stand as they are."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        layer = key.split(".")[-2]
        if not self.permuted or layer not in heads:
            return None
        rows = torch.arange(heads[layer] * head_dim(self.config))
        return rows.view(heads[layer], 2, -1).transpose(1, 2).flatten()


def head_dim(config) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe(writer, config) -> None:
    """Writes the model's settings into a GGUFWriter. Raises ValueError for a rotary scaling that is not translated."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(
            f"rotary scaling {rope['rope_type']!r} is not translated to GGUF (default, linear and llama3 are); "
            "nearest that can: --format merged, then llama.cpp's convert_hf_to_gguf.py"
        )


def rope_factors(config) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, float32 (head_dim / 2,), for Llama 3's scaling; else None.

    Taken from transformers' own frequencies, so that both agree.
    """
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_dim(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain / scaled
