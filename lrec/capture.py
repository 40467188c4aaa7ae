"""Filling a cache: the teacher runs over all training text once, and never stands in memory as a whole.

The text goes in sweeps of a bounded number of tokens. A sweep is embedded, passes block after block, each read from
safetensors while the one before it runs, and ends as one shard of the cache; then its memory is free for the next one.
So memory holds two blocks and the hidden states of a sweep, and an interrupted capture loses at most one sweep. Several
processes take the sweeps in turn, and write what one would.

Larger sweeps read the weights less often. On a 2-core EPYC (2026-11-25) a block of SmolLM2 takes 15 ms of CPU to load
from the page cache and 0.3 s to run 4096 tokens, so that reading ahead can hide 5 % there; the faster the device and
the slower the disk, the more it hides, as long as reading a block takes no longer than running a sweep through it.
"""

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lrec import checkpoint, load, machine, processes, text, topk
from lrec.cache import HEAD, KEY_BYTES, TargetCache, ids_hash, tokenizer_mark, window_key
from lrec.formats import Packed
from lrec.forward import StreamedForward
from lrec.head import Head, verify_head
from lrec.losses import CHUNK_LOGITS
from lrec.options import setting
from lrec.progress import Progress
from lrec.stream import BlockCall, advance, instead, trim


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """What is stored of each token, and how the teacher runs."""

    what: Literal["hidden", "topk"] = setting("hidden", "last hidden states (exact), or some of the logits")
    hidden_dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16",
        "with hidden: how they are stored; float32 trains bit for bit as a live teacher in it, at twice the bytes",
    )
    top_k: int = setting(256, "with topk: logits stored of each token")
    sampling: bool = setting(False, "with topk: draw them from the teacher, unbiased, instead of the largest")
    sweep_tokens: int = setting(32768, "tokens that pass the teacher at once: what a kill can lose, and a shard")
    batch_size: int = setting(2, "windows run through a block at once")

    @property
    def kind(self) -> str:
        """What the cache is called in its manifest."""
        return "sampled" if self.what == "topk" and self.sampling else self.what


