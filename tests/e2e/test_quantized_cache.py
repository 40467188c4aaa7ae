"""Generating from a packed model with a quantized key-value cache: transformers' own, as the README shows."""

import importlib.util

import pytest
import torch
from checks import assert_close, tiny_llama

from lrec import embeddings, nn
from lrec.quantizers.rtn import RTN

# The settings that the README shows, and how near the logits must come.
BACKENDS = {
    "fp8": ({"backend": "fp8"}, 0.03),
    "quanto": ({"backend": "quanto", "nbits": 4}, 0.1),
    "hqq": ({"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}, 0.1),
}
PACKAGES = {"fp8": "torch", "quanto": "optimum.quanto", "hqq": "hqq"}


def installed(package):
    """Whether a package can be imported, its parent included."""
    return all(importlib.util.find_spec(part) for part in (package.partition(".")[0], package))


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_from_a_packed_model_with_a_quantized_cache(backend):
    if not installed(PACKAGES[backend]):
        pytest.skip(f"{PACKAGES[backend]} is not installed; fp8 needs no package")
    settings, tolerance = BACKENDS[backend]
    model = tiny_llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    for name in [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:-1]:
        nn.replace(model, name, RTN(bits=4)(model.get_submodule(name).weight))
    embeddings.pack(model, 8)
    ids = torch.randint(0, 256, (2, 200))
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    common["return_dict_in_generate"] = True
    exact = model.generate(ids, **common)
    quantized = model.generate(ids, **common, cache_implementation="quantized", cache_config=settings)
    # The first token is chosen from the exact keys and values, all others from quantized ones.
    assert torch.equal(exact.logits[0], quantized.logits[0])
    assert_close(quantized.logits[1], exact.logits[1], tolerance)
    assert not torch.equal(quantized.logits[1], exact.logits[1]), "the cache was not quantized"
    if backend == "fp8":
        held = [layer._quantized_keys[0] for layer in quantized.past_key_values.layers]
        assert all(t.dtype == torch.float8_e4m3fn and t.shape == (2, 1, 207, 64) for t in held)
