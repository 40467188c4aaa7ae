"""Files damaged and forged in every way that a seed gives, and whether a reader of them stays in hand.

`damaged(path, seed)` puts something else in a file's place: bytes cut, flipped, repeated; for JSON, and for the JSON in
the header of safetensors, nodes exchanged for others of wrong types, sizes and depths, and for paths that lead out; or
a link, a pipe, a folder. `survey` runs a reader on one mutation after another in a process of its own and says what a
ValueError does not cover: other exceptions, death, more than 5 s, more than 1 GB, files opened outside.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch

SECONDS, GROWTH_BYTES = 5.0, 2**30
IN_OPEN = 0x20


def damaged(path: Path, seed: int, outside: Path) -> str:
    """Damages a file in the way that the seed says; what was done, in a word."""
    chance, data = random.Random(seed), path.read_bytes()
    if chance.random() < 0.03:
        return _replaced(path, chance, outside)
    ways = [cut, flipped, scribbled, repeated, torn]
    tree = _tree(path, data)
    if tree is not None and chance.random() < 0.7:
        ways = [retyped]
    way = chance.choice(ways)
    path.write_bytes(way(data, chance, path, outside))
    return way.__name__


def _replaced(path: Path, chance: random.Random, outside: Path) -> str:
    kind = chance.choice(["link out", "loop", "pipe", "folder", "device", "empty", "gone"])
    data = path.read_bytes()
    path.unlink()
    if kind == "link out":
        (outside / path.name).write_bytes(data)
        path.symlink_to(outside / path.name)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()
    return kind


def cut(data: bytes, chance: random.Random, *_) -> bytes:
    """The file ends early."""
    return data[: chance.randrange(max(len(data), 1))]


def flipped(data: bytes, chance: random.Random, *_) -> bytes:
    """One to eight bits are others, mostly at the start, where headers are."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        reach = chance.choice([16, 4096, len(changed)])
        changed[chance.randrange(min(reach, len(changed)))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def scribbled(data: bytes, chance: random.Random, *_) -> bytes:
    """A run of bytes is random, or all ones as the largest number."""
    at, count = chance.randrange(len(data)), chance.choice([1, 4, 8, 64])
    new = chance.choice([chance.randbytes(count), b"\xff" * count, b"\0" * count])
    return data[:at] + new + data[at + count :]


def repeated(data: bytes, chance: random.Random, *_) -> bytes:
    """A run of bytes stands there twice."""
    at = chance.randrange(len(data))
    return data[: at + 64] + data[at:]


def torn(data: bytes, chance: random.Random, *_) -> bytes:
    """A run of bytes is missing."""
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.randint(1, 4096) :]


def retyped(data: bytes, chance: random.Random, path: Path, outside: Path) -> bytes:
    """One to three nodes of the JSON are something else."""
    tree = _tree(path, data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        tree = _retyped(tree, chance, outside)
    text = json.dumps(tree)
    if chance.random() < 0.05:
        text = text.replace("[]", "[" * 100_000, 1) if "[]" in text else '{"a":' * 100_000 + text
    if path.suffix == ".json":
        return text.encode()
    (size,) = struct.unpack("<Q", data[:8])
    header = text.encode()
    declared = chance.choice([len(header)] * 8 + [2**40, 2**63 - 1])
    return struct.pack("<Q", declared) + header + data[8 + size :]


def _tree(path: Path, data: bytes):
    """The JSON of a file, or of its header, if it has any."""
    if path.suffix == ".json":
        return json.loads(data)
    if path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + size])
    return None


def _retyped(tree, chance: random.Random, outside: Path):
    places = list(_places(tree))
    if not places:
        return _wrong(tree, chance, outside)
    holder, key = chance.choice(places)
    if isinstance(holder, dict) and chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = _wrong(holder[key], chance, outside)
    return tree


