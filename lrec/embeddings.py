"""Token embeddings and output head in 8 or 4 bits, shared where the model shares them.

Both are wide tables that see every token, so they are rounded to the nearest grid points in groups of 64, without data.
Where transformers ties the head to the embeddings, the head becomes a `TiedLinear`, which asks the packed embeddings
for their tensors: the pair is then taken off transformers' own list, which knows how to tie parameters only.
"""

import dataclasses
import sys

from torch import Tensor, nn

from lrec.eight_bits import RUN
from lrec.formats import uniform
from lrec.formats.uniform import Uniform
from lrec.nn import PackedEmbedding, TiedLinear, replace
from lrec.quantizers import quantize_layer
from lrec.quantizers.rtn import RTN

# At 8 bits zero points and a search gain next to nothing; at 4 bits both pay for themselves.
QUANTIZERS = {
    8: RTN(bits=8, symmetric=True, scale_search="minmax", scale_bits=8),
    4: RTN(bits=4, zero_point="float", scale_bits=8),
}
# Rows are quantized in slices of about this many weights: temporaries are larger than what comes out.
SLICE_WEIGHTS = 2**22


def check_bits(bits: int) -> None:
    """Raises ValueError for other widths than 8 and 4."""
    if bits not in QUANTIZERS:
        raise ValueError(f"quantize_embeddings = {bits} is not offered; allowed: 8, 4, or 0 to leave them as they are")


def pack(model: nn.Module, bits: int) -> dict[str, tuple[Uniform, float]]:
    """Puts packed modules in the place of the model's embeddings and head; weight and ||W - Wq||^2 / ||W||^2 by name.

    A head that is tied to the embeddings has no entry of its own. Raises ValueError for other widths than 8 and 4, and
    naming the module if it is no plain embedding or linear layer, or its weights are not finite.
    """
    check_bits(bits)
    found, modules = {}, tables(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head not in modules.values()
    names = {module: name for name, module in model.named_modules()}
    for name, module in modules.items():
        check_plain(name, module)
        w_NK = module.weight.detach()
        packed = pack_rows(name, w_NK, bits)
        found[name] = packed, weight_error(w_NK, packed)
        replace(model, name, packed)
    tie(model)
    if tied and not isinstance(model.get_output_embeddings(), TiedLinear):
        raise ValueError(
            f"{type(model).__name__} shares a weight between {names[embedding]} and {names[head]} in a way that "
            "transformers does not list; leave quantize_embeddings out"
        )
    return found


def tables(model: nn.Module) -> dict[str, nn.Module]:
    """The model's embeddings and its head, unless it has none of its own, by name."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: module for module in ends}


def pack_rows(name: str, w_NK: Tensor, bits: int) -> Uniform:
    """The weight of a table by the quantizer of this width, in slices of rows; a refusal bears the module's name."""
    K = w_NK.shape[1]
    quantizer = dataclasses.replace(QUANTIZERS[bits], group_size=min(64, K))
    step = max(1, SLICE_WEIGHTS // K // RUN) * RUN
    return uniform.stack([quantize_layer(name, rows_NK, quantizer, None) for rows_NK in w_NK.split(step)])


def weight_error(w_NK: Tensor, packed: Uniform) -> float:
    """||W - Wq||^2 / ||W||^2, in slices of rows."""
    step = max(1, SLICE_WEIGHTS // w_NK.shape[1])
    slices = [slice(n, n + step) for n in range(0, len(w_NK), step)]
    missed = sum(float((w_NK[rows].float() - packed.unpack(rows)).square().sum()) for rows in slices)
    return missed / max(sum(float(w_NK[rows].float().square().sum()) for rows in slices), sys.float_info.min)


def check_plain(name: str, module: nn.Module) -> None:
    """Raises ValueError unless the module does what `nn.Embedding` or `nn.Linear` does, and nothing more."""
    plain = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Embedding, nn.Linear))
    if not plain or getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{name} is a {type(module).__name__}, which does more than a plain embedding or linear layer and cannot "
            "be packed; leave quantize_embeddings out"
        )


def tie(model: nn.Module) -> None:
    """Makes a `TiedLinear` of every linear layer that transformers ties to packed embeddings, and ends that tie."""
    tied = set()
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        embedding, name = model.get_submodule(source.rpartition(".")[0]), target.rpartition(".")[0]
        if isinstance(embedding, PackedEmbedding):
            layer = TiedLinear(embedding, model.get_submodule(name).bias)
            # Else transformers would decode the weight to draw a random one for it.
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)
            tied.add(target)
    for prefix, module in model.named_modules() if tied else ():
        path = f"{prefix}." if prefix else ""
        for lists in ("_tied_weights_keys", "all_tied_weights_keys"):
            listed = getattr(module, lists, None)
            if listed:
                setattr(module, lists, {t: s for t, s in listed.items() if path + t not in tied})


def untie(model: nn.Module) -> None:
    """Gives the ties that `tie` took back to transformers, once no embedding is packed any more."""
    taken = [module for module in model.modules() if vars(module).pop("_tied_weights_keys", None) is not None]
    if taken:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
