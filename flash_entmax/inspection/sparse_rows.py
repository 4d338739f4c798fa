"""One head's attention in float64, one row of tiles at a time: which keys it sees, and to which it attends."""

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.reference import entmax_rows
from ..core.tensors import ceil_div, unpack_tiles
from ..core.tile_filter import FIRST_PARTIAL, HIDDEN, WHOLE

QUERIES = 64  # consecutive queries whose keys are counted together


class HeadVisibility(NamedTuple):
    """Which keys one head sees in one batch row.

    intervals: (3, query length): first key, one past the last, position. tile_kinds: (query tiles, key tiles) and
    tile_bits: the mask by tiles; None without one. tile: queries, and keys, of a tile.
    """

    intervals: Tensor
    tile_kinds: Tensor | None
    tile_bits: Tensor | None
    tile: int

    def seen(self, index: int, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of these key tiles, and which of them the queries of one tile see: (queries, keys) bool."""
        key = (tiles.unsqueeze(-1) * self.tile + torch.arange(self.tile, device=tiles.device)).flatten()
        start, stop, _ = self.intervals[:, self.queries(index)].unsqueeze(-1)
        visible = (start <= key) & (key < stop)
        if self.tile_kinds is not None:
            visible &= self.mask(index, tiles)[: visible.shape[0]]
        return key, visible

    def queries(self, index: int) -> slice:
        return slice(index * self.tile, (index + 1) * self.tile)

    def mask(self, index: int, tiles: Tensor) -> Tensor:
        """(tile or 1, keys of the tiles) bool: what the mask by tiles leaves."""
        assert self.tile_kinds is not None
        assert self.tile_bits is not None
        kind = self.tile_kinds[index, tiles]
        bits = unpack_tiles(self.tile_bits[(kind - FIRST_PARTIAL).clamp_min(0)], self.tile)
        seen = torch.where((kind >= FIRST_PARTIAL)[:, None, None], bits, (kind == WHOLE)[:, None, None])
        return seen.transpose(0, 1).flatten(1)

    def visible_keys(self, queries: int) -> list[int]:
        """How many keys each group of `queries` queries sees together, through a mask by tiles."""
        kinds, tiles_together = self.tile_kinds, queries // self.tile
        assert kinds is not None
        counts = []
        for rows in torch.arange(kinds.shape[0], device="cpu").split(tiles_together):
            seen = torch.zeros(kinds.shape[1] * self.tile, dtype=torch.bool, device=kinds.device)
            for index in rows.tolist():
                key, visible = self.seen_of_tile(index)
                seen[key] |= visible.any(0)
            counts.append(int(seen.sum()))
        return counts

    def sizes(self) -> Tensor:
        """(query length,) int64: how many keys each query sees."""
        if self.tile_kinds is None:
            start, stop, _ = self.intervals
            return (stop - start).clamp_min(0)
        counts = (self.seen_of_tile(index)[1].sum(-1) for index in range(self.tile_kinds.shape[0]))
        return torch.cat([self.intervals.new_zeros(0), *counts])

    def hidden(self, key_length: int, square: int) -> Tensor:
        """(ceil(query length / square), ceil(key length / square)) bool: no query of the square sees any key of it."""
        start, stop, _ = self.intervals
        if self.tile_kinds is not None:
            squares = ceil_div(len(start), square), ceil_div(key_length, square)
            seen = torch.zeros(squares, dtype=torch.bool, device=start.device)
            for index in range(self.tile_kinds.shape[0]):
                key, visible = self.seen_of_tile(index)
                row, column = visible.nonzero(as_tuple=True)
                seen[(row + index * self.tile) // square, key[column] // square] = True
            return ~seen
        blind, padding = start >= stop, (0, -len(start) % square)
        first = pad(start.masked_fill(blind, key_length), padding, value=key_length).view(-1, square).amin(-1)
        end = pad(stop.masked_fill(blind, 0), padding).view(-1, square).amax(-1)
        key = square * torch.arange(ceil_div(key_length, square), device=start.device)
        return (key + square <= first.unsqueeze(-1)) | (key >= end.unsqueeze(-1))

    def seen_of_tile(self, index: int) -> tuple[Tensor, Tensor]:
        """`seen` of all key tiles that the mask does not hide whole."""
        assert self.tile_kinds is not None
        return self.seen(index, (self.tile_kinds[index] != HIDDEN).nonzero().flatten())


class Head(NamedTuple):
    """One head of one batch row.

    query: (query length, head size) and key: (key length, head size), float64. live: (query tiles, key tiles) bool.
    """

    query: Tensor
    key: Tensor
    alpha: float
    scale: float
    softcap: float
    alibi_slope: float
    visibility: HeadVisibility
    live: Tensor

    def live_keys(self) -> Tensor:
        """(ceil(query length / QUERIES),): how many keys each group of QUERIES queries attends to together."""
        keys = (self.tile_row(index)[1] for index in range(self.live.shape[0]))
        tiles_together = QUERIES // self.visibility.tile
        groups = iter(lambda: list(islice(keys, tiles_together)), [])
        counts = [torch.cat(group).unique().numel() for group in groups]
        return torch.tensor(counts, dtype=torch.int64, device="cpu")

    def tile_row(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """For one tile of queries: how many keys each attends to, then these keys and probabilities, row by row."""
        queries = self.visibility.queries(index)
        key, visible = self.visibility.seen(index, self.live[index].nonzero().flatten())
        key = key.clamp_max(self.key.shape[0] - 1)  # keys past the last one are not visible
        scores = self.scale * (self.query[queries] @ self.key[key].mT)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.alibi_slope:
            distance = (self.visibility.intervals[2, queries].unsqueeze(-1) - key).abs()
            scores = torch.where(distance == 0, scores, scores - self.alibi_slope * distance.double())
        z = ((self.alpha - 1.0) * scores).masked_fill(~visible, -torch.inf)
        candidate = candidates(z)
        probability, _, _ = entmax_rows(z.gather(-1, candidate), self.alpha)
        row, column = (probability > 0).nonzero(as_tuple=True)
        return (probability > 0).sum(-1), key[candidate[row, column]], probability[row, column]


def candidates(z: Tensor) -> Tensor:
    """(rows, keys) -> (rows, n): indices of the largest entries of each row, ascending, with all of its support.

    tau is at least the maximum minus 1, which rules out most keys before any is sorted.
    """
    if z.shape[-1] == 0:
        return torch.zeros_like(z, dtype=torch.int64)
    near = (z >= z.amax(-1, keepdim=True) - 1.0) & (z > -torch.inf)
    return z.topk(int(near.sum(-1).amax()), sorted=False).indices.sort(-1).values


def union_sizes(intervals: Tensor, together: int) -> Tensor:
    """(batch, 3, queries) -> (batch, groups) int64: how many keys lie in the intervals of a group of queries.

    A group is `together` consecutive queries.
    """
    start, stop, _ = intervals.unbind(1)
    start, stop = (end.masked_fill(start >= stop, 0) for end in (start, stop))
    start, stop = (pad(end, (0, -end.shape[-1] % together)).unflatten(-1, (-1, together)) for end in (start, stop))
    start, order = start.sort(-1)
    stop = stop.gather(-1, order)
    covered = pad(stop.cummax(-1).values[..., :-1], (1, 0))  # by the intervals that start earlier: up to here
    return (stop - start.maximum(covered)).clamp_min(0).sum(-1)
