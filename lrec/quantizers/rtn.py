"""Round to nearest: every weight goes to the nearest point of its group's grid. Needs no data.

By default the grid is searched for the least squared weight error; with `scale_search="minmax"` this is the plain
baseline of the literature.
"""

from dataclasses import dataclass

from torch import Tensor

from lrec.formats.uniform import Uniform
from lrec.grid import encode, per_column
from lrec.quantizers import UniformQuantizer
from lrec.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class RTN(UniformQuantizer):
    """q = clamp(round(w / scale + zero), 0, 2^bits - 1) with `find_grid`'s scale and zero of each group."""

    def quantize(self, w_NK: Tensor, statistics: Statistics | None) -> Uniform:
        """The packed weight; statistics are not used. Raises ValueError if the group size does not fit K."""
        scale_NG, zero_NG = self.grid(w_NK)
        scale_NK, zero_NK = (per_column(g, w_NK.shape[1], self.group_size, w_NK.dtype) for g in (scale_NG, zero_NG))
        return self.pack(encode(w_NK, scale_NK, zero_NK, self.bits).byte(), scale_NG, zero_NG)
