"""Bytes that the two passes which stream a model block by block will take: quantizing it, and caching it as a teacher.

Arithmetic on the model's skeleton; `lrec.memory` does the same for training. Each has moments at which memory may be
fullest, and the peak is the largest of their sums. What is read from a file counts on a CPU as long as the file is
open, and what is written to one is there three times: as tensors, as their bytes, and as the file's.
"""

from torch import nn

from lrec import anatomy, end_loss, experts, shapes, trained
from lrec.head import output_layer
from lrec.memory import Prediction, Setup, kernel_bytes
from lrec.rehearsal import rehearse


def quantizing(config, setup: Setup, calibration_tokens: int) -> Prediction:
    """The block-by-block pass: embeddings first, then one block, the hidden states of all calibration tokens, the
    statistics of its inputs (each one's Hessian; of the widest, its inverse and its factor too), and what the solver
    holds of its largest weight in float32.

    With `match_upstream` or `reconstruct_epochs` the full-precision model's hidden states go beside, and the former has
    a cross-covariance beside each Hessian; `end_loss_hessian` first has a backward pass, whose token weights are kept.
    """
    model = shapes.skeleton(config, setup.dtype)
    blocks = anatomy.find_blocks(model).modules
    block_bytes, named = max(map(_block_bytes, blocks)), max((anatomy.linears(block) for block in blocks), key=len)
    linears, own = named.values(), [linear.in_features for name, linear in named.items() if experts.is_part(name)]
    inputs = {linear.in_features for name, linear in named.items() if not experts.is_part(name)}
    widest = max(linear.in_features for linear in linears)
    state_bytes = output_layer(model).in_features * setup.dtype.itemsize
    kept = {"hidden states": calibration_tokens * state_bytes}
    if setup.match_upstream or setup.reconstruct_epochs:
        kept["full model's hidden states"] = kept["hidden states"]
    if setup.end_loss_hessian:
        kept["token weights"] = 4 * calibration_tokens * len(blocks) * (len(linears) + 1)
    # Each group of linears that share an input has a Hessian until its turn comes, and each of an expert's; in its turn
    # it has its inverse and its factor too, and two more matrices where it is matched upstream.
    sides = 2 if setup.match_upstream else 1
    hessians = 4 * sides * (sum(k * k for k in [*inputs, *own]) + 2 * min(inputs) ** 2)
    moments = ends(model, setup, kept) | {
        "block": kept
        | {
            "block": block_bytes,
            "statistics": max(hessians + 2 * 4 * min(inputs) ** 2, (1 + 2 * sides) * 4 * widest**2),
            "solver": 4 * 4 * max(linear.weight.numel() for linear in linears),
        },
    }
    if setup.reconstruct_epochs:
        moments["reconstruct"] = kept | reconstructing(config, setup) | {"block": block_bytes}
    if setup.end_loss_hessian:
        swept = min(calibration_tokens, end_loss.SWEEP_TOKENS)
        # Of a window a block keeps every linear's input and output for its backward, about. No block is there when the
        # head's logits are.
        backward = setup.dtype.itemsize * setup.max_length * sum(m.in_features + m.out_features for m in linears)
        logits = 3 * 4 * min(setup.max_length, end_loss.CHUNK_TOKENS) * output_layer(model).out_features
        moments["end loss"] = {
            "embeddings and head": moments["embed"]["embeddings and head"],
            "hidden states before every block": (len(blocks) + 2) * swept * state_bytes,
            "block and its backward, or logits": max(block_bytes + backward, logits),
            "token weights": kept["token weights"],
        }
    if setup.device == "cpu":
        moments["write"] = kept | {"embeddings and head, three times": 3 * stored_bytes(model, setup)}
    return _fullest(moments)


def reconstructing(config, setup: Setup) -> dict[str, int]:
    """What training a block takes beside it: float32 scales, zeros and codes (if these have reach), Adam's two states,
    and, while a window runs forward and back, what is kept for the gradients and these themselves."""
    model = shapes.skeleton(config, setup.dtype)
    shapes.pack_empty(model, config, setup.bits, setup.group_size)
    trained.start(model, ("scales", "zeros", *(["codes"] if setup.reconstruct_reach else [])))
    first = anatomy.find_blocks(model).modules[0]
    floats = sum(p.nbytes for p in first.parameters() if p.requires_grad)
    (block, *_) = rehearse(model, 1, setup.max_length)
    return {
        "trained floats": floats,
        "optimizer": 2 * floats,
        "forward and backward": block.kept + max(block.forward, block.backward),
        "kernel": kernel_bytes(setup.device),
    }


def caching(config, setup: Setup, sweep_tokens: int) -> Prediction:
    """Streaming the teacher: its embeddings, then two blocks, the hidden states of a sweep and a batch's forward; at
    last the sweep's states in bfloat16."""
    model = shapes.skeleton(config, setup.dtype)
    blocks = anatomy.find_blocks(model).modules
    width, hidden_size = setup.dtype.itemsize, output_layer(model).in_features
    widest = max(max(m.in_features, m.out_features) for m in anatomy.linears(blocks[0]).values())
    states = sweep_tokens * hidden_size * width
    moments = ends(model, setup, {"hidden states": states}) | {
        "blocks": {
            "two blocks": sum(sorted(map(_block_bytes, blocks))[-2:]),
            "hidden states": states,
            "forward": 4 * setup.tokens * widest * width,
        }
    }
    if setup.device == "cpu":
        moments["write"] = {"a shard, three times": 3 * sweep_tokens * hidden_size * 2}
        moments["write head"] = {"head, three times": 3 * 2 * output_layer(model).weight.numel()}
    return _fullest(moments)


def ends(model: nn.Module, setup: Setup, kept: dict[str, int]) -> dict[str, dict[str, int]]:
    """The moments at which embeddings and head are in memory: read from their file, and used, with what is `kept`."""
    there = {"embeddings and head": stored_bytes(model, setup) // setup.stored_dtype.itemsize * setup.dtype.itemsize}
    pages = {"their pages": stored_bytes(model, setup)} if setup.device == "cpu" else {}
    return {"load": there | pages, "embed": there | kept}


def stored_bytes(model: nn.Module, setup: Setup) -> int:
    """Bytes on disk of embeddings and head, one if they are tied."""
    weights = {id(w): w.numel() for w in (model.get_input_embeddings().weight, output_layer(model).weight)}
    return sum(weights.values()) * setup.stored_dtype.itemsize


def _block_bytes(block: nn.Module) -> int:
    return sum(p.nbytes for p in block.parameters())


def _fullest(moments: dict[str, dict[str, int]]) -> Prediction:
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Prediction(moment, moments[moment])
