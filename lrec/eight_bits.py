"""Scales and float zeros of `uniform` weights in 8 bits: the numbers there are, the nearest ones, and their codes.

A scale is a code c under an exponent x that `RUN` rows share: (32 + c % 32) * 2^(x + c // 32 - 12), or c * 2^(x - 11)
for c < 32. A zero is (c - 64) * 2^(bits - 7).
"""

import torch
from torch import Tensor

# Rows that share the exponent of their 8-bit scales; integer zeros are packed in the same runs.
RUN = 32
# Between these exponents all 8-bit scales are fp16 numbers; the last is one too many, so that it shows as infinite.
EXPONENTS = (-13, 16)


def per_row(value_R: Tensor, N: int) -> Tensor:
    """What each run of 32 rows shares, (ceil(N/32),), spread over the N rows, (N, 1)."""
    return value_R.repeat_interleave(RUN)[:N, None]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32 for integers from -126 to 127, put together from bits: exact on every device."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def exponents(scale_NG: Tensor) -> Tensor:
    """int8 (ceil(N/32),): floor(log2) of the largest scale of each run of 32 rows, moved into `EXPONENTS`."""
    most_N = scale_NG.amax(1)
    most_R = torch.nn.functional.pad(most_N, (0, -len(most_N) % RUN)).view(-1, RUN).amax(1)
    return (torch.frexp(most_R).exponent - 1).clamp(*EXPONENTS).to(torch.int8)


def round_scales(scale_NG: Tensor, exponent_R: Tensor, dither_NG: Tensor | None = None) -> Tensor:
    """The nearest positive scales that 8 bits hold under these exponents; with a dither the next ones up or down."""
    exponent = per_row(exponent_R.int(), len(scale_NG))
    octave = (torch.frexp(scale_NG).exponent - 1).clamp(exponent - 6, exponent)
    step = power_of_two(octave - 5).to(scale_NG)
    least, most = power_of_two(exponent - 11), 63 * power_of_two(exponent - 5)
    return _whole(scale_NG / step, dither_NG).mul_(step).clamp_(least.to(scale_NG), most.to(scale_NG))


def round_zeros(zero_NG: Tensor, bits: int, dither_NG: Tensor | None = None) -> Tensor:
    """The nearest zeros that 8 bits hold, (c - 64) * 2^(bits - 7) for c = 0 to 255; with a dither the next ones."""
    step = 2.0 ** (bits - 7)
    return _whole(zero_NG.div(step), dither_NG).clamp_(-64, 191).mul_(step)


def dither(like: Tensor, seed: int) -> Tensor:
    """Numbers from [0, 1), the same for every call: with them a value is rounded up as often as it is far up its step.

    Steps of scales are 1.6 to 3 %, and training at a low rate moves most of them by less, all from a number that 8 bits
    hold. To the nearest, they would go back to where they came from; so the many small moves in one direction
    survive, at the price of noise far below that of the codes. SmolLM2 at 3.25 bits had a KL of 0.400, trained 0.337,
    rounded to the nearest 0.393, with a dither 0.343 (16 384 tokens, rate 5e-4, 2-core CPU machine, 2026-11).
    """
    noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))  # on the CPU: equal on all devices
    return noise.to(like.device)


def _whole(value: Tensor, dither: Tensor | None) -> Tensor:
    return value.round_() if dither is None else value.add_(dither).floor_()


def encode_scales(scale_NG: Tensor, exponent_R: Tensor) -> Tensor:
    """The uint8 codes of scales that 8 bits hold under these exponents. Raises ValueError for others."""
    if not torch.equal(round_scales(scale_NG.float(), exponent_R), scale_NG.float()):
        raise ValueError(
            "scale_bits = 8 does not hold these scales exactly; round them with round_scales before choosing codes"
        )
    exponent = per_row(exponent_R.int(), len(scale_NG))
    octave = (torch.frexp(scale_NG).exponent + 6 - exponent).clamp(min=1)
    return (scale_NG.float() * power_of_two(12 - exponent - octave) + 32 * (octave - 1)).to(torch.uint8)


def encode_zeros(zero_NG: Tensor, bits: int) -> Tensor:
    """The uint8 codes of zeros that 8 bits hold. Raises ValueError for others."""
    if not torch.equal(round_zeros(zero_NG.float(), bits), zero_NG.float()):
        raise ValueError(
            "scale_bits = 8 does not hold these zeros exactly; round them with round_zeros before choosing codes"
        )
    return (zero_NG.float() * 2.0 ** (7 - bits) + 64).to(torch.uint8)


def decode_scales(c: Tensor, exponent: Tensor) -> Tensor:
    """float32 scales of uint8 codes; `exponent` is that of each row, an integer (n, 1)."""
    octave = (c.int() // 32).clamp(min=1)
    return (c.int() - 32 * (octave - 1)) * power_of_two(exponent + octave - 12)


def decode_zeros(c: Tensor, bits: int) -> Tensor:
    """float32 zeros of uint8 codes."""
    return (c.float() - 64) * 2.0 ** (bits - 7)
