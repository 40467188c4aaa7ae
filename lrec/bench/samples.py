"""Random packed weights of every format at its usual settings: for measuring speed, which data do not change."""

import torch
from torch import Tensor

from lrec.formats import Packed, pack_codes
from lrec.formats.binary import Binary
from lrec.formats.codebook import Codebook
from lrec.formats.outlier import TILE, Outlier, encode_positions, golden_stride
from lrec.formats.salient import SALIENT_BITS, Salient
from lrec.formats.ternary import TRITS, Ternary
from lrec.formats.uniform import Uniform, groups

NF4_BLOCK = 64
OUTLIERS = 0.05
SALIENT = 0.2


def words(*shape: int, bits: int) -> Tensor:
    """Random codes in the order of `pack_codes`; the last of the shape counts codes."""
    *lead, n = shape
    return torch.randint(-(2**31), 2**31, (*lead, -(-n // 32) * bits), dtype=torch.int64).int()


def uniform(N: int, K: int, bits: int, group_size: int) -> Uniform:
    """float16 scales and packed zeros."""
    G = groups(K, group_size)
    scale, zero = (torch.rand(N, G) + 0.1).half(), words(G, N, bits=bits)
    qweight = words(N, K, bits=bits)
    return Uniform(shape=(N, K), bits=bits, group_size=group_size, qweight=qweight, scale=scale, zero=zero)


def codebook(N: int, K: int, bits: int, group_size: int) -> Codebook:
    """4 bits as NF4, one table and a float32 scale for 64 weights; fewer as SqueezeLLM, a float16 table a row."""
    shared = bits == 4
    return Codebook(
        shape=(N, K),
        bits=bits,
        group_size=K,
        block_size=NF4_BLOCK if shared else N * K,
        qweight=words(N, K, bits=bits),
        table=torch.randn(2**bits) if shared else torch.randn(N, 2**bits).half(),
        scale=torch.rand(-(-N * K // NF4_BLOCK)) if shared else None,
    )


def binary(N: int, K: int, bits: int, group_size: int) -> Binary:
    """float16 alphas and offsets."""
    G = groups(K, group_size)
    alpha, offset = torch.rand(N, G, bits).half(), torch.randn(N, G).half()
    qweight = words(N, bits, K, bits=1)
    return Binary(shape=(N, K), group_size=group_size, qweight=qweight, alpha=alpha, offset=offset)


def ternary(N: int, K: int, bits: int, group_size: int) -> Ternary:
    """float16 scales."""
    qweight = torch.randint(0, 3**TRITS, (N, -(-K // TRITS)), dtype=torch.uint8)
    return Ternary(
        shape=(N, K), group_size=group_size, qweight=qweight, scale=torch.rand(N, groups(K, group_size)).half()
    )


def outlier(N: int, K: int, bits: int, group_size: int) -> Outlier:
    """Five per cent of the weights are outliers."""
    index, starts = encode_positions(torch.rand(N, K) < OUTLIERS, 6, TILE)
    return Outlier(
        shape=(N, K),
        bits=bits,
        index_bits=6,
        tile=TILE,
        stride=golden_stride(K),
        qweight=words(N, K, bits=bits),
        index=index,
        starts=starts,
        table=torch.randn(N, 2, 2**bits).half(),
    )


def salient(N: int, K: int, bits: int, group_size: int) -> Salient:
    """A fifth of the columns is salient."""
    S = int(SALIENT * K)
    return Salient(
        shape=(N, K),
        num_salient=S,
        qweight=words(N, K - S, bits=1),
        mask=pack_codes((torch.randperm(K) < S).byte(), 1),
        salient=words(N, S, bits=SALIENT_BITS),
        salient_scale=torch.rand(N).half(),
        salient_zero=words(N, bits=SALIENT_BITS),
        scale=torch.rand(N).half(),
        offset=torch.randn(N).half(),
        column=torch.rand(K - S).half(),
    )


# What is measured: name -> (format, bits); salient and ternary weights have one width.
SAMPLES = {
    **{f"uniform {bits}-bit": (uniform, bits) for bits in (2, 3, 4)},
    **{f"codebook {bits}-bit": (codebook, bits) for bits in (2, 3, 4)},
    **{f"binary {bits}-bit": (binary, bits) for bits in (2, 3)},
    "outlier 2-bit": (outlier, 2),
    "salient": (salient, 1),
    "ternary": (ternary, 2),
}


def sample(name: str, shape: tuple[int, int], group_size: int) -> Packed:
    """A weight of that name and shape; groups, where the format has them, of `group_size` columns."""
    make, bits = SAMPLES[name]
    return make(*shape, bits, group_size)
