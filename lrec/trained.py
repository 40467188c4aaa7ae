"""Training what a packed weight holds: scales, zero points, tables, and codes, behind which floats then stand
(`lrec.formats.latent`).

`start` makes float32 parameters of them, `settle` rounds them to what the format stores and freezes them again. What
was trained is saved as `base_tensors.safetensors` beside the adapter, or in its place: tensors by their full names in
the base model, which `load` puts where the base's own were. A base with them gives the same logits, bit for bit, as
the model that was trained.
"""

from pathlib import Path

from torch import Tensor, nn

from lrec import checkpoint, registry
from lrec.formats import Packed, tensor_fields
from lrec.nn import PackedModule, packed_modules

KINDS = ("adapters", "scales", "zeros", "codes")
ALL = KINDS[:3]  # what `all` stands for: codes take 16 bytes a weight while they are trained, so they are named


def kinds_of(train: str) -> tuple[str, ...]:
    """What `--train` names: some of `KINDS`, parted by commas, or all (`ALL`). Raises ValueError for another word."""
    words = [word.strip() for word in train.split(",")]
    for word in words:
        if word not in (*KINDS, "all"):
            raise ValueError(registry.nearest(word, (*KINDS, "all"), "part to train"))
    return tuple(kind for kind in KINDS if kind in words or ("all" in words and kind in ALL))


