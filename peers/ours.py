"""lrec's own rows: each is the command lines that make it, at the bytes of the peers of its width or fewer.

No row keeps an adapter: what is trained are scales and zeros, which `export` puts in the place of the base's.
"""

from dataclasses import dataclass

QUANTIZE = (
    "quantize --model smollm2 --dataset wikipedia:train --num_samples 16 --method gptq --zero_point float "
    "--scale_bits 8 --init_rank 0"
)
TRAIN = (
    "train --teacher_cache {cache} --dataset wikipedia:train --num_samples 64 --max_length 256 --seed 0 "
    "--max_steps 64 --per_device_train_batch_size 1 --gradient_checkpointing false --dtype bfloat16 --logging_steps 8"
)
EXPORT = "export --format packed"


@dataclass(frozen=True)
class Ours:
    """A row: what its quantizing and its training are given beside what all have."""

    label: str
    quantize: str
    train: str

    def commands(self, place: str, cache: str) -> dict[str, str]:
        """Folder to make -> command line, in order; the last folder is the model."""
        base, trained, packed = (f"{place}/{name}" for name in ("base", "trained", "packed"))
        return {
            base: f"{QUANTIZE} {self.quantize} --output_dir {base}",
            trained: f"{TRAIN.format(cache=cache)} {self.train} --model {base} --output_dir {trained}",
            packed: f"{EXPORT} --model {base} --adapter {trained} --output_dir {packed}",
        }


ROWS = [
    Ours("lrec:2", "--bits 2 --group_size 64", "--train scales,zeros --scales_learning_rate 1e-3"),
    Ours("lrec:2:group_size=16", "--bits 2 --group_size 16", "--train scales,zeros --scales_learning_rate 1e-3"),
    Ours("lrec:3", "--bits 3 --group_size 64", "--train scales,zeros --scales_learning_rate 5e-4"),
    Ours("lrec:4", "--bits 4 --group_size 64", "--train scales,zeros --scales_learning_rate 3e-4"),
    # NF4 with double quantization takes fewer bytes than groups of 64.
    Ours("lrec:4:group_size=128", "--bits 4 --group_size 128", "--train scales,zeros --scales_learning_rate 3e-4"),
]