def _places(node):
    """Every (holder, key) of a tree, at random depths."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, held in items:
        yield node, key
        yield from _places(held)


def _wrong(value, chance: random.Random, outside: Path):
    forged = [None, True, 0, 1, -1, 2**31, 2**40, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", [], {}]
    forged += [
        "../" + outside.name + "/secret.safetensors",
        str(outside / "secret.safetensors"),
        "/dev/zero",
        "..",
        "a\0b",
    ]
    forged += ["é" * 10_000, [value], {"x": value}, [[[[[[value]]]]]], "float64", "complex128", "F64", "__reduce__"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        forged += [value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)] * 2
    return chance.choice(forged)


class Opened:
    """Counts openings of files in a folder, by whichever library: the kernel tells (inotify)."""

    def __init__(self, folder: Path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK)
        assert self.libc.inotify_add_watch(self.fd, str(folder).encode(), IN_OPEN) >= 0

    def any(self) -> bool:
        """Whether a file was opened since the last call."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self.fd, 65536))
        return False


def survey(
    folder: Path, name: str, read: Callable[[Path], object], count: int, first: int = 0, may_link: bool = False
) -> list[str]:
    """Runs `read(folder)` with folder/name damaged in `count` ways; what went wrong, a line each.

    A reading may succeed or raise ValueError with a message; the file is put back after each. `may_link` is for files
    that a command names: their owner may have made them links.
    """
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    faults, at, path = [], first, folder / name
    whole = path.read_bytes()
    try:
        while at < first + count:
            ours, theirs = multiprocessing.Pipe()
            child = multiprocessing.get_context("fork").Process(
                target=_worker, args=(theirs, folder, name, read, range(at, first + count), outside, may_link)
            )
            child.start()
            theirs.close()
            faults += _watched(ours, child, at)
            at = faults.pop()
    finally:
        _restore(path, whole)
    return faults


def _watched(pipe, child, at: int) -> list:
    """What a worker reports until it ends or hangs; last, the mutation to go on with."""
    faults = []
    while True:
        if not pipe.poll(4 * SECONDS):
            child.kill()
            child.join()
            return [*faults, f"mutation {at}: no answer for {4 * SECONDS:.0f} s", at + 1]
        try:
            at, fault = pipe.recv()
        except EOFError:
            child.join()
            died = [] if child.exitcode == 0 else [f"mutation {at}: died with {child.exitcode}"]
            return [*faults, *died, at + 1]
        faults += [f"mutation {at}: {fault}"] if fault else []


def _worker(pipe, folder: Path, name: str, read: Callable, seeds: range, outside: Path, may_link: bool) -> None:
    path = folder / name
    whole, opened = path.read_bytes(), Opened(outside)
    torch.set_num_threads(1)  # a fork of a process whose OpenMP threads have worked would hang
    for seed in seeds:
        pipe.send((seed, None))
        how = damaged(path, seed, outside)
        opened.any()
        # The processor's seconds: other jobs on the machine are not the reader's fault. Who sleeps, `_watched` finds.
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        fault = _outcome(read, folder)
        seconds = time.process_time() - start
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if fault is None and seconds > SECONDS:
            fault = f"took {seconds:.1f} s"
        if fault is None and grown > GROWTH_BYTES:
            fault = f"took {grown / 2**30:.1f} GB"
        if fault is None and opened.any() and not (may_link and how == "link out"):
            fault = "a file outside was opened"
        _restore(path, whole)
        if fault:
            pipe.send((seed, f"({how}) {fault}"))
    pipe.close()


def _outcome(read: Callable, folder: Path) -> str | None:
    try:
        read(folder)
    except ValueError as error:
        return None if str(error).strip() else "a ValueError that says nothing"
    except BaseException as error:
        import traceback

        return f"{type(error).__name__}: {str(error)[:200]} at {traceback.extract_tb(error.__traceback__)[-1]}"
    return None


def _restore(path: Path, whole: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(whole)