def base_of(model: nn.Module) -> nn.Module:
    """The model under a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: nn.Module) -> dict[str, PackedModule]:
    """The packed layers of a model, under a peft model or not, by their names in the base model."""
    return {name.removesuffix(".base_layer"): layer for name, layer in packed_modules(base_of(model)).items()}


def start(model: nn.Module, kinds: tuple[str, ...]) -> None:
    """Makes parameters of the scales, zeros or codes of every packed linear layer that has some; the head stays frozen.

    Raises ValueError if a kind that is named is in no layer (of `ALL`, if neither scales nor zeros are), or if the
    packed weights are streamed from files.
    """
    wanted, head = [kind for kind in kinds if kind != "adapters"], output_of(model)
    layers = {n: layer for n, layer in layers_of(model).items() if isinstance(layer, nn.Linear) and layer is not head}
    if not wanted:
        return
    if any(layer.visit is not None for layer in layers.values()):
        raise ValueError(
            "--stream_weights reads packed weights anew from their files at each visit, so they cannot be trained; "
            "leave it out, or train adapters alone"
        )
    floats = [kind for kind in wanted if kind in ALL]
    alone = [kind for kind in wanted if kind not in floats] if set(kinds) >= set(ALL) else wanted
    for asked in [*([floats] if alone != wanted else []), *([kind] for kind in alone)]:
        if not any(layer.packed.trainable(asked) for layer in layers.values()):
            offers = "; ".join(sorted(set(map(offer, layers.values()))))
            raise ValueError(f"no layer has {' or '.join(asked)} to train: {offers}")
    for layer in layers.values():
        if fields := layer.packed.trainable(wanted):
            before, layer.stored_spec, layer.changed = layer.packed.tensors(), layer.spec, set()
            layer.train_fields(fields)
            note_changes(layer, before)
    allow(model, {f"{name}.{field}" for name, layer in layers.items() for field in layer.trained})


def output_of(model: nn.Module) -> nn.Module | None:
    """The output head of a language model, None of any other module."""
    base = base_of(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def offer(layer: PackedModule) -> str:
    """What of a layer can be trained, in words."""
    packed = layer.packed
    kinds = [kind for kind in packed.TRAINED if packed.trainable([kind])]
    symmetric = " with a symmetric grid" if packed.name() == "uniform" and packed.zero is None else ""
    return f"the {packed.name()} format{symmetric} offers {', '.join(kinds) or 'none'}"


def allow(model: nn.Module, names: set[str]) -> None:
    """Tells DistributedDataParallel, which was told to leave packed weights alone, and transformers, which trains no
    bare quantized model, that these are parameters now."""
    for module in model.modules():
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        if ignored is not None:
            plain = {place: place.replace(".base_layer", "").removeprefix("base_model.model.") for place in ignored}
            module._ddp_params_and_buffers_to_ignore = [place for place in ignored if plain[place] not in names]
        if getattr(module, "hf_quantizer", None) is not None:
            module.hf_quantizer.is_qat_trainable = True


def parameter_groups(model: nn.Module, rate: float, reach: float, num_steps: int) -> list[dict]:
    """Groups of an optimizer, one for each field of a layer, without decay; `rate` is relative to the field's size.

    Scales of one layer may be a hundred times those of another, and zeros are counted in codes: a step of Adam moves an
    entry by the learning rate, so that is `rate` times the root mean square of the field. Latents have one size, and
    what counts is whether one comes to the next code: `reach` is how far one moves if all steps agree and rates fall
    along a cosine, whose mean is half its first. So, however many the steps, few of the codes change by noise.
    """
    codes_rate = 2 * reach / max(num_steps, 1)
    groups = []
    for layer in layers_of(model).values():
        for field in layer.trained:
            parameter = layer._parameters[field]
            size = max(float(parameter.detach().square().mean().sqrt()), 1e-8)
            step = codes_rate if field == "qweight" else rate * size
            groups.append({"params": [parameter], "lr": step, "weight_decay": 0.0})
    return groups


def settle(model: nn.Module, scale_bits: int | None = None) -> None:
    """Rounds what was trained to what its format stores, and freezes it. Raises ValueError for what is not finite."""
    for name, layer in layers_of(model).items():
        if layer.trained:
            odd = [field for field in layer.trained if not layer._parameters[field].isfinite().all()]
            if odd:
                raise ValueError(f"{name}: trained {', '.join(odd)} are not finite; lower their learning rate")
            before = layer.packed.tensors()
            layer.become(layer.packed.narrowed(layer.trained, layer.stored_spec, scale_bits))
            note_changes(layer, before)


def note_changes(layer: PackedModule, before: dict[str, Tensor]) -> None:
    """Remembers which of a layer's tensors are not those it had before."""
    layer.changed |= {field for field, tensor in layer.packed.tensors().items() if tensor is not before.get(field)}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of packed layers that are others than before `start`, by their names in the base model."""
    return {
        f"{name}.{field}": tensor
        for name, layer in layers_of(model).items()
        for field, tensor in layer.packed.tensors().items()
        if field in getattr(layer, "changed", ())
    }


def save(model: nn.Module, directory: Path) -> None:
    """Writes what was trained, if anything, in float32 while it is trained and as the format stores it afterwards."""
    changed = tensors(model)
    if changed:
        Path(directory).mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(Path(directory) / checkpoint.BASE_TENSORS, changed)


def read(directory: Path, stamp: dict | None = None) -> dict[str, dict[str, Tensor]]:
    """What a directory holds of trained tensors: by layer, by field; empty if it holds none.

    Raises ValueError if the file is damaged, or missing or other than the stamp says.
    """
    path, expected = Path(directory) / checkpoint.BASE_TENSORS, (stamp or {}).get("base_tensors_sha256")
    if not path.exists():
        if expected:
            raise ValueError(
                f"{directory} lacks {checkpoint.BASE_TENSORS}, which its stamp names; the copy is incomplete, "
                "fetch or train it again"
            )
        return {}
    with checkpoint.open_tensors(path) as file:
        flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
    if expected and checkpoint.tensors_hash(flat) != expected:
        raise ValueError(f"{path} was altered (its tensors are not those its stamp names); fetch or make it again")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        layer, _, field = key.rpartition(".")
        found.setdefault(layer, {})[field] = tensor
    return found


def load(model: nn.Module, directory: Path, stamp: dict | None = None) -> None:
    """Puts a directory's trained tensors, if it holds any, where those of the model are: into the parameters where
    these are being trained, else in the place of the frozen ones.

    Raises ValueError if they are of layers or shapes that the model does not have, or if the model already carries
    those of another adapter.
    """
    found = read(directory, stamp)
    mark = checkpoint.tensors_hash({f"{n}.{f}": t for n, fields in found.items() for f, t in fields.items()})
    layers = layers_of(model)
    if not any(layer.trained for layer in layers.values()):
        base = base_of(model)
        carried = getattr(base, "lrec_base_tensors", None)
        if carried == mark or not (found or (carried and stamp)):
            return  # a checkpoint of the trainer, which has no stamp, is of the model as it is
        if carried:
            raise ValueError(
                f"{directory} was trained with other scales and zeros than those that the model has loaded; load it "
                "on the base model as it was quantized"
            )
        base.lrec_base_tensors = mark
    unknown = sorted(found.keys() - layers.keys())
    if unknown:
        raise ValueError(f"{directory} holds trained tensors of layers that the model lacks: {', '.join(unknown[:4])}")
    for name, fields in found.items():
        layer, device = layers[name], layers[name].qweight.device
        if layer.trained:
            for field in layer.trained:
                layer._parameters[field].data.copy_(fields[field])
        else:
            layer.become(updated(name, layer.packed, {f: t.to(device) for f, t in fields.items()}))


def updated(name: str, packed: Packed, fields: dict[str, Tensor]) -> Packed:
    """A layer's weight with trained tensors. Raises ValueError, naming the layer, if they do not fit it."""
    wide = packed.widened(packed.trainable(ALL)).tensors()
    odd = [
        f"{field} {list(tensor.shape)}"
        for field, tensor in fields.items()
        if field not in tensor_fields(type(packed)) or (field in wide and tensor.shape != wide[field].shape)
    ]
    if odd:
        raise ValueError(
            f"{name}: trained {', '.join(odd)} does not fit the layer's {packed.name()} weight of shape "
            f"{packed.shape}; the adapter belongs to another base"
        )
    return packed.updated(fields)
