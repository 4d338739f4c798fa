"""One head's attention in float64, tile row by tile row: what it sees, and what it attends to. For inspection only."""

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.reference import entmax_rows
from ..core.tensors import unpack_tiles
from ..core.visibility import FIRST_PARTIAL, HIDDEN, WHOLE

QUERIES = 64  # that are counted together


class HeadSight(NamedTuple):
    """What one head sees in one batch row. intervals: (3, query length); kinds: (query tiles, key tiles) or None; see
    Modifiers."""

    intervals: Tensor
    kinds: Tensor | None
    bits: Tensor | None
    tile: int

    def of(self, index: int, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of some tiles, and which of them each query of a tile sees: (queries, keys) bool."""
        key = (tiles.unsqueeze(-1) * self.tile + torch.arange(self.tile, device=tiles.device)).flatten()
        start, stop, _ = self.intervals[:, self.queries(index)].unsqueeze(-1)
        visible = (start <= key) & (key < stop)
        if self.kinds is not None:
            visible &= self.mask(index, tiles)[: visible.shape[0]]
        return key, visible

    def queries(self, index: int) -> slice:
        return slice(index * self.tile, (index + 1) * self.tile)

    def mask(self, index: int, tiles: Tensor) -> Tensor:
        """(tile or 1, keys of the tiles) bool: what the filter of tiles leaves."""
        kind = self.kinds[index, tiles]
        bits = unpack_tiles(self.bits[(kind - FIRST_PARTIAL).clamp_min(0)], self.tile)
        seen = torch.where((kind >= FIRST_PARTIAL)[:, None, None], bits, (kind == WHOLE)[:, None, None])
        return seen.transpose(0, 1).flatten(1)

    def visible_keys(self) -> list[int]:
        """How many keys each QUERIES queries see together, through a mask by tiles."""
        together = QUERIES // self.tile
        counts = []
        for rows in torch.arange(self.kinds.shape[0]).split(together):
            seen = torch.zeros(self.kinds.shape[1] * self.tile, dtype=torch.bool, device=self.kinds.device)
            for index in rows.tolist():
                key, visible = self.of(index, (self.kinds[index] != HIDDEN).nonzero().flatten())
                seen[key] |= visible.any(0)
            counts.append(int(seen.sum()))
        return counts


class Head(NamedTuple):
    """One head of one batch row: query (query length, head size) and key (key length, head size) in float64.

    live: (query tiles, key tiles). See Modifiers for the rest.
    """

    query: Tensor
    key: Tensor
    alpha: float
    scale: float
    softcap: float
    slope: float
    sight: HeadSight
    live: Tensor

    def live_keys(self) -> Tensor:
        """(ceil(query length / QUERIES),): how many keys each QUERIES queries attend to together."""
        keys = (self.tile_row(index)[1] for index in range(self.live.shape[0]))
        together = QUERIES // self.sight.tile
        groups = iter(lambda: list(islice(keys, together)), [])
        return torch.tensor([torch.cat(group).unique().numel() for group in groups], dtype=torch.int64)

    def tile_row(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one tile of queries: how many keys each attends to, and these keys and probabilities, row after row."""
        queries = self.sight.queries(index)
        key, visible = self.sight.of(index, self.live[index].nonzero().flatten())
        key = key.clamp_max(self.key.shape[0] - 1)  # those past the last one are not visible
        scores = self.scale * (self.query[queries] @ self.key[key].mT)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.slope:
            distance = (self.sight.intervals[2, queries].unsqueeze(-1) - key).abs()
            scores = torch.where(distance == 0, scores, scores - self.slope * distance.double())
        z = ((self.alpha - 1.0) * scores).masked_fill(~visible, -torch.inf)
        place = candidates(z)
        probability, _, _ = entmax_rows(z.gather(-1, place), self.alpha)
        row, column = (probability > 0).nonzero(as_tuple=True)
        return (probability > 0).sum(-1), key[place[row, column]], probability[row, column]


def candidates(z: Tensor) -> Tensor:
    """(rows, keys) -> (rows, n): where in each row its largest entries are, ascending, all of its support among them.

    tau is at least the maximum less 1, which rules most keys out before any is sorted.
    """
    if z.shape[-1] == 0:
        return torch.zeros_like(z, dtype=torch.int64)
    near = (z >= z.amax(-1, keepdim=True) - 1.0) & (z > -torch.inf)
    return z.topk(int(near.sum(-1).amax()), sorted=False).indices.sort(-1).values


def union_sizes(intervals: Tensor, together: int) -> Tensor:
    """(batch, 3, queries) -> (batch, groups) int64: how many keys lie in an interval of each `together` queries."""
    start, stop, _ = intervals.unbind(1)
    start, stop = (end.masked_fill(start >= stop, 0) for end in (start, stop))
    start, stop = (pad(end, (0, -end.shape[-1] % together)).unflatten(-1, (-1, together)) for end in (start, stop))
    start, order = start.sort(-1)
    stop = stop.gather(-1, order)
    covered = pad(stop.cummax(-1).values[..., :-1], (1, 0))  # up to here by the intervals before
    return (stop - start.maximum(covered)).clamp_min(0).sum(-1)
