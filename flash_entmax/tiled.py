"""The algorithm in plain PyTorch, tile by tile: for CPU tensors, float64, and any device without Triton.

The stages are those of the kernels. Scores are computed once, densely, for a bounded chunk of rows; the maxima of their
blocks of keys certify which tiles can hold support; the solve, the output and the gradient then touch only those tiles.
Tiles of rows that read about as many tiles of keys form a group, so that each stage is a few batched operations.
Arithmetic is in float32 (float64 for float64 inputs). No temporary holds more than a few times CHUNK_SCORES numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .problem import Problem, ceil_div, pack_tiles, unpack_tiles
from .threshold import (
    MAX_STEPS,
    Bracket,
    certified_offset,
    probability,
    smallest_offset,
    support_weight,
    tolerance,
)

TILE = 64
CHUNK_SCORES = 2**22


class Solution(NamedTuple):
    """What the forward pass returns; value_mean, maximum, offset and live are what the gradient needs."""

    output: Tensor
    value_mean: Tensor
    maximum: Tensor
    offset: Tensor
    live: Tensor


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


class Group(NamedTuple):
    """Some tiles of rows and, of each, its live tiles of keys, filled up to one number with unused ones.

    A unit is one query head of one batch row. Shapes: unit and query_tile (n,), key_tile and used (n, m).
    """

    unit: Tensor
    query_tile: Tensor
    key_tile: Tensor
    used: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        return self.unit, self.query_tile

    def keys(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Index of the tiles of keys in a (key heads of all batch rows, key tiles, ...) tensor."""
        return (self.unit // problem.group).unsqueeze(-1), self.key_tile


def groups(live: Tensor) -> Iterator[Group]:
    """Group the tiles of rows of a (units, query tiles, key tiles) map by live tiles: each at least half the most."""
    counts = live.sum(-1).flatten()
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    start = 0
    while start < len(sizes) and sizes[start] > 0:
        most = sizes[start]
        room = max(1, CHUNK_SCORES // (most * TILE * TILE))
        stop = start + 1
        while stop < len(sizes) and stop - start < room and 2 * sizes[stop] >= most:
            stop += 1
        rows = order[start:stop]
        marks = live.flatten(0, 1)[rows]
        key_tile = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
        yield Group(rows // live.shape[1], rows % live.shape[1], key_tile, marks.gather(-1, key_tile))
        start = stop


def attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Solution:
    """Output and value_mean (input dtype), maximum and offset (compute dtype), and the packed map of live tiles."""
    query_tiles, key_tiles = ceil_div(problem.query_length, TILE), ceil_div(problem.key_length, TILE)
    units = problem.batch * problem.heads
    output, value_mean = (
        torch.zeros(units, problem.query_length, problem.value_size, dtype=query.dtype, device=query.device)
        for _ in range(2)
    )
    maximum = torch.full(output.shape[:2], torch.inf, dtype=compute_dtype(query), device=query.device)
    offset = torch.ones_like(maximum)
    live = torch.zeros(units, query_tiles, key_tiles, dtype=torch.bool, device=query.device)
    if not problem.is_empty:
        for heads, chunk in chunks(problem):
            part = attend_chunk(problem, query, key, value, heads, chunk)
            for whole, piece in zip((output, value_mean, maximum, offset), part, strict=False):
                whole[heads, chunk] = piece.flatten(1, 2)[:, : chunk.stop - chunk.start].to(whole.dtype)
            marks = part[-1]
            live[heads, chunk.start // TILE :, : marks.shape[2]][:, : marks.shape[1]] = marks
    whole = output, value_mean, maximum, offset, pack_tiles(live)
    return Solution(*(tensor.unflatten(0, (problem.batch, problem.heads)) for tensor in whole))


def chunks(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Slices of units and of rows (whole tiles) whose scores fit CHUNK_SCORES, or one tile of rows where none do."""
    units = problem.batch * problem.heads
    rows = min(problem.query_length, max(TILE, CHUNK_SCORES // problem.key_length // TILE * TILE))
    step = max(1, CHUNK_SCORES // (rows * problem.key_length))
    for unit in range(0, units, step):
        for row in range(0, problem.query_length, rows):
            yield slice(unit, min(units, unit + step)), slice(row, min(problem.query_length, row + rows))


def attend_chunk(problem: Problem, query: Tensor, key: Tensor, value: Tensor, heads: slice, chunk: slice):
    """All stages for some units and rows: output, value_mean, maximum, offset by (unit, tile, row), and live tiles."""
    units = torch.arange(heads.start, heads.stop, device=query.device)
    most = int(problem.visible(query.device)[chunk.stop - 1])
    q = padded(rows_of(query, units)[:, chunk])
    k, v = (padded(rows_of(tensor, units // problem.group)[:, :most]) for tensor in (key, value))
    visible = pad(problem.visible(query.device)[chunk], (0, q.shape[1] - (chunk.stop - chunk.start)))

    scores = torch.bmm(q, k.mT).mul_(problem.slope)
    hide(scores, visible)
    scores = scores.unflatten(1, (-1, TILE)).unflatten(-1, (-1, TILE))
    visible = visible.view(-1, TILE)
    block_maxima = scores.amax(-1)
    maximum = torch.where(visible > 0, block_maxima.amax(-1), torch.inf)
    offset = certified_offset(block_maxima, maximum, problem.alpha)
    live = survivors(block_maxima, maximum, offset)

    output, value_mean = (v.new_zeros(*maximum.shape, v.shape[-1]) for _ in range(2))
    values = v.unflatten(1, (-1, TILE))
    for group in groups(live):
        relative = gathered(scores, group) - maximum[group.rows].unsqueeze(-1)
        low = smallest_offset(visible[group.query_tile].to(offset.dtype), problem.alpha)
        pending = maximum[group.rows] < torch.inf
        offset[group.rows] = solve(problem.alpha, relative, pending, low, offset[group.rows])
        v_group = tiles_of_keys(values, group.unit.unsqueeze(-1), group)
        parts = outputs(problem.alpha, relative, offset[group.rows], v_group)
        output[group.rows], value_mean[group.rows] = parts
    return output, value_mean, maximum, offset, survivors(block_maxima, maximum, offset)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows_of(tensor: Tensor, units: Tensor) -> Tensor:
    """(units, length, dim) in the compute dtype, of the given heads of a (batch, heads, length, dim) tensor."""
    heads = tensor.shape[1]
    return tensor[units // heads, units % heads].to(compute_dtype(tensor))


def padded(rows: Tensor) -> Tensor:
    """(..., length, dim) with rows of zeros up to a whole number of tiles, at least one."""
    length = rows.shape[-2]
    return pad(rows, (0, 0, 0, TILE * max(1, ceil_div(length, TILE)) - length))


def hide(scores: Tensor, visible: Tensor) -> None:
    """Write -inf over every (row, key) with key >= visible[row]; columns that all rows see are not touched."""
    first = int(visible.min())
    keys = torch.arange(first, scores.shape[-1], device=scores.device)
    scores[..., first:].masked_fill_(keys >= visible.unsqueeze(-1), -torch.inf)


def survivors(block_maxima: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """(units, query tiles, key tiles) bool: some row of the tile may have a score above its threshold. NaN survives."""
    distance = block_maxima - maximum.unsqueeze(-1) + offset.unsqueeze(-1)
    return ~(distance <= 0).all(2)


def gathered(scores: Tensor, group: Group) -> Tensor:
    """(n, TILE, m TILE): the live tiles of each tile of rows side by side; -inf in the unused ones."""
    tiles = scores[group.unit.unsqueeze(-1), group.query_tile.unsqueeze(-1), :, group.key_tile]
    tiles.masked_fill_(~group.used[:, :, None, None], -torch.inf)
    return tiles.transpose(1, 2).flatten(2)


def solve(alpha: float, relative: Tensor, pending: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The offset of every row, from z - maximum over its live tiles, starting from the certified `high`.

    A tile of rows leaves once all its pending rows have converged.
    """
    result, offset = high.clone(), high
    bracket = Bracket(low, high, alpha)
    active = torch.arange(high.shape[0], device=high.device)
    for _ in range(MAX_STEPS):
        distance = (relative + offset.unsqueeze(-1)).clamp_min_(0)
        total, weight = probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1)
        count = (distance > 0).sum(-1).to(offset.dtype) if alpha == 1.5 else None
        pending = pending & ((total - 1).abs() > tolerance(offset))
        stepped = torch.where(pending, bracket.step(offset, total, weight, count), offset)
        pending, offset = pending & (stepped != offset), stepped
        result[active] = offset
        keep = pending.any(-1)
        if not keep.any():
            break
        if not keep.all():
            relative, offset, pending, active = relative[keep], offset[keep], pending[keep], active[keep]
            bracket.low, bracket.high = bracket.low[keep], bracket.high[keep]
    return result


def outputs(alpha: float, relative: Tensor, offset: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O = sum p v and O1 = sum u v / sum u, with one more step of tau on the output itself.

    dO / d offset = r sum u v, so the step (1 - sum p) / (r sum u) adds (1 - sum p) O1.
    """
    distance = (relative + offset.unsqueeze(-1)).clamp_min_(0)
    p, u = probability(distance, alpha), support_weight(distance, alpha)
    weight = u.sum(-1, keepdim=True)
    mean = product(u, v) / torch.where(weight == 0, 1, weight)
    return product(p, v) + (1 - p.sum(-1, keepdim=True)) * mean, mean


def product(p: Tensor, v: Tensor, block: int = 512) -> Tensor:
    """p @ v, a block of keys at a time: a float32 sum of 131,072 equal parts in one go would be off by 5e-4."""
    return sum(p[..., start : start + block] @ v[:, start : start + block] for start in range(0, p.shape[-1], block))


def tiles_of_keys(tiles: Tensor, unit: Tensor, group: Group) -> Tensor:
    """(n, m TILE, dim) of a (units, key tiles, TILE, dim) tensor; zeros in the unused tiles, whatever is there."""
    return tiles[unit, group.key_tile].masked_fill_(~group.used[:, :, None, None], 0.0).flatten(1, 2)


def attention_backward(
    problem: Problem,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_mean: Tensor,
    maximum: Tensor,
    offset: Tensor,
    live: Tensor,
) -> Gradients:
    """dQ, dK and dV over the live tiles: dS = u (dP - delta), delta = dO . O1. Sums run in one order on every call."""
    q, k, v, do = (tiles_of(tensor) for tensor in (query, key, value, grad_output))
    delta = pad_rows((grad_output.to(offset.dtype) * value_mean.to(offset.dtype)).sum(-1), 0.0)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for group in groups(unpack_tiles(live, ceil_div(problem.key_length, TILE)).flatten(0, 1)):
        rows, keys = group.rows, group.keys(problem)
        k_group, v_group = (tiles_of_keys(tensor, keys[0], group) for tensor in (k, v))
        distance = distances(problem, q[rows], k_group, maximum[rows], offset[rows], group)
        p, u = probability(distance, problem.alpha), support_weight(distance, problem.alpha)
        ds = u.mul_(torch.bmm(do[rows], v_group.mT).sub_(delta[rows].unsqueeze(-1)))
        dq[rows] = ds @ k_group
        add_tiles(dk, keys, group.used, ds.mT @ q[rows])
        add_tiles(dv, keys, group.used, p.mT @ do[rows])
    gradients = zip((dq * problem.scale, dk * problem.scale, dv), (query, key, value), strict=True)
    return Gradients(*(unpadded(blocks, like) for blocks, like in gradients))


def tiles_of(tensor: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (units, tiles, TILE, dim) in the compute dtype."""
    return padded(tensor.flatten(0, 1)).to(compute_dtype(tensor)).unflatten(1, (-1, TILE))


def pad_rows(rows: Tensor, fill: float) -> Tensor:
    """(batch, heads, length) -> (units, query tiles, TILE)."""
    flat = rows.flatten(0, 1)
    return pad(flat, (0, -flat.shape[-1] % TILE), value=fill).unflatten(-1, (-1, TILE))


def distances(problem: Problem, q: Tensor, k: Tensor, maximum: Tensor, offset: Tensor, group: Group) -> Tensor:
    """[z - tau]_+ of (n, TILE, m TILE) computed anew; 0 where the key is not visible and in unused tiles."""
    z = torch.bmm(q, k.mT).mul_(problem.slope)
    visible = pad(problem.visible(z.device), (0, -problem.query_length % TILE)).view(-1, TILE)[group.query_tile]
    key = group.key_tile.unsqueeze(-1) * TILE + torch.arange(TILE, device=z.device)
    key = key.masked_fill_(~group.used.unsqueeze(-1), problem.key_length).flatten(1)
    z.masked_fill_(key.unsqueeze(1) >= visible.unsqueeze(-1), -torch.inf)
    return z.sub_(maximum.unsqueeze(-1)).add_(offset.unsqueeze(-1)).clamp_min_(0)


def add_tiles(total: Tensor, keys: tuple[Tensor, Tensor], used: Tensor, parts: Tensor) -> None:
    """Add (n, m TILE, dim) to the tiles of keys, one tile of rows after the other: within one, no tile comes twice."""
    unit, key_tile = keys
    for row, count in enumerate(used.sum(-1).tolist()):
        total[unit[row, 0]][key_tile[row, :count]] += parts[row, : count * TILE].unflatten(0, (count, TILE))


def unpadded(blocks: Tensor, like: Tensor) -> Tensor:
    """(units, tiles, TILE, dim) -> the shape and dtype of `like`, contiguous."""
    return blocks.flatten(1, 2)[:, : like.shape[2]].to(like.dtype).reshape(like.shape).contiguous()


def support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum in units of z, the support size of each row (int32) and the exact map of live tiles (bool)."""
    row_maximum = maximum.clone()
    q, k = tiles_of(query), tiles_of(key)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    marks = unpack_tiles(live, ceil_div(problem.key_length, TILE)).flatten(0, 1)
    size = torch.zeros(offset.shape, dtype=torch.int32, device=query.device)
    for group in groups(marks.clone()):
        rows = group.rows
        k_group = tiles_of_keys(k, group.keys(problem)[0], group)
        reached = distances(problem, q[rows], k_group, maximum[rows], offset[rows], group) > 0
        size[rows] = reached.sum(-1, dtype=torch.int32)
        exact = reached.unflatten(-1, (-1, TILE)).any(-1).any(1)
        unit, query_tile = (index.unsqueeze(-1).expand_as(exact)[group.used] for index in rows)
        marks[unit, query_tile, group.key_tile[group.used]] = exact[group.used]
    size = size.flatten(1)[:, : problem.query_length]
    counted = (tensor.unflatten(0, (problem.batch, problem.heads)).contiguous() for tensor in (size, marks))
    return row_maximum, *counted
