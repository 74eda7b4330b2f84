"""Window attention with contextual relative positions: tables that queries, keys and values look into.

Lai et al. 2022, "Stratified Transformer" (arXiv 2203.14508, section 3.3); Duan et al. 2023, "ConDaFormer" (arXiv
2312.11112). The position of a point in its window is cut into bins along each axis; a pair looks at the difference of
its bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pc3d.nn.attention import Backend, Windows, window_attention


@dataclass(frozen=True, eq=False)
class BinnedWindows:
    """Windows, and where in them the points lie.

    Attributes:
        windows: which points see each other.
        bins: ``(N, 3)`` int64, the bin of each point along x, y and z, from 0.
        counts: number of bins along each axis.
    """

    windows: Windows
    bins: Tensor
    counts: tuple[int, int, int]


def contextual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    binned: BinnedWindows,
    q_table: Tensor,
    k_table: Tensor,
    v_table: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """``sum_j a_ij (v_j + T_v(r_ij))`` with ``a_i = softmax_j(q_i k_j + q_i T_q(r_ij) + k_j T_k(r_ij))``.

    ``r_ij`` is the bin of the query less that of the key, and ``T(r)`` the sum of one row per axis. No pair is ever
    laid out: a query's products with the table, shifted by its own bin, are numbers per bin of the key, and a one-hot
    key picks one of them. So these terms are ordinary attention with wider queries, keys and values.
    Everything is computed in float32 at least, also under autocast.

    Args:
        q, k, v: ``(N, H, D)``; the scores are not scaled.
        binned: windows and bins of the N points.
        q_table, k_table, v_table: ``(2 L - 1, 3, H, D)``, difference ``r`` along an axis at row ``r + L - 1``; L is at
            least the largest number of bins.
        backend: see :data:`pc3d.nn.attention.Backend`.

    Returns:
        ``(N, H, D)``.

    Raises:
        ValueError: if the tables are too short for the bins.
    """
    if len(q_table) < 2 * max(binned.counts) - 1:
        raise ValueError(f"tables of {len(q_table)} rows are too short for {binned.counts} bins")
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, q_table, k_table, v_table = (t.to(wide) for t in (q, k, v, q_table, k_table, v_table))
        shifts = [_Shift(binned.bins[:, axis], count) for axis, count in enumerate(binned.counts)]
        picked = torch.cat([s.one_hot.to(wide) for s in shifts], 1)[:, None].expand(-1, q.shape[1], -1)
        query_terms = [s.of_queries(q, q_table[:, axis]) for axis, s in enumerate(shifts)]
        key_terms = [s.of_keys(k, k_table[:, axis]) for axis, s in enumerate(shifts)]
        queries, keys = torch.cat([q, *query_terms, picked], 2), torch.cat([k, picked, *key_terms], 2)
        out = window_attention(queries, keys, torch.cat([v, picked], 2), binned.windows, scale=1.0, backend=backend)
        result, *shares = out.split([v.shape[2], *binned.counts], 2)
        for axis, (shift, share) in enumerate(zip(shifts, shares, strict=True)):
            result = result + shift.values(share, v_table[:, axis])
        return result


class _Shift:
    """Differences of the bins of points to all ``count`` bins of an axis."""

    def __init__(self, bins: Tensor, count: int) -> None:
        self.count = count
        self.one_hot = F.one_hot(bins, count)
        away = bins[:, None] - torch.arange(count, device=bins.device) + count - 1
        self.from_here = away[:, None]  # (N, 1, count): this point is the query
        self.to_here = 2 * (count - 1) - away[:, None]  # this point is the key

    def of_queries(self, q: Tensor, table: Tensor) -> Tensor:
        """``(N, H, count)``: ``q_i T(bin_i - u)`` for every bin u."""
        return self._products(q, table).gather(2, self.from_here.expand(-1, q.shape[1], -1))

    def of_keys(self, k: Tensor, table: Tensor) -> Tensor:
        """``(N, H, count)``: ``k_j T(u - bin_j)`` for every bin u."""
        return self._products(k, table).gather(2, self.to_here.expand(-1, k.shape[1], -1))

    def values(self, share: Tensor, table: Tensor) -> Tensor:
        """``(N, H, D)``: ``sum_u share_i(u) T(bin_i - u)``."""
        spread = share.new_zeros(*share.shape[:2], 2 * self.count - 1)
        spread = spread.scatter(2, self.from_here.expand_as(share), share)
        return torch.einsum("nhr,rhd->nhd", spread, self._reached(table))

    def _products(self, rows: Tensor, table: Tensor) -> Tensor:
        return torch.einsum("nhd,rhd->nhr", rows, self._reached(table))

    def _reached(self, table: Tensor) -> Tensor:
        """The middle rows of a table, for the differences that so few bins can have."""
        unused = (len(table) - (2 * self.count - 1)) // 2
        return table[unused : len(table) - unused]
