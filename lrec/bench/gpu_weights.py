"""Random packed weights on the GPU, of each kind that `bench.gpu` measures."""

import torch
from torch import Tensor

from lrec.formats import Packed, pack_codes
from lrec.formats.binary import Binary
from lrec.formats.codebook import Codebook
from lrec.formats.outlier import Outlier
from lrec.formats.salient import Salient
from lrec.formats.ternary import TRITS, Ternary
from lrec.formats.uniform import Uniform, groups

DEVICE = "cuda"
BITS = (2, 3, 4)


def weights(N: int, K: int, group_size: int) -> list[Packed]:
    """A random weight on the GPU of each kind that is measured; any bits are codes where K is a multiple of 32."""
    G = groups(K, group_size)
    settings = {"shape": (N, K), "group_size": group_size}
    uniform = [
        Uniform(**settings, bits=b, qweight=words(N, K // 32 * b), scale=numbers(N, G), zero=b * numbers(N, G))
        for b in BITS
    ]
    planes = Binary(**settings, qweight=words(N, 2, K // 32), alpha=numbers(N, G, 2), offset=numbers(N, G))
    return [*uniform, planes]


def others(N: int, K: int, group_size: int) -> list[Packed]:
    """Kinds that are measured at one shape: sixteen levels in blocks of 64, trits, two bits with 5 % of outliers, and a
    fifth of columns in 4 bits, which has two kinds of codes and so no Config of its own to tune."""
    blocks, G, S = N * K // 64, groups(K, group_size), K // 160 * 32
    table = torch.randn(16, device=DEVICE)
    levels = Codebook(
        shape=(N, K), bits=4, group_size=K, block_size=64, qweight=words(N, K // 8), table=table, scale=numbers(blocks)
    )
    bytes_NB = torch.randint(0, 243, (N, -(-K // TRITS)), dtype=torch.uint8, device=DEVICE)
    trits = Ternary(shape=(N, K), group_size=group_size, qweight=bytes_NB, scale=numbers(N, G))
    codes, marked = torch.randint(0, 4, (N, K), device=DEVICE), torch.rand(N, K, device=DEVICE) < 0.05
    outliers = Outlier.pack(codes, marked, (numbers(N, 2), numbers(N, 2)), 2, 6)
    mask = pack_codes((torch.randperm(K, device=DEVICE) < S).byte(), 1)
    salient = Salient(
        shape=(N, K), num_salient=S, qweight=words(N, (K - S) // 32), mask=mask, salient=words(N, S // 8),
        salient_scale=numbers(N), salient_zero=words(-(-N // 32) * 4), scale=numbers(N), offset=numbers(N),
        column=numbers(K - S),
    )  # fmt: skip
    return [levels, trits, outliers, salient]


def words(*shape: int) -> Tensor:
    """Random int32."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)


def numbers(*shape: int) -> Tensor:
    """Random positive halves."""
    return torch.rand(shape, device=DEVICE).half() + 0.1
