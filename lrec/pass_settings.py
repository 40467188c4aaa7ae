"""The settings of the block-by-block pass (lrec.blocks) that are no quantizer's own."""

from dataclasses import dataclass

from lrec import allocation, anatomy, embeddings, experts, lora_bits
from lrec.options import setting
from lrec.reconstruct import Reconstruct
from lrec.stream import StreamedModel


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
    allocate_ranks: bool = setting(
        False,
        "let target_bpw pay for adapters too: each layer's factors get the rank, up to init_rank, worth its bytes",
    )
    lora_bits: int = setting(16, "bits in which those adapters will be stored: 16 or 8, as `lrec train` is told")
    quantize_embeddings: int | None = setting(None, "bits of embeddings and output head: 8 or 4 (none: as they are)")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.match_upstream <= 1:
            raise ValueError(f"match_upstream = {self.match_upstream}; allowed: 0 (not at all) to 1")
        if self.allocate_ranks and (self.target_bpw is None or not self.init_rank):
            raise ValueError(
                "allocate_ranks divides target_bpw's bytes among codes and factors of up to init_rank: "
                "give --target_bpw, and --init_rank above 0"
            )
        if self.lora_bits not in lora_bits.WIDTHS:
            raise ValueError(f"lora_bits = {self.lora_bits} is not offered; allowed: 16, 8")
        if self.quantize_embeddings:
            embeddings.check_bits(self.quantize_embeddings)

    def ranks(self) -> list[int]:
        """The ranks that a layer may be allocated; 0 alone where none is."""
        return allocation.ranks_to(self.init_rank) if self.allocate_ranks else [0]

    def check(self, streamed: StreamedModel) -> None:
        """Raises ValueError for `match_upstream` with experts, whose tokens in one model are not those in the other,
        and for ranks that are to be allocated up to one larger than a layer."""
        if self.match_upstream and any(experts.unfused(streamed.model)):
            raise ValueError(
                "match_upstream pairs each token's inputs in both models, but drift routes tokens to other experts; "
                "leave it out for a mixture of experts"
            )
        for i, block in enumerate(streamed.blocks if self.allocate_ranks else []):
            for linear, module in anatomy.linears(block).items():
                if self.init_rank > min(module.weight.shape):
                    raise ValueError(
                        f"init_rank = {self.init_rank} is larger than {streamed.anatomy.name(i)}.{linear}, which "
                        f"is {tuple(module.weight.shape)}; allowed: up to {min(module.weight.shape)}"
                    )
