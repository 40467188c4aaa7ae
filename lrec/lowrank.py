"""Closed-form adapters: the best low-rank correction of a quantized weight, before any training.

Quantizing leaves a residual D = W - Wq. Of all matrices of rank r, the one that repairs most of the layer's output on
the calibration inputs X minimises ||(D - BA) X||. With R = X X^T (plus damping) and any S with S S^T = R this norm is
||(D - BA) S||, so BA S is the truncated SVD of D S, and BA = U_r U_r^T D, where U_r holds the leading left singular
vectors of D S. Those are the leading eigenvectors of D R D^T, so neither a root of R nor its inverse is ever taken,
and a singular R needs no care. QERA (2410.06040), CLoQ (2501.18475) and EoRA (2410.21271) are this solution written
with different roots; LoftQ's and ZeroQuant-V2's plain SVD is R = I.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lrec import anatomy, checkpoint

Factors = dict[str, tuple[Tensor, Tensor]]
SLICE = 512  # rows of a residual, or columns of a Hessian, that are cast to float64 at once


def factor(
    residual_NK: Tensor, rank: int, hessian_KK: Tensor | None = None, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """(A, B), float32 (R, K) and (N, R), that minimise tr (D - BA) R (D - BA)^T with R = H + damping * mean(diag H) I.

    Components are sorted, the most useful first, so the first r' of them are the answer for rank r' (Eckart-Young),
    and each has ||a_r|| = ||b_r||, which makes the factors independent of the scale of H. Without a Hessian R = I:
    plain SVD. Computed in float64, by eigendecompositions of size min(N, K).

    Raises ValueError for a rank that does not fit or tensors that are not finite.
    """
    N, K = residual_NK.shape
    if not 1 <= rank <= min(N, K):
        raise ValueError(f"rank = {rank} does not fit a weight of shape {(N, K)}; allowed: 1 to {min(N, K)}")
    # Of a wide residual a float64 copy is made anew below: eigh takes several times the room of `gram`, where its
    # result goes.
    core, basis_KK = (None, None) if N <= K else _column_span(residual_NK)
    gram = _gram(residual_NK if core is None else core, hessian_KK, damping)
    u = torch.linalg.eigh(gram, out=(gram.new_empty(len(gram)), gram)).eigenvectors[:, -rank:].flip(1)
    a_RK = u.t() @ (residual_NK.double() if core is None else core)
    size_R = a_RK.norm(dim=1)
    root_R = size_R.sqrt()
    a_RK = a_RK * torch.where(size_R > 0, 1 / root_R, 0)[:, None]
    u_NR = u if basis_KK is None else torch.cat([rows.double() @ (basis_KK @ u) for rows in residual_NK.split(SLICE)])
    return a_RK.float(), (u_NR * root_R).float()


def left_by_rank(residual_NK: Tensor, hessian_KK: Tensor | None = None, damping: float = 0.01) -> Tensor:
    """Which share of tr D R D^T the factors of each rank leave, float64 (min(N, K) + 1,): 1 for rank 0, 0 for the last.

    Each component repairs its eigenvalue's part of the sum. Raises ValueError for tensors that are not finite.
    """
    N, K = residual_NK.shape
    values = torch.linalg.eigvalsh(_gram(residual_NK if N <= K else _column_span(residual_NK)[0], hessian_KK, damping))
    left = torch.cat([values.new_zeros(1), values.clamp_min(0).cumsum(0)]).flip(0)
    return left / left[0].clamp_min(torch.finfo(left.dtype).tiny)


def left_over(residual_NK: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """D - B A of a residual D and factors (A, B), in the place of D."""
    a_RK, b_NR = pair
    return residual_NK.addmm_(b_NR, a_RK, alpha=-1)


def _gram(core_NK: Tensor, hessian_KK: Tensor | None, damping: float) -> Tensor:
    """D R D^T (N, N) in float64. Raises ValueError if it is not finite."""
    core = core_NK.double()
    gram = core @ core.t()
    if hessian_KK is not None:
        gram *= damping * float(hessian_KK.diagonal().double().mean())
        # By slices, so that no copy of the Hessian in float64 exists.
        for start in range(0, core.shape[1], SLICE):
            part = slice(start, start + SLICE)
            gram += core @ hessian_KK[:, part].to(core) @ core[:, part].t()
    if not gram.isfinite().all():
        raise ValueError("the residual or the Hessian holds NaN or infinity; check the weight and the calibration data")
    return gram


def _column_span(d_NK: Tensor) -> tuple[Tensor, Tensor]:
    """C and P, float64 (K, K), such that D P has orthonormal (or zero) columns and D P C = D.

    From D^T D = V L V^T: C = L^1/2 V^T and P = V L^-1/2. A tall D is never copied in float64 as a whole.
    """
    squares = sum(rows.double().t() @ rows.double() for rows in d_NK.split(SLICE))
    if not squares.isfinite().all():
        raise ValueError("the residual holds NaN or infinity; check the weight")
    power, v_KK = torch.linalg.eigh(squares)
    root = power.clamp_min(0).sqrt()
    inverse = torch.where(power > 1e-14 * power[-1], 1 / root, 0)
    return root[:, None] * v_KK.t(), v_KK * inverse


def initialise(model: nn.Module, factors: Factors, adapter_name: str = "default") -> None:
    """Puts factors, by module name in the base model, into a peft LoRA model: scaling * B A becomes the closed form,
    cut to the adapter's rank. Factors of layers without this adapter are left alone.

    Raises ValueError naming all layers that have no factors, factors of another shape or of too small a rank, or an
    adapter that is not plain LoRA; nothing is changed then.
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if adapter_name in getattr(module, "lora_A", {})
    }
    if not layers:
        raise ValueError(f"the model has no LoRA adapter named {adapter_name!r}; call peft.get_peft_model first")
    wrong = [
        f"{name}: {reason}"
        for name, layer in layers.items()
        if (reason := _misfit(layer, adapter_name, factors.get(name)))
    ]
    if wrong:
        raise ValueError(
            "closed-form factors do not fit the adapters; quantize with another --init_rank, train with "
            "another rank or targets, or start from zero:\n  " + "\n  ".join(wrong)
        )
    for name, layer in layers.items():
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        root = layer.scaling[adapter_name] ** 0.5
        with torch.no_grad():
            a.copy_(factors[name][0][: a.shape[0]].float() / root)
            b.copy_(factors[name][1][:, : a.shape[0]].float() / root)


