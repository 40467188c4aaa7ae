"""JSON that somebody else may have written, damaged or forged, read in one place.

`read` opens a file only if it is a file of its own directory (`own_file`), parses it, and holds it to a shape: a
TypedDict that names what lrec uses of it, each with its type. Whatever is wrong becomes one ValueError that names the
file and the place in it, so that code behind it may index and compare without asking again. Keys that a shape does not
name are kept: a later lrec, or another library, wrote them.
"""

import functools
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

MAX_NAME_BYTES = 255  # of a file, on what Linux, macOS and Windows have
MAX_BYTES = 2**28  # of a JSON document: parsed, it takes ten times as much
T = TypeVar("T")


def _plain(name: str) -> str:
    # The name of ".." is "..", and that of "." or "/" is none.
    if Path(name).name != name or name in ("", "..") or "\0" in name or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise ValueError("is outside its directory, or no name of a file; the file is damaged or hostile")
    return name


Count = Annotated[int, Field(ge=0, lt=2**62, strict=True)]
Size = Annotated[int, Field(ge=1, lt=2**62, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
FileName = Annotated[str, AfterValidator(_plain)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OPEN = ConfigDict(extra="allow", strict=True)


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    __pydantic_config__ = OPEN
    bytes: Count
    sha256: Digest


class Manifest(TypedDict):
    """lrec_manifest.json of a model, and what a cache's has of it."""

    __pydantic_config__ = OPEN
    format_version: Count
    files: dict[FileName, FileEntry]
    calibration: NotRequired[dict[str, Any] | None]


class CacheManifest(Manifest):
    """lrec_manifest.json of a teacher's cache."""

    kind: Literal["hidden", "topk", "sampled"]
    num_windows: Annotated[int, Field(ge=1, lt=2**40)]
    windows_per_shard: Annotated[int, Field(ge=1, lt=2**40)]
    max_length: Annotated[int, Field(ge=1, lt=2**40)]
    vocab_size: Annotated[int, Field(ge=1, lt=2**40)]
    softcap: Number | None
    scale: Number
    teacher: str
    teacher_sha256: str
    tokenizer: "TokenizerMark"


class TokenizerMark(TypedDict):
    """A tokenizer as a cache knows it."""

    size: int
    sha256: str


class Index(TypedDict):
    """model.safetensors.index.json."""

    __pydantic_config__ = OPEN
    weight_map: dict[str, FileName]


class Quantized(TypedDict, total=False):
    """config.json of a quantized model, of any kind."""

    __pydantic_config__ = OPEN
    quantization_config: dict[str, Any] | None


class PackedConfig(TypedDict, total=False):
    """The quantization_config of a packed model; specs are looked at by `formats.check_spec`."""

    __pydantic_config__ = OPEN
    method: str
    layers: list["Layers"] | None
    settings: dict[str, Any] | None
    meta: "Meta | None"


class Layers(TypedDict):
    """The modules that have one spec."""

    __pydantic_config__ = OPEN
    spec: dict[str, Any]
    modules: list[str]


class Spec(TypedDict):
    """A packed weight's spec; the other keys are the settings of its format, see `formats.check_spec`."""

    __pydantic_config__ = OPEN
    format: str
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    tensors: dict[str, Annotated[list[str | list[Count]], Field(min_length=2, max_length=2)]]


class Meta(TypedDict, total=False):
    """What a packed model was made of."""

    __pydantic_config__ = OPEN
    packed_sha256: str | None
    base_model: str | None
    base_sha256: str | None


class Row(TypedDict):
    """What is told of a packed layer."""

    __pydantic_config__ = OPEN
    name: str
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    bytes: Count
    sha256: Digest
    bits: int | float
    spec: Spec


class Progress(TypedDict):
    """lrec_progress.json: how far a quantization has come."""

    __pydantic_config__ = OPEN
    fingerprint: str
    blocks: list[list[Row]]
    seconds: Number
    rest: NotRequired[list[Row]]
    sweep: NotRequired[list[list[dict[str, Any]]]]


class Report(TypedDict):
    """lrec_report.json."""

    __pydantic_config__ = OPEN
    seconds: Number
    layers: list[dict[str, Any]]


class Measured(TypedDict):
    """A row of compare.json."""

    __pydantic_config__ = OPEN
    method: str
    settings: dict[str, Any]
    versions: dict[str, Any]
    bits_per_weight: NotRequired[Number | None]
    total_bytes: NotRequired[Count | None]
    perplexity: NotRequired[Number]
    kl: NotRequired[Number]


class Comparison(TypedDict):
    """compare.json."""

    __pydantic_config__ = OPEN
    settings: dict[str, Any]
    rows: list[Measured]


class Evaluated(TypedDict):
    """A measurement on record."""

    __pydantic_config__ = OPEN
    dataset: str
    perplexity: Number
    kl: NotRequired[Number]
    top1_agreement: NotRequired[Number]


class Record(TypedDict):
    """lrec_evaluation.json."""

    __pydantic_config__ = OPEN
    weights_sha256: str
    rows: list[Evaluated]


class Stamp(TypedDict, total=False):
    """lrec_adapter.json: what an adapter was made for and how."""

    __pydantic_config__ = OPEN
    packed_sha256: str | None
    base_tensors_sha256: str
    correction_sha256: str
    base_model: str | None
    dataset: str | None
    seconds: Number
    loss: Number
    num_steps: Count
    history: list[dict[str, float | int]]


class LoraConfig(TypedDict, total=False):
    """adapter_config.json, as far as it is read here."""

    __pydantic_config__ = OPEN
    peft_type: str
    r: Annotated[int, Field(ge=1, lt=2**20)]
    lora_alpha: Number
    rank_pattern: dict[str, Annotated[int, Field(ge=1, lt=2**20)]] | None
    alpha_pattern: dict[str, Number] | None
    target_modules: list[str] | str | None
    base_model_name_or_path: str | None
    revision: str | None


class TrainerState(TypedDict):
    """trainer_state.json, as far as a training that goes on relies on it."""

    __pydantic_config__ = OPEN
    global_step: Count
    max_steps: Count
    log_history: list[dict[str, Any]]
    best_model_checkpoint: str | None
    stateful_callbacks: dict[str, Any]


def parse(data: bytes | str, where: Path | str) -> Any:
    """The value that JSON text stands for. Raises ValueError, naming `where` it is, for text that is not JSON or is
    nested deeper than Python can follow."""
    try:
        return json.loads(data)
    # ValueError: not JSON, not UTF-8, or a number of more digits than Python will read.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); the file is damaged, fetch or make it again") from error


def check(value: Any, shape: type[T], where: Path | str) -> T:
    """The value itself, keys in their order, if it has this shape. Raises ValueError that names the first three places
    where it has not."""
    try:
        _adapter(shape).validate_python(value)
        return value
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, fault['loc']))[:100]}: {fault['msg'].removeprefix('Value error, ')}, "
            f"but is {str(fault['input'])[:60]!r}"
            for fault in error.errors(include_url=False)[:3]
        ]
        raise ValueError(f"{where} is damaged or made by something else: {'; '.join(found)}") from error


@functools.cache
def _adapter(shape: type) -> TypeAdapter:
    return TypeAdapter(shape)


def load(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError that names the file if it is missing, too large or not JSON."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; is {path.parent} a model directory?")
    own_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; JSON here has at most {MAX_BYTES}: it is damaged")
    return parse(path.read_bytes(), path)


def read(path: Path, shape: type[T] = dict[str, Any]) -> T:
    """The document in a JSON file, of this shape. Raises ValueError as `load` and `check` do."""
    value = load(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return check(value, shape, path)


def own_file(path: Path) -> Path:
    """The path, if it is an ordinary file of its directory, or nothing yet.

    Raises ValueError for devices, pipes and folders, and for a link that leads elsewhere. The Hub's cache links the
    files of a snapshot to others of the same repository, which is not elsewhere.
    """
    try:
        home, real = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{path} leads nowhere ({error}); fetch or make it again") from error
    cached = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    if not real.is_relative_to(home.parents[1] if cached else home):
        raise ValueError(f"{path} is a link to {real}, outside its directory; put the file itself there")
    if real.exists() and not real.is_file():
        raise ValueError(f"{path} is not an ordinary file; remove it, or fetch or make it again")
    return path
