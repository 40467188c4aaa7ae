"""How the fused product cuts a weight into tiles, and which weights it can cut.

No triton here: `lrec explain` asks before any kernel is imported.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from lrec.formats import Packed, parse_key
from lrec.formats.uniform import groups

# Codes in a word, by bits a code: words are 16 bits long, for three-bit codes 96.
FIELDS = {1: 16, 2: 8, 3: 32, 4: 4, 8: 2}
MIN_KP = 16  # the inner size of a tensor core's product
MAX_GT = 16
# Columns of the product at once, by bits a code; with more, registers spill.
MAX_COLUMNS = {1: 16, 2: 64, 3: 16, 4: 64, 8: 64}
# The same for gradients, which hold an accumulator for each code of a word.
GRADIENT_COLUMNS = {1: 8, 2: 16, 3: 8, 4: 16, 8: 16}
MAX_SPLITS = 16
LARGE_N = 4096  # from here on, tiles of 128 rows are enough to go round
PROGRAMS = 528  # four on each of 132 multiprocessors


@dataclass(frozen=True)
class Weight:
    """What of a weight tiles depend on: `bits` a code, `planes` of codes (one, but for binary weights)."""

    format: str
    shape: tuple[int, int]
    bits: int
    planes: int
    group_size: int

    @classmethod
    def of(cls, packed: Packed) -> "Weight":
        """That of a uniform or binary weight."""
        return cls.of_spec(parse_key(packed.key))

    @classmethod
    def of_spec(cls, spec: dict) -> "Weight":
        """The same from the spec alone."""
        shape = tuple(spec["shape"])
        if "bits" in spec:
            return cls(spec["format"], shape, spec["bits"], 1, spec["group_size"])
        return cls(spec["format"], shape, 1, spec["tensors"]["qweight"][1][1], spec["group_size"])

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return FIELDS[self.bits]

    def groups_in_tile(self, KP: int) -> int:
        """Groups of columns in a tile of KP words: 1 if a group holds whole tiles, 0 if neither divides the other."""
        BK, size = self.fields * KP, self.group_size
        if groups(self.shape[1], size) == 1 or size % BK == 0:
            return 1
        GT = BK // size
        return GT if BK % size == 0 and size % self.fields == 0 and GT <= MAX_GT else 0

    def fitting(self) -> list[int]:
        """The numbers of words in a tile that suit the groups, ascending."""
        return [KP for KP in (MIN_KP, 32, 64) if self.groups_in_tile(KP)]


@dataclass(frozen=True)
class Config:
    """What is tuned: rows of W and words a tile, warps, stages of the pipeline, programs that share the sum over K."""

    BN: int
    KP: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class Tiling:
    """Sizes that follow from a weight, the number of rows of x and a Config."""

    BK: int
    GT: int
    BM: int
    tiles: int
    row_words: int
    even: bool

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, weight: Weight, num_rows: int, config: Config, transpose: bool = False) -> "Tiling":
        """BK columns a tile, in which GT groups lie; BM rows of x a block, so that GT * BM is 8 to MAX_COLUMNS, or with
        `transpose` to GRADIENT_COLUMNS."""
        GT = weight.groups_in_tile(config.KP)
        assert GT, f"{weight} was to be refused"
        columns = (GRADIENT_COLUMNS if transpose else MAX_COLUMNS)[weight.bits]
        BM, most = max(8 // GT, 1), columns // GT
        while num_rows > BM and most >= 2 * BM:
            BM *= 2
        row_words = -(-weight.shape[1] // 32) * 32 // weight.fields
        tiles = -(-row_words // config.KP)
        return cls(weight.fields * config.KP, GT, BM, tiles, row_words, tiles * config.KP == row_words)


def refuses(spec: dict, transpose: bool = False) -> str | None:
    """Why the fused product cannot take a weight, or its gradient with `transpose`, in words, or None."""
    if spec["format"] not in ("uniform", "binary"):
        return f"it multiplies uniform and binary weights, not {spec['format']}"
    weight = Weight.of_spec(spec)
    if not weight.fitting():
        return f"groups of {weight.group_size} columns do not divide tiles of {weight.fields * MIN_KP} columns"
    scales = "alpha" if spec["format"] == "binary" else "scale"
    if transpose and spec["tensors"][scales][0] not in ("float16", "uint8"):
        return f"gradients meet scales in half precision, which {spec['tensors'][scales][0]} ones exceed"
    return None


@lru_cache(maxsize=4096)
def default(weight: Weight, num_rows: int) -> Config:
    """A choice that has not been measured: few instructions a weight as compiled for sm_90, enough programs for it."""
    rows, kps = 1 << max(0, num_rows - 1).bit_length(), weight.fitting()
    # Short tiles whose groups and rows fit the eight columns that cost as much as one; the longest of these.
    short = [KP for KP in kps if kps[0] == KP or (KP <= 32 and weight.fields * KP <= 256)]
    free = [KP for KP in short if rows * weight.groups_in_tile(KP) <= 8]
    num_warps = 2 if free or MAX_COLUMNS[weight.bits] == 16 else 4
    BN = 64 if weight.shape[0] < LARGE_N or (num_warps == 2 and not free) else 128
    config = Config(BN, free[-1] if free else kps[0], num_warps, 3, 1)
    tiling = Tiling.of(weight, num_rows, config)
    programs = -(-weight.shape[0] // BN) * -(-num_rows // tiling.BM)
    return replace(config, splits=max(1, min(tiling.tiles, MAX_SPLITS, -(-PROGRAMS // programs))))


@lru_cache(maxsize=4096)
def default_gradient(weight: Weight, num_rows: int) -> Config:
    """The same for gradients: tiles short enough that the accumulators stay in registers as compiled for sm_90."""
    N, kps = weight.shape[0], weight.fitting()
    short = [KP for KP in kps if kps[0] == KP or weight.fields * KP <= 128]
    config = Config(32 if weight.bits == 3 else 64, short[-1], 2, 3, 1)
    tiling = Tiling.of(weight, num_rows, config, True)
    programs = tiling.tiles * -(-num_rows // tiling.BM)
    return replace(config, splits=max(1, min(-(-N // config.BN), MAX_SPLITS, -(-PROGRAMS // programs))))


def candidates(weight: Weight, num_rows: int, transpose: bool = False) -> list[Config]:
    """What tuning measures, the default first; for several rows only tiles as long as the default's."""
    if transpose:
        first = default_gradient(weight, num_rows)
        halves = dict.fromkeys((max(1, first.splits // 2), first.splits, min(MAX_SPLITS, first.splits * 2)))
        lengths = [KP for KP in weight.fitting() if weight.fields * KP <= 2 * 128] or [first.KP]
        found = [replace(first, KP=KP, BN=BN, splits=s) for KP in lengths for BN in (32, 64) for s in halves]
        return list(dict.fromkeys([first, *found]))
    first = default(weight, num_rows)
    found = [first]
    for KP in [KP for KP in weight.fitting() if weight.fields * KP <= 512] if num_rows == 1 else [first.KP]:
        for BN, warps in ((64, 2), (128, 2), (128, 4)):
            for splits in (max(1, first.splits // 2), first.splits, min(MAX_SPLITS, first.splits * 2)):
                found.append(Config(BN, KP, warps, 3, splits))
    return list(dict.fromkeys(found))
