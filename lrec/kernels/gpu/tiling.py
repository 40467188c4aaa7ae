"""How the fused product cuts a weight into tiles, and which weights it can cut.

No triton here: `lrec explain` asks before any kernel is imported.
"""

from dataclasses import dataclass, replace

from lrec.formats.uniform import groups

# Codes in a word, by bits a code: words are 16 bits long, for three-bit codes 96.
FIELDS = {1: 16, 2: 8, 3: 32, 4: 4, 8: 2}
MIN_KP = 16  # the inner size of a tensor core's product
MAX_GT = 16
# Columns of the product at once, by bits a code; with more, registers spill.
MAX_COLUMNS = {1: 16, 2: 64, 3: 16, 4: 64, 8: 64}
MAX_SPLITS = 16
PROGRAMS = 528  # four on each of 132 multiprocessors


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

    bits: int
    F: int
    BK: int
    GT: int
    BM: int
    tiles: int
    row_words: int
    even: bool

    @classmethod
    def of(cls, spec: dict, num_rows: int, config: Config) -> "Tiling":
        """BK columns a tile, in which GT groups lie; BM rows of x a block, so that GT * BM is 8 to MAX_COLUMNS."""
        bits, F, K = width(spec), FIELDS[width(spec)], spec["shape"][1]
        BK = F * config.KP
        GT = groups_in_tile(spec, BK)
        assert GT, f"{spec} was to be refused"
        BM = max(-(-8 // GT), 1)
        while num_rows > BM and MAX_COLUMNS[bits] >= GT * BM * 2:
            BM *= 2
        row_words = -(-K // 32) * 32 // F
        tiles = -(-row_words // config.KP)
        return cls(bits, F, BK, GT, BM, tiles, row_words, tiles * config.KP == row_words)


def width(spec: dict) -> int:
    """Bits a code: those of a uniform weight, one for each plane of a binary one."""
    return 1 if spec["format"] == "binary" else spec["bits"]


def groups_in_tile(spec: dict, BK: int) -> int:
    """Groups of columns in a tile of BK: 1 where a group holds whole tiles; 0 where neither divides the other."""
    K, size = spec["shape"][1], spec["group_size"]
    if groups(K, size) == 1 or size % BK == 0:
        return 1
    GT = BK // size
    return GT if BK % size == 0 and size % FIELDS[width(spec)] == 0 and GT <= MAX_GT else 0


def fitting(spec: dict) -> list[int]:
    """The sizes KP that suit a weight's groups, ascending."""
    return [KP for KP in (MIN_KP, 32, 64) if groups_in_tile(spec, FIELDS[width(spec)] * KP)]


def refuses(spec: dict) -> str | None:
    """Why the fused product cannot take a weight, in words, or None."""
    if spec["format"] not in ("uniform", "binary"):
        return f"it multiplies uniform and binary weights, not {spec['format']}"
    if not fitting(spec):
        return f"groups of {spec['group_size']} columns do not divide tiles of {FIELDS[width(spec)] * MIN_KP} columns"
    return None


def default(spec: dict, num_rows: int) -> Config:
    """A choice that has not been measured: few instructions a weight as compiled for sm_90, enough programs for it."""
    bits, kps = width(spec), fitting(spec)
    rows = 1 << (num_rows - 1).bit_length()
    # The longest tile whose groups and rows fit the eight columns that cost as much as one.
    free = [KP for KP in kps if KP <= 32 and FIELDS[bits] * KP <= 256 and _columns(spec, KP, rows) <= 8]
    KP = free[-1] if free else kps[0]
    few = MAX_COLUMNS[bits] == 16 or _columns(spec, KP, rows) <= 8
    config = Config(64, KP, 2, 3, 1) if few else Config(128, KP, 4, 3, 1)
    tiling = Tiling.of(spec, num_rows, config)
    programs = -(-spec["shape"][0] // config.BN) * -(-num_rows // tiling.BM)
    return replace(config, splits=max(1, min(tiling.tiles, MAX_SPLITS, -(-PROGRAMS // programs))))


def candidates(spec: dict, num_rows: int) -> list[Config]:
    """What tuning measures, the default first."""
    first = default(spec, num_rows)
    found = [first]
    for KP in [KP for KP in fitting(spec) if KP <= 32 or spec["format"] == "uniform"]:
        for BN, warps in ((64, 2), (64, 4), (128, 4)):
            for splits in (max(1, first.splits // 2), first.splits, min(MAX_SPLITS, first.splits * 2)):
                found.append(Config(BN, KP, warps, 3, splits))
    return list(dict.fromkeys(found))


def _columns(spec: dict, KP: int, rows: int) -> int:
    return rows * groups_in_tile(spec, FIELDS[width(spec)] * KP)
