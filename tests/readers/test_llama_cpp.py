"""GGUF exports of SmolLM2 read by llama.cpp itself: `make readers`, which builds it.

llama.cpp rounds the activations that meet packed weights to 8 bits, so that its logits are not quite those of the file.
What the *file* holds is told by its twin, the same file with every block decoded to float32 by ggml's definition,
which llama.cpp multiplies in float32: twin and ours agree within 0.02 in every log-probability looked at, and continue
alike but where two tokens are that near. The packed file may differ by no more than what the same rounding does to our
own model, which is much where a token's activations are large (SmolLM2's first ones: 0.5 and more).
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lrec import checkpoint, load
from lrec.cli import main
from lrec.nn import packed_modules

pytestmark = [pytest.mark.readers, pytest.mark.slow]

PROMPTS = [
    "The capital of France is Paris, and 17 times 3 is 51. In the beginning there was nothing but",
    "Water boils at a temperature of one hundred degrees",
    "Once upon a time there was a",
]
KINDS = {
    "q2_0": ("--bits", "2", "--group_size", "64", "--symmetric"),
    "q4_0": ("--bits", "4", "--group_size", "32", "--symmetric"),
    "q4_1": ("--bits", "4", "--group_size", "32"),
}
Q2_0 = 42
# How far a file may be from the model it was made of: Q4_1 holds a group's smallest value, -scale * zero, as a float16.
ROUNDED = {"q2_0": 0.0, "q4_0": 0.0, "q4_1": 5e-2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that makes a packed SmolLM2 and its GGUF directory, each kind once."""
    pytest.importorskip("llama_cpp")
    place, made = tmp_path_factory.mktemp("readers"), {}

    def of(kind):
        if kind not in made:
            made[kind] = place / kind, place / f"{kind}-gguf"
            words = ["--model", "smollm2", "--method", "rtn", *KINDS[kind], "--init_rank", "0"]
            assert main(["quantize", *words, "--output_dir", str(made[kind][0])]) == 0
            export(made[kind][0], made[kind][1], "gguf")
        return made[kind]

    return of


def export(model, directory, format, *words):
    assert (
        main(["export", "--model", str(model), "--format", format, *words, "--check", "--output_dir", str(directory)])
        == 0
    )


