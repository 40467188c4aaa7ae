"""How the fused product cuts a weight into tiles, and which weights it can cut.

No triton here: `lrec explain` asks before any kernel is imported.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from lrec.formats import Packed, parse_key
from lrec.formats.salient import SALIENT_BITS
from lrec.formats.ternary import TRITS
from lrec.formats.uniform import groups

TRIT_BITS = 8 / TRITS
# Codes in a word, by bits a code: words are 16 bits long, for three-bit codes 96.
FIELDS = {1: 16, TRIT_BITS: 10, 2: 8, 3: 32, 4: 4, 8: 2}
MIN_KP = 16  # the inner size of a tensor core's product
MAX_GT = 16
# Columns of the product at once, by bits a code; with more, registers spill.
MAX_COLUMNS = {1: 16, TRIT_BITS: 16, 2: 64, 3: 16, 4: 64, 8: 64}
LEVEL_COLUMNS = 16  # beside a row's table
# The same for gradients, which hold an accumulator for each code of a word.
GRADIENT_COLUMNS = {1: 8, TRIT_BITS: 16, 2: 16, 3: 8, 4: 16, 8: 16}
MAX_SPLITS = 16
# What is multiplied, and the tensor whose values dy meets in gradients; None where these are left to slabs.
SCALES = {
    "uniform": "scale",
    "binary": "alpha",
    "ternary": "scale",
    "codebook": None,
    "salient": None,
    "outlier": None,
}
# For sm_90 an outlier is compiled to 150 instructions and 13 for each row of x, and costs as much where it stands in
# the row's tiles but not in the row. Beyond these limits writing and reading a decoded weight is reckoned to cost less.
OUTLIER_ROWS, OUTLIER_TILES = 8, 4
LARGE_N = 4096  # from here on, tiles of 128 rows are enough to go round
PROGRAMS = 528  # four on each of 132 multiprocessors


@dataclass(frozen=True)
class Weight:
    """What of a weight tiles depend on: `bits` a code, `planes` of codes (one, but for binary weights), `group_size`
    columns a scale, whether codes stand for `levels`, and columns a table of levels, or 0 if that serves whole rows."""

    format: str
    shape: tuple[int, int]
    bits: float
    planes: int
    group_size: int
    levels: bool = False
    table_size: int = 0

    @classmethod
    def of(cls, packed: Packed) -> "Weight":
        """That of a packed weight."""
        return cls.of_spec(parse_key(packed.key))

    @classmethod
    def of_spec(cls, spec: dict) -> "Weight":
        """The same from the spec alone; of a salient weight, that of its signs stands for both parts, and of one with
        outliers, that of the others."""
        format_name, (N, K) = spec["format"], spec["shape"]
        if format_name == "uniform":
            return cls(format_name, (N, K), spec["bits"], 1, spec["group_size"])
        if format_name == "binary":
            return cls(format_name, (N, K), 1, spec["tensors"]["qweight"][1][1], spec["group_size"])
        if format_name == "ternary":
            return cls(format_name, (N, K), TRIT_BITS, 1, spec["group_size"])
        if format_name == "salient":
            return cls(format_name, (N, K), 1, 1, K)
        if format_name == "outlier":
            return cls(format_name, (N, K), spec["bits"], 1, K, "table" in spec["tensors"])
        table = spec["tensors"]["table"][1]
        grouped = len(table) == 3 and table[1] > 1
        block = spec["block_size"] if "scale" in spec["tensors"] else K
        return cls(format_name, (N, K), spec["bits"], 1, min(block, K), True, spec["group_size"] if grouped else 0)

    def parts(self, num_salient: int = 0) -> list["Weight"]:
        """What is multiplied one after the other into one sum: of a salient weight its codes and its signs."""
        if self.format != "salient":
            return [self]
        N, K = self.shape
        of_columns = ((SALIENT_BITS, num_salient), (1, K - num_salient))
        return [Weight("salient", (N, size), bits, 1, size) for bits, size in of_columns if size]

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return FIELDS[self.bits]

    @property
    def default_crossover(self) -> int:
        """Up to how many rows of x the product is thought to be faster than slabs where that was not measured."""
        return min(self.max_columns, OUTLIER_ROWS) if self.format == "outlier" else self.max_columns

    @property
    def max_columns(self) -> int:
        """Columns of the product at once."""
        return min(MAX_COLUMNS[self.bits], LEVEL_COLUMNS) if self.levels else MAX_COLUMNS[self.bits]

    def groups_in_tile(self, KP: int) -> int:
        """Groups that a tile of KP words can touch, up to a power of two; 0 if these are too many, or if it would need
        two tables."""
        BK, size = self.fields * KP, self.group_size
        if self.table_size % BK:
            return 0
        if groups(self.shape[1], size) == 1:
            return 1
        most = (BK - math.gcd(BK, size) - 1) // size + 2
        GT = 1 << (most - 1).bit_length()
        return GT if min(MAX_GT, self.max_columns) >= GT else 0

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
        columns = GRADIENT_COLUMNS[weight.bits] if transpose else weight.max_columns
        BM, most = max(8 // GT, 1), columns // GT
        while num_rows > BM and most >= 2 * BM:
            BM *= 2
        K, row_bytes = weight.shape[1], -(-weight.shape[1] // TRITS)
        row_words = -(-row_bytes // 2) if weight.bits == TRIT_BITS else -(-K // 32) * 32 // weight.fields
        tiles = -(-row_words // config.KP)
        return cls(weight.fields * config.KP, GT, BM, tiles, row_words, tiles * config.KP == row_words)


def refuses(spec: dict, transpose: bool = False) -> str | None:
    """Why the fused product cannot take a weight, or its gradient with `transpose`, in words, or None."""
    name = spec["format"]
    if name not in SCALES:
        return f"it multiplies {', '.join(SCALES)} weights, not {name}"
    tensors, K = spec["tensors"], spec["shape"][1]
    if name == "codebook" and "scale" in tensors and K % spec["block_size"]:
        size = spec["block_size"]
        return f"blocks of {size} weights that share a scale cross rows of {K}, as they seldom do: K is no multiple"
    if name == "outlier" and spec["tile"] > OUTLIER_TILES * K:
        return f"rows of {K} are short against tiles of {spec['tile']} weights, whose outliers each row would read"
    weight = Weight.of_spec(spec)
    if not weight.fitting():
        what = f"groups of {weight.group_size} columns"
        what += f" and tables of {weight.table_size}" if weight.table_size else ""
        return f"{what} do not suit tiles of {weight.fields * MIN_KP} columns"
    if transpose and SCALES[name] is None:
        return f"gradients of {name} weights have no fused kernel"
    if transpose and tensors[SCALES[name]][0] not in ("float16", "uint8"):
        return f"gradients meet scales in half precision, which {tensors[SCALES[name]][0]} ones exceed"
    return None


@lru_cache(maxsize=4096)
def default(weight: Weight, num_rows: int) -> Config:
    """A choice that has not been measured: few instructions a weight as compiled for sm_90, enough programs for it."""
    rows, kps = 1 << max(0, num_rows - 1).bit_length(), weight.fitting()
    # Short tiles whose groups and rows fit the eight columns that cost as much as one; the longest of these.
    short = [KP for KP in kps if kps[0] == KP or (KP <= 32 and weight.fields * KP <= 256)]
    free = [KP for KP in short if rows * weight.groups_in_tile(KP) <= 8]
    num_warps = 2 if free or weight.max_columns == 16 else 4
    crowded = weight.levels and weight.bits == 3  # 64 codes in flight and a table beside them
    BN = 32 if crowded else 64 if weight.shape[0] < LARGE_N or (num_warps == 2 and not free) else 128
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
