"""Tiles of rows and of keys in plain PyTorch: groups of them, what rows see of them, and tensors by tile.

Where there are fewer rows or keys in all than TILE, a tile has only those: `tile_rows` of them. `width` is the number
of keys of a tile, or of a block of a group. A unit is one query head of one batch row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import KeySummary, Problem
from ...core.tensors import WORD_BITS, ceil_div, row_dtype
from ...core.tile_filter import FIRST_PARTIAL, HIDDEN, WHOLE

TILE = 64
CHUNK_SCORES = 2**22


class Group(NamedTuple):
    """Some tiles of rows and, of each, the blocks of keys to compute, filled up to one number with unused ones.

    A block is a tile of keys or, with a width of 1, a single key. Shapes: unit and query_tile (n,), block and used
    (n, m).
    """

    unit: Tensor
    query_tile: Tensor
    block: Tensor
    used: Tensor
    width: int

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        return self.unit, self.query_tile

    @property
    def keys(self) -> Tensor:
        """(n, m, width), the keys of each block."""
        return self.block.unsqueeze(-1) * self.width + torch.arange(self.width, device=self.block.device)

    @property
    def unused(self) -> tuple[Tensor, Tensor]:
        """Rows and columns. (Assigned to by a bool mask, PyTorch goes through all elements.)"""
        return (~self.used).nonzero(as_tuple=True)

    @property
    def used_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the used blocks in a (units, query tiles, blocks) map."""
        row, column = self.used.nonzero(as_tuple=True)
        return self.unit[row], self.query_tile[row], self.block[row, column]

    def part(self, inner: "Group") -> "Group":
        """`inner` counts tiles of rows and blocks of keys within this group; the result counts them as this one."""
        row = inner.query_tile
        first = self.keys.flatten(1)[row].gather(-1, inner.block * inner.width)
        return Group(self.unit[row], self.query_tile[row], first // inner.width, inner.used, inner.width)


def groups(live: Tensor, width: int) -> Iterator[Group]:
    """Group the tiles of rows of a (units, query tiles, blocks) map by live blocks: each at least half the most."""
    query_tiles, live = live.shape[1], live.flatten(0, 1)
    counts = live.sum(-1)
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    start = 0
    while start < len(sizes) and sizes[start] > 0:
        most = sizes[start]
        room = max(1, CHUNK_SCORES // (most * width * TILE))
        stop = start + 1
        while stop < len(sizes) and stop - start < room and 2 * sizes[stop] >= most:
            stop += 1
        rows = order[start:stop]
        used = torch.arange(most, device=rows.device) < counts[rows].unsqueeze(-1)
        block = torch.zeros_like(used, dtype=torch.int64)
        block[used] = live[rows].nonzero(as_tuple=True)[1]
        yield Group(rows // query_tiles, rows % query_tiles, block, used, width)
        start = stop


class TileVisibility(NamedTuple):
    """The keys that each row sees, and what distance takes from their scores: the options in the shape of tiles.

    start, stop and position: (units, query tiles, rows); rows past the last query see nothing. alibi_slopes: (units,);
    the intervals have taken care of infinite ones. tile_kinds: expanded to (batch, heads, query tiles, key tiles).
    """

    start: Tensor
    stop: Tensor
    position: Tensor
    alibi_slopes: Tensor | None
    tile_kinds: Tensor | None
    tile_bits: Tensor | None

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> "TileVisibility":
        *limits, slopes = limits_of(problem, device)
        rows = (pad_rows(numbers.expand(-1, problem.heads, -1), 0) for numbers in limits)
        slopes, kinds = None if slopes is None else slopes.flatten(), problem.visibility.tile_kinds
        if kinds is not None:
            kinds = kinds[..., :-1].expand(problem.batch, problem.heads, ceil_div(problem.query_length, TILE), -1)
        return cls(*rows, slopes, kinds, problem.visibility.tile_bits)

    def tiles(self, problem: Problem) -> Tensor:
        """(units, query tiles, key tiles) bool: False where no row of the tile sees a key of the tile."""
        blind = self.start >= self.stop
        first = self.start.masked_fill(blind, problem.key_length).amin(-1, keepdim=True)
        end = self.stop.masked_fill(blind, 0).amax(-1, keepdim=True)
        key = TILE * torch.arange(ceil_div(problem.key_length, TILE), device=end.device)
        seen = (key + TILE > first) & (key < end)
        if self.tile_kinds is None:
            return seen
        return (seen.unflatten(0, self.tile_kinds.shape[:2]) & (self.tile_kinds != HIDDEN)).flatten(0, 1)

    def kinds_of(self, group: Group) -> Tensor:
        """(n, m), the kind of each block's tile by the mask; unused ones are hidden."""
        if self.tile_kinds is None:
            return torch.where(group.used, WHOLE, HIDDEN)
        unit, query_tile, heads = group.unit.unsqueeze(-1), group.query_tile.unsqueeze(-1), self.tile_kinds.shape[1]
        kinds = self.tile_kinds[unit // heads, unit % heads, query_tile, group.block * group.width // TILE]
        return kinds.masked_fill(~group.used, HIDDEN)

    def mask(self, kind: Tensor, key: Tensor) -> Tensor:
        """(blocks, rows or 1, width or 1) bool: the pairs that the mask leaves.

        kind (blocks,) is that of each block's tile, key (blocks, width) its keys.
        """
        whole = (kind == WHOLE)[:, None, None]
        if self.tile_bits is None:
            return whole
        words = self.tile_bits[(kind - FIRST_PARTIAL).clamp_min(0), : self.start.shape[-1]]
        column = (key % TILE).unsqueeze(1)
        word = (column // WORD_BITS).expand(-1, words.shape[1], -1)
        partial = (words.gather(-1, word) >> column % WORD_BITS & 1).bool()
        return torch.where((kind >= FIRST_PARTIAL)[:, None, None], partial, whole)

    def separations(self, group: Group) -> Tensor:
        """(n, rows, m width): |position of the query - key|."""
        position = self.position[group.rows].to(self.alibi_slopes.dtype).unsqueeze(-1)
        key = group.keys.flatten(1).to(position.dtype).unsqueeze(1)
        return (position - key).abs_()


def limits_of(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """First key, one past the last, and position of each row, (batch, heads or 1, query length); finite ALiBi slopes.

    An infinite slope is an interval of the own position. Its number is 0 in the slopes, (batch, heads).
    """
    start, stop, position = problem.intervals(device).unsqueeze(1).unbind(2)
    slopes = problem.score.alibi_slopes
    if slopes is None:
        return start, stop, position, None
    infinite = slopes == torch.inf
    start = torch.where(infinite.unsqueeze(-1), start.maximum(position), start)
    stop = torch.where(infinite.unsqueeze(-1), stop.minimum(position + 1), stop)
    return start, stop, position, slopes.masked_fill(infinite, 0.0)


def tile_rows(length: int) -> int:
    """Rows or keys of a tile."""
    return max(1, min(TILE, length))


def tiles_of(tensor: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (units, tiles, rows or width, dim) in the compute dtype, filled up with zeros."""
    size = tile_rows(tensor.shape[2])
    rows = pad(tensor.flatten(0, 1), (0, 0, 0, -tensor.shape[2] % size))
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous().unflatten(1, (-1, size))


def pad_rows(rows: Tensor, fill: float) -> Tensor:
    """(batch, heads, length) -> (units, query tiles, rows)."""
    flat, size = rows.flatten(0, 1), tile_rows(rows.shape[2])
    return pad(flat, (0, -flat.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def unpadded(tiles: Tensor, like: Tensor) -> Tensor:
    """(units, tiles, rows or width, ...) -> (batch, heads, length, ...) with these sizes of `like`."""
    return tiles.flatten(1, 2)[:, : like.shape[2]].unflatten(0, like.shape[:2])


def block_places(problem: Problem, group: Group) -> Tensor:
    """(n m,), the place of each block of keys among those of all units."""
    blocks = ceil_div(problem.key_length, TILE) * tile_rows(problem.key_length) // group.width
    return ((group.unit // problem.group).unsqueeze(-1) * blocks + group.block).flatten()


def keys_of(problem: Problem, tiles: Tensor, group: Group) -> Tensor:
    """(n, m width, dim) of a (units, key tiles, width, dim) tensor; zeros in the unused blocks, whatever is there."""
    rows, size = group.used.shape[0], tiles.shape[-1]
    chosen = tiles.view(-1, group.width * size).index_select(0, block_places(problem, group)).view(rows, -1, size)
    chosen.view(*group.block.shape, -1)[group.unused] = 0.0
    return chosen


def summarise(key: Tensor, value_size: int) -> KeySummary:
    """The summary of blocks of keys; see backends.Backend. The stages here do not read it."""
    batch, heads, length, _ = key.shape
    blocks = key.to(row_dtype(key)).split(TILE, 2) if length else ()
    parts = []
    for block in blocks:
        mean = block.mean(2)
        centre = mean.to(key.dtype)
        away = (block - centre.to(block.dtype).unsqueeze(2)).norm(dim=-1).amax(-1)
        missed = (mean - centre.to(mean.dtype)).norm(dim=-1)
        parts.append((centre, away, missed, block.abs().flatten(2).amax(-1)))
    if not parts:
        nothing = key.new_empty(batch, heads, 0, dtype=torch.float32)
        return KeySummary(key.new_empty(batch, heads, 0, key.shape[3]), nothing, nothing, nothing)
    centre, *numbers = (torch.stack(part, 2) for part in zip(*parts, strict=True))
    rounded = (number.float() * (1 + 2.0**-10) for number in numbers[:2])  # as much as the kernels allow for rounding
    return KeySummary(centre, *rounded, numbers[2].float())


def by_block(z: Tensor, group: Group) -> Tensor:
    """(..., m width) -> (..., m, width)."""
    return z.unflatten(-1, (-1, group.width))


def turns(problem: Problem, group: Group) -> Iterator[Tensor]:
    """Places of used blocks among all n m. Each turn has one tile of rows of each unit, so no block of keys twice."""
    turn = occurrence(group.unit // problem.group)
    order = turn.argsort(stable=True)
    row, column = group.used[order].nonzero(as_tuple=True)
    counts = torch.zeros_like(turn).index_add_(0, turn[order][row], torch.ones_like(row))
    return iter((order[row] * group.block.shape[1] + column).split(counts.tolist()))


def add_to_keys(problem: Problem, total: Tensor, group: Group, parts: Tensor) -> None:
    """Add (n, m width, dim) to a (units, key tiles, width, dim) tensor, tile of rows by tile of rows in each unit.

    On a CPU, `index_add_` adds in this order by itself.
    """
    size, on_cpu = group.width * total.shape[-1], total.device.type == "cpu"
    blocks, places = total.view(-1, size), block_places(problem, group)
    for chosen in [group.used.flatten().nonzero().squeeze(-1)] if on_cpu else turns(problem, group):
        blocks.index_add_(0, places[chosen], parts.view(-1, size).index_select(0, chosen))


def occurrence(values: Tensor) -> Tensor:
    """(n,): how often each value has come before."""
    ordered, order = values.sort(stable=True)
    place = torch.arange(len(values), device=values.device)
    return torch.empty_like(order).index_copy_(0, order, place - torch.searchsorted(ordered, ordered))