class Capture:
    """One capture: a streamed teacher, windows (n, L) of token ids, and the directory that fills up."""

    def __init__(
        self, streamed: StreamedForward, input_ids_nL: Tensor, output_dir: Path, settings: CaptureSettings, about: dict
    ):
        """`about` goes into the manifest as it is. Raises ValueError if the teacher's head is not what makes its
        logits, or for settings out of range."""
        if min(settings.sweep_tokens, settings.batch_size) < 1:
            raise ValueError("sweep_tokens and batch_size must be at least 1")
        self.streamed, self.ids_nL, self.directory, self.settings = streamed, input_ids_nL, Path(output_dir), settings
        self.head = Head.of(streamed.model)
        with instead(streamed.blocks, lambda hidden, *args, **kwargs: hidden):
            verify_head(streamed.model, self.head)
        vocab_size = self.head.weight.shape[0]
        if settings.what == "topk":
            topk.check_k(settings.top_k, vocab_size)
        self.windows_per_shard = max(1, settings.sweep_tokens // input_ids_nL.shape[1])
        self.about = {
            "kind": settings.kind,
            "top_k": settings.top_k if settings.what == "topk" else None,
            "hidden_dtype": settings.hidden_dtype if settings.what == "hidden" else None,
            "batch_size": settings.batch_size,
            "windows_per_shard": self.windows_per_shard,
            "num_windows": len(input_ids_nL),
            "max_length": input_ids_nL.shape[1],
            "dtype": str(streamed.dtype).removeprefix("torch."),
            "vocab_size": vocab_size,
            "softcap": self.head.softcap,
            "scale": self.head.scale,
            "teacher_sha256": checkpoint.fingerprint(streamed.directory),
            "ids_sha256": ids_hash(input_ids_nL),
            **about,
        }

    @classmethod
    def of(
        cls,
        model: str,
        input_ids_nL: Tensor,
        output_dir: str | Path,
        settings: CaptureSettings,
        device: str,
        dtype: str,
    ) -> "Capture":
        """The capture of a teacher by name (`text.model_path`), computing on this device in this dtype."""
        about = {"teacher": model, "tokenizer": tokenizer_mark(load.tokenizer(model))}
        trim()  # a tokenizer takes tens of megabytes, which need not stay
        place = load.device_of(device)
        streamed = StreamedForward(text.model_path(model), load.dtype_of(dtype, place), place)
        return cls(streamed, input_ids_nL, Path(output_dir), settings, about)

    def plan(self) -> dict:
        """What the cache will hold and take on disk, and whether there is room for what is still missing of it."""
        n, length = self.ids_nL.shape
        k, (vocab_size, width) = self.settings.top_k, self.head.weight.shape
        if self.settings.what == "hidden":
            token_bytes = getattr(torch, self.settings.hidden_dtype).itemsize * width
        else:
            token_bytes = 2 * k + topk.id_bytes(k, vocab_size) + 4
        head_bytes = sum(t.nbytes for t in self._head_tensors().values())
        num_bytes = n * (length * token_bytes + KEY_BYTES) + head_bytes
        there = sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        free = machine.free_disk_bytes(self.directory)
        return {
            "kind": self.settings.kind,
            "num_windows": n,
            "num_tokens": n * length,
            "num_shards": -(-n // self.windows_per_shard),
            "bytes_per_token": token_bytes,
            "head_bytes": head_bytes,
            "bytes": num_bytes,
            "free_bytes": free,
            "fits": num_bytes - there <= free,
        }

    def estimate(self) -> dict:
        """Seconds that the capture takes, from one batch run through two blocks (and the head, for logits)."""
        streamed, batch = self.streamed, self.ids_nL[: self.settings.batch_size]
        states, call = [streamed.embed(batch)], streamed.block_calls(batch[:1])[0]
        read_s = run_s = head_s = 0.0
        for index in (0, min(1, len(streamed) - 1)):
            start = time.monotonic()
            block = streamed.load(index)
            read = time.monotonic()
            advance(block, streamed.anatomy.name(index), states, call)
            # The last of the two counts: the first run of anything is slower.
            read_s, run_s = read - start, time.monotonic() - read
            streamed.free(index)
        if self.settings.what == "topk":
            start = time.monotonic()
            self._stored(streamed.finish(states[0])[:, : max(1, 64 // len(batch))], torch.Generator())
            head_s = (time.monotonic() - start) * batch.shape[1] / max(1, 64 // len(batch))
        logits = " and the logits of 64 of them" if head_s else ""
        sweeps = -(-len(self.ids_nL) // self.windows_per_shard)
        blocks_s = len(streamed) * (sweeps * read_s + run_s * len(self.ids_nL) / len(batch))
        return {
            "estimated_seconds": round(blocks_s + head_s * len(self.ids_nL) / len(batch), 1),
            "estimated_from": f"{batch.numel()} tokens through 2 of {len(streamed)} blocks{logits}, measured just now",
        }

    def run(self) -> dict:
        """Captures every shard not yet on disk; the report. Raises OSError (ENOSPC), before anything is written, if
        the disk has no room, and ValueError for a directory of something else or a block whose output is not finite."""
        plan, start = processes.from_main(self.plan), time.monotonic()
        if not plan["fits"]:
            raise OSError(
                errno.ENOSPC,
                f"the cache takes {plan['bytes']:,} bytes and {self.directory} has {plan['free_bytes']:,} free; "
                "take fewer windows (--num_samples), or fewer bytes a token (--what topk --top_k 64), or another disk",
            )
        calls = self.streamed.block_calls(self.ids_nL[:1])
        cache = TargetCache.begin(self.directory, self.about)
        head_tensors, self.head = self._head_tensors() if processes.is_main() else None, None
        self.streamed.free_embeddings()
        if HEAD not in cache.files:
            cache.add(self.directory / HEAD, head_tensors)
        del head_tensors
        if self.settings.what == "topk":
            self.head = cache.head().to(self.streamed.device)
        windows = self.ids_nL.split(self.windows_per_shard)
        done = sum(map(len, windows[: cache.num_done]))
        with Progress(total=len(windows), initial=cache.num_done, desc="capture", unit="shard") as bar:
            for first in range(cache.num_done, len(windows), processes.count()):
                index = first + processes.index()
                made = self._sweep(windows[index], index, calls) if index < len(windows) else None
                cache.add(cache.shard(index), made)
                bar.update(cache.num_done - bar.n)
        processes.wait()  # for the manifest
        seconds, new = time.monotonic() - start, (len(self.ids_nL) - done) * self.ids_nL.shape[1]
        found = {key: plan[key] for key in ("kind", "num_windows", "num_tokens", "num_shards", "bytes_per_token")}
        on_disk = sum(entry["bytes"] for entry in cache.files.values())
        return found | {"bytes": on_disk, "seconds": round(seconds, 2), "tokens_per_s": round(new / seconds, 1)}

    @torch.no_grad()
    def _sweep(self, ids_nL: Tensor, index: int, calls: list[BlockCall]) -> dict[str, Tensor]:
        streamed = self.streamed
        streamed.load_embeddings()
        states = [streamed.embed(batch) for batch in ids_nL.split(self.settings.batch_size)]
        streamed.free_embeddings()
        visits = zip(streamed.visit(), calls, strict=True)
        for (name, block), call in Progress(visits, "teacher", "block", inner=True, total=len(calls)):
            advance(block, name, states, call)
        # Draws depend on the shard alone, so that a capture that goes on makes the same ones.
        generator = torch.Generator().manual_seed(index)
        for i, state in enumerate(states):
            states[i] = self._stored(streamed.finish(state), generator)
        stored = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        keys = torch.frombuffer(bytearray(b"".join(map(window_key, ids_nL.tolist()))), dtype=torch.uint8)
        return {"keys": keys.reshape(-1, KEY_BYTES), **stored}

    def _stored(self, hidden_BLH: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the cache holds of hidden states that the head is given, each (B, L, ...), on the CPU."""
        if self.settings.what == "hidden":
            return {"hidden": hidden_BLH.to("cpu", getattr(torch, self.settings.hidden_dtype))}
        parts, k = [], self.settings.top_k
        for hidden_nH in hidden_BLH.flatten(0, 1).split(max(16, CHUNK_LOGITS // self.about["vocab_size"])):
            logits_nV = self.head.logits(hidden_nH)
            if self.settings.sampling:
                uniform_n = torch.rand(len(hidden_nH), generator=generator, dtype=torch.float64).to(logits_nV.device)
                parts.append(topk.draws(logits_nV, k, uniform_n))
            else:
                parts.append(topk.largest(logits_nV, k))
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: tensor.unflatten(0, hidden_BLH.shape[:2]).cpu() for name, tensor in whole.items()}

    def _head_tensors(self) -> dict[str, Tensor]:
        weight = self.head.weight.unpack() if isinstance(self.head.weight, Packed) else self.head.weight
        found = {"weight": weight} if self.head.bias is None else {"weight": weight, "bias": self.head.bias}
        return {name: narrowed(tensor) for name, tensor in found.items()}


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 or float16 if that loses nothing, as with weights that were stored so; else itself."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in tensor.split(1024)):
            return tensor.to(dtype)
    return tensor