def _misfit(layer: nn.Module, adapter_name: str, pair: tuple[Tensor, Tensor] | None) -> str | None:
    if pair is None:
        return "no factors"
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    found, shape = (pair[1].shape[0], pair[0].shape[1]), (b.shape[0], a.shape[1])
    if found != shape:
        return f"factors of a weight of shape {found}, but the layer is {shape}"
    if pair[0].shape[0] < a.shape[0]:
        return f"factors have rank {pair[0].shape[0]}, but the adapter {a.shape[0]}"
    if adapter_name in getattr(layer, "lora_variant", {}):
        return f"the adapter is {type(layer.lora_variant[adapter_name]).__name__}, not plain LoRA"
    return None


def correct(block: nn.Module, name: str, factors: Factors) -> None:
    """Adds B A x to the output of each of the block's linears that has factors (A, B) by its full name."""
    for linear, module in anatomy.linears(block).items():
        if f"{name}.{linear}" in factors:
            a_RK, b_NR = (factor.to(module.qweight.device) for factor in factors[f"{name}.{linear}"])

            def add(_, args, out, a_RK=a_RK, b_NR=b_NR):
                return out + (args[0] @ a_RK.to(out.dtype).t()) @ b_NR.to(out.dtype).t()

            module.register_forward_hook(add)


def save(factors: Factors, path: str | Path) -> None:
    """Writes the factors as float16 safetensors, `<module>.lora_A` (R, K) and `<module>.lora_B` (N, R)."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors |= {f"{name}.lora_A": a.half().contiguous(), f"{name}.lora_B": b.half().contiguous()}
    checkpoint.write_tensors(Path(path), tensors)


def ranks(path: Path) -> dict[str, int]:
    """The rank of each layer's factors in a file of `save`, from its header; empty if there is no file."""
    if not path.exists():
        return {}
    with checkpoint.open_tensors(path) as file:
        halves = [key for key in file.keys() if key.endswith(".lora_A")]  # noqa: SIM118  (safe_open is not a dict)
        return {key.removesuffix(".lora_A"): file.get_slice(key).get_shape()[0] for key in halves}


def load(path: str | Path) -> Factors:
    """What `save` wrote, as float16. Raises ValueError for a file that is missing, damaged or holds something else."""
    with checkpoint.open_tensors(Path(path)) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
    names = sorted({key.rpartition(".")[0] for key in tensors})
    if tensors.keys() != {f"{name}.{half}" for name in names for half in ("lora_A", "lora_B")}:
        raise ValueError(
            f"{path} holds no pairs of lora_A and lora_B; it is no file of low-rank factors; quantize again "
            "with --init_rank"
        )
    found = {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}
    if odd := [name for name, (a, b) in found.items() if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]]:
        raise ValueError(f"{path}: lora_A and lora_B of {odd[0]} do not belong together; quantize again")
    return found
