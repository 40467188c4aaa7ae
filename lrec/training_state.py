"""What a training needs to go on exactly, in safetensors and JSON: transformers would pickle it.

`save` and `load` keep a tree of dicts, lists, tuples, numbers, text and tensors in one safetensors file, whose header
holds the tree with a name where each tensor was. `StateFiles` makes a trainer keep its optimizer, schedule, gradient
scaler and random generators so, and end every checkpoint with a manifest: a checkpoint that has none was cut short,
and one that does not agree with it is damaged.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from lrec import checkpoint, checkpoints, documents

TREE = "tree"  # of the metadata in a file's header


def save(path: Path, value: Any) -> None:
    """Writes a tree atomically."""
    tensors: dict[str, Tensor] = {}
    tree = _taken(value, tensors)
    checkpoint.write_tensors(path, tensors, {TREE: json.dumps(tree)})


def _taken(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The node as JSON, its tensors moved into `tensors`."""
    if isinstance(node, np.ndarray):
        return {"array": str(node.dtype), "of": _taken(torch.from_numpy(node.astype(np.int64)), tensors)}
    if isinstance(node, Tensor):
        tensors[name := str(len(tensors))] = node
        return {"tensor": name}
    if isinstance(node, dict):
        return {"dict": [[key, _taken(held, tensors)] for key, held in node.items()]}
    if isinstance(node, (list, tuple)):
        return {type(node).__name__: [_taken(held, tensors) for held in node]}
    assert node is None or isinstance(node, (bool, int, float, str)), f"a training's state holds a {type(node)}"
    return node


def load(path: Path) -> Any:
    """What `save` wrote. Raises ValueError that names the file if it is missing, damaged or something else."""
    with checkpoint.open_tensors(path) as file:
        told = documents.parse((file.metadata() or {}).get(TREE, "null"), f"the header of {path}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
    try:
        return _put_back(told, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no state of a training ({error}); go on from an earlier checkpoint") from error


def _put_back(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "array" in node:
        return _put_back(node["of"], tensors).numpy().astype(node["array"])
    ((kind, held),) = node.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {key: _put_back(value, tensors) for key, value in held}
    return {"list": list, "tuple": tuple}[kind](_put_back(value, tensors) for value in held)


class StateFiles(Trainer):
    """A trainer whose checkpoints hold no pickle. FSDP and DeepSpeed keep their own formats."""

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its generators
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and directory.is_dir():
            checkpoints.finish(directory)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle none reads

    def _own_format(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._own_format():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save(Path(output_dir) / "optimizer.safetensors", self.optimizer.state_dict())
            save(Path(output_dir) / "scheduler.safetensors", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._own_format():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.load_state_dict(load(Path(checkpoint) / "optimizer.safetensors"))
        self.lr_scheduler.load_state_dict(load(Path(checkpoint) / "scheduler.safetensors"))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save(Path(output_dir) / "scaler.safetensors", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None:
            scaler.load_state_dict(load(Path(checkpoint) / "scaler.safetensors"))

    def _generators(self, directory: str) -> Path:
        return Path(directory) / f"generators-{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # another process may not have come so far
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        save(self._generators(output_dir), state | {"cuda": cuda})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._generators(checkpoint).exists():
            return  # of a process that was not there
        state = load(self._generators(checkpoint))
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
