"""The checkpoints of a training: which are whole, and whether one is as it was written."""

from pathlib import Path

from lrec import checkpoint, documents, foreign


def finish(directory: Path) -> None:
    """Ends a checkpoint: lists what is in it."""
    files = {path.name: checkpoint.file_entry(path) for path in sorted(directory.iterdir()) if path.is_file()}
    files.pop(checkpoint.MANIFEST, None)
    checkpoint.write_json(
        directory / checkpoint.MANIFEST, {"format_version": checkpoint.FORMAT_VERSION, "files": files}
    )


def whole_checkpoints(directory: Path) -> list[Path]:
    """The trainer's checkpoints in a directory, in order of their steps, without any that a killed run left half
    written or half removed: those whose manifest, written last, lists files that are all there."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        step, manifest = path.name.removeprefix("checkpoint-"), path / checkpoint.MANIFEST
        if step.isdecimal() and manifest.is_file():
            files = checkpoint.read_json(manifest, documents.Manifest)["files"]
            if all((path / name).is_file() for name in files):
                found[int(step)] = path
    return [found[step] for step in sorted(found)]


def check_checkpoint(path: Path) -> None:
    """Raises ValueError for a checkpoint of the trainer that is damaged, or has nothing to tell its files by."""
    if not (path / checkpoint.MANIFEST).is_file():
        raise ValueError(f"{path} is no whole checkpoint of lrec (no {checkpoint.MANIFEST}); go on from an earlier one")
    checkpoint.verify(path)
    checkpoint.read_json(path / "trainer_state.json", documents.TrainerState)
    if (path / "adapter_config.json").exists():
        foreign.lora_config(path)
