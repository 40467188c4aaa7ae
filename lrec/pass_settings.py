"""The settings of the block-by-block pass (lrec.blocks) that are no quantizer's own."""

from dataclasses import dataclass

from lrec import embeddings
from lrec.options import setting
from lrec.reconstruct import Reconstruct


@dataclass(frozen=True, kw_only=True)
class PassSettings(Reconstruct):
    """How the pass runs, whatever the quantizer."""

    init_rank: int = setting(32, "rank of the closed-form adapter factors stored with the model (0: none)")
    correct_stream: bool = setting(
        False, "let later blocks see outputs corrected by the factors: better with adapters, worse without them"
    )
    match_upstream: float = setting(
        0.0, "how far, 0 to 1, layers and factors make up for drift upstream (GPTAQ); at 2 bits no gain was measured"
    )
    end_loss_hessian: bool = setting(
        False, "tokens count by their effect on the full model's output; a backward pass, 4096 tokens' states a block"
    )
    min_expert_tokens: int = setting(
        256, "experts that fewer tokens of the calibration text are routed to are calibrated with all of it"
    )
    batch_size: int = setting(1, "windows run through a block at once: more take more memory")
    bits_map: str | None = setting(
        None, "bits of layers by name, the last match holds: down_proj=3,re:.*layers\\.0\\..*=4 (none: bits for all)"
    )
    target_bpw: float | None = setting(
        None, "stored bits per weight to meet with the least error, in place of bits; measures all widths first"
    )
    quantize_embeddings: int | None = setting(None, "bits of embeddings and output head: 8 or 4 (none: as they are)")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.match_upstream <= 1:
            raise ValueError(f"match_upstream = {self.match_upstream}; allowed: 0 (not at all) to 1")
        if self.quantize_embeddings:
            embeddings.check_bits(self.quantize_embeddings)
