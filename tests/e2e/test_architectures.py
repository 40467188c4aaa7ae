"""Every kind of architecture, tiny and random, is quantized, trained, exported and loaded again; no list of them is
in the library."""

import json
import re
import subprocess
import sys

import pytest
import torch
from checks import assert_close, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig

from lrec import checkpoint, evaluate, export, foreign, load
from lrec.cli import main
from lrec.nn import PackedLinear

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial yak. "
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LIKE_LLAMA = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
SLIDING = LIKE_LLAMA | {"sliding_window": 8}
EXPERTS = LIKE_LLAMA | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SIGHT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "patch_size": 8}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
# What is peculiar -> (model type, settings). Tied and untied heads, biases, softcaps, windows, norms, parallel blocks.
DENSE = {
    "biases": ("llama", LIKE_LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "windows": ("mistral", SLIDING),
    "qkv-biases": ("qwen2", LIKE_LLAMA),
    "qk-norms": ("qwen3", LIKE_LLAMA),
    "softcaps": ("gemma2", SLIDING | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0}),
    "local-global": ("gemma3_text", SLIDING),
    "fused-qkv": ("phi3", LIKE_LLAMA),
    "norms-behind": ("olmo2", LIKE_LLAMA),
    "parallel": ("gpt_neox", COMMON | {"intermediate_size": 96}),
    "parallel-scaled": ("cohere", LIKE_LLAMA | {"use_qk_norm": True}),
    "layer-norms": ("opt", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "multipliers": ("granite", LIKE_LLAMA | {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}
MIXTURES = {
    "mixtral": ("mixtral", LIKE_LLAMA | {"num_local_experts": 4}),
    "shared-expert": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "experts-qk-norms": ("qwen3_moe", EXPERTS),
    "transposed-biases": ("gpt_oss", SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "latent-attention": (
        "deepseek_v3",
        COMMON
        | LATENT
        | {"intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2}
        | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "olmoe": ("olmoe", EXPERTS),
    "granite-experts": ("granitemoe", LIKE_LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
SEEING = {
    "llava": ("llava", {
        "text_config": LIKE_LLAMA | {"model_type": "llama"},
        "vision_config": SIGHT | {"model_type": "clip_vision_model", "image_size": 16, "num_hidden_layers": 3},
        "image_token_id": 250,
    }),
    "gemma3": ("gemma3", {
        "text_config": SLIDING | {"model_type": "gemma3_text"},
        "vision_config": SIGHT | {"model_type": "siglip_vision_model", "image_size": 32, "num_hidden_layers": 2},
        "image_token_id": 250, "boi_token_index": 251, "eoi_token_index": 252, "mm_tokens_per_image": 4,
    }),
}  # fmt: skip
ALL = DENSE | MIXTURES | SEEING


def make(place, name):
    """Saves a random model of that architecture, its tokenizer and a text."""
    kind, settings = ALL[name]
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    foreign.auto_class(config).from_config(config).save_pretrained(place / "M")
    tiny_tokenizer(place / "M")
    (place / "text.txt").write_text(TEXT * 40)


def run(capsys, verb, *words):
    capsys.readouterr()
    assert main([verb, *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ALL)
def test_an_architecture_goes_all_the_way(name, tmp_path, capsys):
    make(tmp_path, name)
    M, Q, A, X = (tmp_path / part for part in "MQAX")
    windows = ["--dataset", tmp_path / "text.txt", "--max_length", "32", "--num_samples", 8]
    told = run(capsys, "quantize", "--model", M, "--bits", 3, "--group_size", 32, *windows, "--output_dir", Q)
    assert told["quantized_share"] >= (1.0 if name in DENSE.keys() - {"parallel-scaled"} else 0.95)
    print(name, told["quantized_share"], told["quantized_share_of_model"])

    train = ["--max_steps", 4, "--learning_rate", "3e-3", "--lora_r", 4, *windows]
    report = run(capsys, "train", "--model", Q, "--teacher", M, *train, "--output_dir", A)
    assert report["num_steps"] == 4
    run(capsys, "export", "--model", Q, "--adapter", A, "--format", "adapter", "--output_dir", X)

    corrected = load.model(str(Q), str(A))
    ids = torch.tensor(load.tokenizer(str(M))(TEXT * 2)["input_ids"][:128]).view(4, 32)
    assert_corrects(corrected, load.model(str(M)), ids)
    assert_merges(Q, A, corrected, tmp_path / "merged")


def assert_corrects(corrected, teacher, ids):
    """Under its adapter a packed model is nearer to the teacher than without."""
    target = evaluate.states(teacher, ids).kept()
    kl = evaluate.quality(evaluate.states(corrected, ids), ids, target)["kl"]
    with corrected.disable_adapter():
        assert kl < evaluate.quality(evaluate.states(corrected, ids), ids, target)["kl"]


@torch.no_grad()
def assert_merges(Q, A, corrected, output_dir):
    """What `export --format merged` writes is peft's own merge, rounded to bfloat16, and says the same."""
    export.export(export.find("merged")(), Q, A, output_dir)
    own = corrected.merge_and_unload()
    assert not any(isinstance(module, PackedLinear) for module in own.modules())
    own.save_pretrained(output_dir.with_name("own"))
    mine, theirs = (load.model(str(path)) for path in (output_dir, output_dir.with_name("own")))
    theirs.load_state_dict({key: tensor.bfloat16().float() for key, tensor in theirs.state_dict().items()})
    ids = torch.arange(48).view(2, 24) * 5 % 250
    assert type(mine) is type(theirs)
    assert_close(mine(ids).logits, theirs(ids).logits, 1e-4, "logits")


LOADS = """
import sys
import torch
import transformers, peft, lrec

Q, A, kind, ids = sys.argv[1], sys.argv[2], sys.argv[3], torch.arange(48).view(2, 24) * 5 % 250
base = getattr(transformers, kind).from_pretrained(Q, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, A).eval()
torch.save(model(ids).logits.detach(), sys.argv[4])
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("experts-qk-norms", "AutoModelForCausalLM"), ("llava", "AutoModelForImageTextToText")]
)
def test_an_adapter_on_experts_or_sight_loads_with_transformers_and_peft_alone(name, kind, tmp_path, capsys):
    make(tmp_path, name)
    windows = ["--dataset", tmp_path / "text.txt", "--max_length", "32", "--num_samples", 4]
    Q, A = tmp_path / "Q", tmp_path / "A"
    run(capsys, "quantize", "--model", tmp_path / "M", "--bits", 4, "--group_size", 32, *windows, "--output_dir", Q)
    train = ["--teacher", tmp_path / "M", "--max_steps", 2, "--lora_r", 4, *windows, "--output_dir", A]
    run(capsys, "train", "--model", Q, *train)
    stored = load_file(A / checkpoint.ADAPTER_WEIGHTS)
    layers = [name for entry in load_config(Q)["layers"] for name in entry["modules"]]
    assert stored.keys() == {f"base_model.model.{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    subprocess.run([sys.executable, "-c", LOADS, Q, A, kind, tmp_path / "logits"], check=True)
    with torch.no_grad():
        own = load.model(str(Q), str(A))(torch.arange(48).view(2, 24) * 5 % 250).logits
    assert_close(torch.load(tmp_path / "logits"), own, 1e-6, "logits")


def test_what_integer_targets_cannot_hold_is_refused_or_named(tmp_path, capsys):
    for name in ("mixtral", "llava"):
        make(tmp_path / name, name)
        words = ["--method", "rtn", "--bits", 4, "--group_size", 32, "--symmetric", "true", "--init_rank", 0]
        run(capsys, "quantize", "--model", tmp_path / name / "M", *words, "--output_dir", tmp_path / name / "Q")
    for target in ("gptq", "compressed_tensors", "gguf"):
        with pytest.raises(ValueError, match=r"gate_up_proj\.0 and 15 more are single experts' .* --format merged"):
            export.export(export.find(target)(), tmp_path / "mixtral" / "Q", None, tmp_path / target)
    export.export(export.find("gptq")(), tmp_path / "llava" / "Q", None, tmp_path / "gptq")
    skipped = [re.search("tower|projector", name)[0] for name in load_config(tmp_path / "gptq")["dynamic"]]
    assert skipped.count("tower") == 3 * 6 and skipped.count("projector") == 2


def test_the_report_says_what_is_left_and_why(tmp_path, capsys):
    make(tmp_path, "transposed-biases")
    words = ["--method", "rtn", "--bits", 4, "--init_rank", 0, "--output_dir", tmp_path / "Q"]
    told = run(capsys, "quantize", "--model", tmp_path / "M", *words)
    left = {re.split("[:,]", row["unquantized"])[0]: row["weights"] for row in told["unquantized"]}
    config = AutoConfig.from_pretrained(tmp_path / "M")
    sizes = {name: p.numel() for name, p in foreign.auto_class(config).from_config(config).named_parameters()}
    routers = sum(size for name, size in sizes.items() if name.endswith("router.weight"))
    vectors = sum(size for name, size in sizes.items() if re.search("norm|bias|sinks", name))
    assert left == {
        "embeddings and output head": 2 * 256 * 64,
        "what routes tokens to experts": routers,
        "norms": vectors,
    }
    packed = sum(sizes.values()) - sum(left.values())
    assert told["quantized_share_of_model"] == packed / sum(sizes.values())
    assert told["quantized_share"] == packed / (packed + routers)


def load_config(directory):
    return checkpoint.read_json(directory / "config.json")["quantization_config"]