def decoded_twin(source: Path) -> Path:
    """The file with its blocks decoded to float32 by their definition; made beside it."""
    import gguf

    from lrec.ggml.blocks import teach_q2_0

    teach_q2_0()
    reader, path = gguf.GGUFReader(source), source.with_name("twin.gguf")
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        value = field.contents()
        writer.add_array(key, value) if is_list else writer.add_key_value(key, value, field.types[0])
    writer.add_file_type(0)
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        if tensor.tensor_type == Q2_0:
            rows = np.array(tensor.data).reshape(shape[0], -1, 18)
            step = np.ascontiguousarray(rows[..., :2]).view(np.float16).astype(np.float32)
            codes = rows[..., 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
            weight = (codes.reshape(shape[0], -1, 64).astype(np.float32) - 1) * step
        else:
            weight = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(weight.reshape(shape), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(x, jitter):
    """x with each 32 of it rounded to 8 bits as ggml's quantize_row_q8_0 does, after a disturbance of a thousandth, so
    that equal rounding errors are not asked for where the order of sums differs."""
    blocks = (x * (1 + 1e-3 * jitter)).unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / step.clamp_min(1e-30))
    return (codes * step.half().float()).flatten(-2)


@torch.no_grad()
def ours(model, ids):
    """Log-probabilities (L, V)."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def ours_rounded(model, ids, seed):
    """The same with the inputs of all packed layers rounded."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module, args):
        return rounded(args[0], torch.randn(args[0].shape, generator=generator)), *args[1:]

    hooks = [layer.register_forward_pre_hook(hook) for layer in packed_modules(model).values()]
    found = ours(model, ids)
    for each in hooks:
        each.remove()
    return found


def theirs(reader, ids):
    """llama.cpp's log-probabilities (L, V)."""
    reader.reset()
    reader.eval(ids)
    return torch.from_numpy(reader.scores[: len(ids)].copy()).log_softmax(-1)


def greedy(reader, ids):
    """32 tokens, each the likeliest."""
    reader.reset()
    reader.eval(ids)
    for _ in range(32):
        ids = [*ids, int(reader.scores[reader.n_tokens - 1].argmax())]
        reader.eval(ids[-1:])
    return ids


def apart(a, b, ids):
    """The largest difference in the log-probability of a token of the text or of the five likeliest."""
    places = torch.cat([b.topk(5).indices[:-1], torch.tensor(ids[1:])[:, None]], 1)
    return float((a[:-1].gather(1, places) - b[:-1].gather(1, places)).abs().max())


def tie_where_they_part(model, continued, likeliest):
    """How much less likely the first other token is by our model than its own; 0 if all are the same."""
    at = next((i for i, (a, b) in enumerate(zip(continued, likeliest, strict=True)) if a != b), None)
    if at is None:
        return 0.0
    last = ours(model, likeliest[:at])[-1]
    return float(last[likeliest[at]] - last[continued[at]])


def check(model_dir, file, adapter=None, lora=None):
    """Compares our model with what llama.cpp makes of a file, and of its twin."""
    from lrec.export.gguf import llama_cpp_reader

    model, tokenizer = (
        load.model(str(model_dir), adapter and str(adapter), "cpu", "float32"),
        load.tokenizer(str(model_dir)),
    )
    packed, twin = (llama_cpp_reader(path, lora, 128) for path in (file, decoded_twin(file)))
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert packed.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        expected = ours(model, ids)
        error, twin_error = (apart(theirs(reader, ids), expected, ids) for reader in (packed, twin))
        allowed = max(apart(ours_rounded(model, ids, seed), expected, ids) for seed in range(4))
        print(f"{prompt[:20]!r}: packed {error:.4f} (rounding explains {allowed:.4f}), twin {twin_error:.5f}")
        assert twin_error <= 2e-2 and error <= max(2e-2, 1.5 * allowed), prompt
        asked = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            likeliest = model.generate(input_ids=torch.tensor([ids]), **asked)[0].tolist()
        for reader, bound in ((packed, allowed), (twin, 2e-2)):
            parting = tie_where_they_part(model, greedy(reader, ids), likeliest)
            print(f"    continued {'alike' if parting == 0 else f'otherwise where two tokens are {parting:.4f} apart'}")
            assert parting <= 2 * bound, prompt


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_says_what_our_model_says(exported, kind, tmp_path):
    """Ours is the file taken over again, bit for bit; it and the model that was exported are compared first."""
    model_dir, directory = exported(kind)
    assert main(["import", "--model", str(directory), "--output_dir", str(tmp_path / "back")]) == 0
    sides = [load.model(str(path), dtype="float32") for path in (tmp_path / "back", model_dir)]
    for prompt in PROMPTS:
        ids = load.tokenizer(str(model_dir))(prompt).input_ids
        rounding = apart(*(ours(model, ids) for model in sides), ids)
        print(f"{prompt[:20]!r}: the file is {rounding:.4f} from the model")
        assert rounding <= ROUNDED[kind], prompt
    check(tmp_path / "back", directory / "model.gguf")


def test_llama_cpp_says_it_with_the_adapter(exported, tmp_path):
    from peft import LoraConfig, get_peft_model

    model_dir, directory = exported("q2_0")
    shutil.copyfile(directory / "model.gguf", tmp_path / "model.gguf")
    base = load.model(str(model_dir), dtype="float32")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "A")
    stamp = {"packed_sha256": checkpoint.packed_sha256(base)}
    checkpoint.write_json(tmp_path / "A" / checkpoint.ADAPTER_STAMP, stamp)
    export(model_dir, tmp_path / "L", "gguf-lora", "--adapter", str(tmp_path / "A"))
    check(model_dir, tmp_path / "model.gguf", tmp_path / "A", tmp_path / "L" / "adapter.gguf")
