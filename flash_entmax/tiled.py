"""The algorithm in plain PyTorch, tile by tile: for CPU tensors, float64, and any device without Triton.

The stages are those of the kernels. Scores are computed once, densely, for a bounded chunk of rows; the maxima of their
blocks of keys certify which tiles can hold support; the solve, the output and the gradient then touch only those tiles.
Arithmetic is in float32 (float64 for float64 inputs). A chunk's scores never exceed CHUNK_SCORES numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem, ceil_div, pack_tiles, unpack_tiles
from .threshold import (
    MAX_STEPS,
    Bracket,
    certified_offset,
    probability,
    row_maximum,
    smallest_offset,
    support_weight,
    tolerance,
)

TILE = 64
CHUNK_SCORES = 2**24
CHUNK_TILES = CHUNK_SCORES // (4 * TILE * TILE)


class Solution(NamedTuple):
    """What the forward pass returns; value_mean, maximum, offset and live are what the gradient needs."""

    output: Tensor
    value_mean: Tensor
    maximum: Tensor
    offset: Tensor
    live: Tensor


class Tiles(NamedTuple):
    """A list of tiles: (n,) int64 each. A unit is one query head of one batch row."""

    unit: Tensor
    query_tile: Tensor
    key_tile: Tensor

    def __getitem__(self, selection) -> "Tiles":
        return Tiles(*(index[selection] for index in tuple(self)))


def attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Solution:
    """Output (input dtype), value_mean, maximum and offset (compute dtype), and the packed map of live tiles."""
    key_tiles = ceil_div(problem.key_length, TILE)
    output, value_mean = (
        query.new_zeros(problem.batch, problem.heads, problem.query_length, problem.value_size) for _ in range(2)
    )
    rows = torch.empty_like(output[..., 0], dtype=compute_dtype(query))
    maximum, offset = rows.fill_(torch.inf), torch.ones_like(rows)
    live = torch.zeros(
        *output.shape[:2], ceil_div(problem.query_length, TILE), key_tiles, dtype=torch.bool, device=query.device
    )
    if problem.is_empty:
        return Solution(output, value_mean, maximum, offset, pack_tiles(live))

    for heads, chunk in chunks(problem):
        flat = [tensor.flatten(0, 1)[heads] for tensor in (output, value_mean, maximum, offset)]
        part = attend_chunk(problem, query, key, value, heads, chunk)
        for whole, piece in zip(flat, part[:4], strict=True):
            whole[:, chunk] = piece[:, : whole[:, chunk].shape[1]].to(whole.dtype)
        tiles = part[4]
        first = chunk.start // TILE
        live.flatten(0, 1)[heads, first : first + tiles.shape[1], : tiles.shape[2]] = tiles
    return Solution(output, value_mean, maximum, offset, pack_tiles(live))


def chunks(problem: Problem):
    """Slices of heads and of rows (whole tiles) whose scores fit CHUNK_SCORES, or one tile of rows where none do."""
    units = problem.batch * problem.heads
    rows = min(problem.query_length, max(TILE, CHUNK_SCORES // problem.key_length // TILE * TILE))
    step = max(1, CHUNK_SCORES // (rows * problem.key_length))
    for unit in range(0, units, step):
        for row in range(0, problem.query_length, rows):
            yield slice(unit, min(units, unit + step)), slice(row, min(problem.query_length, row + rows))


def attend_chunk(problem: Problem, query: Tensor, key: Tensor, value: Tensor, heads: slice, chunk: slice):
    """All stages for some heads and rows; every returned tensor is padded to whole tiles."""
    units = torch.arange(heads.start, heads.stop, device=query.device)
    visible_keys = (
        min(problem.key_length, max(1, chunk.stop + problem.diagonal)) if problem.is_causal else problem.key_length
    )
    q = padded(rows_of(query, units)[:, chunk])
    k = padded(rows_of(key, key_units(problem, units))[:, :visible_keys])
    v = padded(rows_of(value, key_units(problem, units))[:, :visible_keys])
    visible = torch.nn.functional.pad(
        problem.visible(query.device)[chunk], (0, q.shape[1] - (chunk.stop - chunk.start))
    )

    scores = torch.bmm(q, k.mT) * problem.slope
    hide(scores, visible)
    scores = scores.unflatten(1, (-1, TILE)).unflatten(-1, (-1, TILE))
    block_maxima = scores.amax(-1)
    maximum = torch.where(visible.view(-1, TILE) > 0, block_maxima.amax(-1), torch.inf)
    offset = certified_offset(block_maxima, maximum, problem.alpha)
    live = survivors(block_maxima, maximum, offset)

    tiles = Tiles(*live.nonzero(as_tuple=True))
    relative = scores.transpose(2, 3)[live] - maximum[tiles.unit, tiles.query_tile].unsqueeze(-1)
    offset = solve(problem, relative, tiles, maximum, offset, visible.view(-1, TILE))
    live = survivors(block_maxima, maximum, offset)
    output, value_mean = outputs(problem, relative, tiles, offset, v)
    flat = [tensor.flatten(1, 2) for tensor in (output, value_mean, maximum, offset)]
    return *flat, live


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows_of(tensor: Tensor, units: Tensor) -> Tensor:
    """(units, length, dim) in the compute dtype, of the given heads of a (batch, heads, length, dim) tensor."""
    heads = tensor.shape[1]
    return tensor[units // heads, units % heads].to(compute_dtype(tensor))


def key_units(problem: Problem, units: Tensor) -> Tensor:
    """The key head, counted over the batch, that each query head reads."""
    return units // problem.group


def padded(rows: Tensor) -> Tensor:
    """Rows of zeros up to a whole number of tiles."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % TILE))


def hide(scores: Tensor, visible: Tensor) -> None:
    """Write -inf over every (row, key) with key >= visible[row]; columns that all rows see are not touched."""
    first = int(visible.min())
    keys = torch.arange(first, scores.shape[-1], device=scores.device)
    scores[..., first:].masked_fill_(keys >= visible.unsqueeze(-1), -torch.inf)


def survivors(block_maxima: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """(units, query tiles, key tiles) bool: some row of the tile may have a score above its threshold. NaN survives."""
    distance = block_maxima - maximum.unsqueeze(-1) + offset.unsqueeze(-1)
    return ~(distance <= 0).all(2)


def reduce_rows(values: Tensor, tiles: Tiles, like: Tensor) -> Tensor:
    """Sum what each tile contributes into its tile of rows; the order of addition is the order of the list."""
    total = torch.zeros(like.shape[0] * like.shape[1], *values.shape[1:], dtype=values.dtype, device=values.device)
    total.index_add_(0, tiles.unit * like.shape[1] + tiles.query_tile, values)
    return total.unflatten(0, like.shape[:2])


def solve(problem: Problem, relative: Tensor, tiles: Tiles, maximum: Tensor, offset: Tensor, visible: Tensor) -> Tensor:
    """The offset of every row, from z - maximum on the surviving tiles. A tile of rows leaves once all have converged."""
    alpha = problem.alpha
    low = smallest_offset(visible.to(offset.dtype), alpha).expand_as(offset)
    bracket = Bracket(low, offset, alpha)
    for _ in range(MAX_STEPS):
        distance = (relative + offset[tiles.unit, tiles.query_tile].unsqueeze(-1)).clamp_min(0)
        total = reduce_rows(probability(distance, alpha).sum(-1), tiles, offset)
        weight = reduce_rows(support_weight(distance, alpha).sum(-1), tiles, offset)
        count = reduce_rows((distance > 0).sum(-1).to(offset.dtype), tiles, offset) if alpha == 1.5 else None
        pending = ((total - 1).abs() > tolerance(offset)) & (maximum < torch.inf)
        stepped = torch.where(pending, bracket.step(offset, total, weight, count), offset)
        unfinished = (stepped != offset).any(-1)
        offset = stepped
        if not unfinished.any():
            break
        keep = unfinished[tiles.unit, tiles.query_tile]
        relative, tiles = relative[keep], tiles[keep]
        bracket.keep(unfinished.unsqueeze(-1), offset)
    return offset


def outputs(problem: Problem, relative: Tensor, tiles: Tiles, offset: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O = sum p v, and O1 = sum u v / sum u, over the tiles."""
    values = v.unflatten(1, (-1, TILE))
    output, value_mean = (offset.new_zeros(*offset.shape, v.shape[-1]) for _ in range(2))
    weight = torch.zeros_like(offset)
    for part in slices(tiles):
        some = tiles[part]
        distance = (relative[part] + offset[some.unit, some.query_tile].unsqueeze(-1)).clamp_min(0)
        u = support_weight(distance, problem.alpha)
        block = values[some.unit, some.key_tile]
        output += reduce_rows(probability(distance, problem.alpha) @ block, some, offset)
        value_mean += reduce_rows(u @ block, some, offset)
        weight += reduce_rows(u.sum(-1), some, offset)
    return output, value_mean / torch.where(weight == 0, 1, weight).unsqueeze(-1)


def slices(tiles: Tiles):
    for start in range(0, tiles.unit.shape[0], CHUNK_TILES):
        yield slice(start, start + CHUNK_TILES)


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


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
    """dQ, dK and dV over the live tiles: dS = u (dP - delta), delta = dO . O1."""
    q, k, v, do = (
        padded(t.flatten(0, 1)).to(compute_dtype(query)).unflatten(1, (-1, TILE))
        for t in (query, key, value, grad_output)
    )
    delta = (grad_output.to(offset.dtype) * value_mean.to(offset.dtype)).sum(-1)
    delta = pad_rows(delta, 0.0)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    tiles = Tiles(*unpack_tiles(live, ceil_div(problem.key_length, TILE)).flatten(0, 1).nonzero(as_tuple=True))
    for part in slices(tiles):
        some = tiles[part]
        rows, keys = (some.unit, some.query_tile), (key_units(problem, some.unit), some.key_tile)
        distance = distances(problem, q[rows], k[keys], maximum[rows], offset[rows], some)
        p, u = probability(distance, problem.alpha), support_weight(distance, problem.alpha)
        ds = u * (do[rows] @ v[keys].mT - delta[rows].unsqueeze(-1))
        dq.index_put_(rows, ds @ k[keys], accumulate=True)
        dk.index_put_(keys, ds.mT @ q[rows], accumulate=True)
        dv.index_put_(keys, p.mT @ do[rows], accumulate=True)
    return Gradients(unpadded(dq * problem.scale, query), unpadded(dk * problem.scale, key), unpadded(dv, value))


def distances(problem: Problem, q: Tensor, k: Tensor, maximum: Tensor, offset: Tensor, tiles: Tiles) -> Tensor:
    """[z - tau]_+ of the given tiles (n, TILE, TILE), computed anew; 0 where the key is not visible."""
    z = (q @ k.mT) * problem.slope
    step = torch.arange(TILE, device=z.device)
    visible = torch.nn.functional.pad(problem.visible(z.device), (0, -problem.query_length % TILE)).view(-1, TILE)
    limit = visible[tiles.query_tile] - TILE * tiles.key_tile.unsqueeze(-1)
    partial = (limit < TILE).any(-1)
    z[partial] = z[partial].masked_fill(step >= limit[partial].unsqueeze(-1), -torch.inf)
    return (z - maximum.unsqueeze(-1) + offset.unsqueeze(-1)).clamp_min(0)


def pad_rows(rows: Tensor, fill: float) -> Tensor:
    """(batch, heads, length) -> (units, query tiles, TILE)."""
    flat = rows.flatten(0, 1)
    return torch.nn.functional.pad(flat, (0, -flat.shape[-1] % TILE), value=fill).unflatten(-1, (-1, TILE))


def unpadded(blocks: Tensor, like: Tensor) -> Tensor:
    """(units, tiles, TILE, dim) -> the shape and dtype of `like`."""
    rows = blocks.flatten(1, 2)[:, : like.shape[2]].to(like.dtype)
    return rows.reshape(like.shape)


def support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Support size of each row (int32) and the exact map of live tiles (bool), by one more pass over the live tiles."""
    q, k = (padded(t.flatten(0, 1)).to(compute_dtype(query)).unflatten(1, (-1, TILE)) for t in (query, key))
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    marks = unpack_tiles(live, ceil_div(problem.key_length, TILE))
    tiles = Tiles(*marks.flatten(0, 1).nonzero(as_tuple=True))
    size = torch.zeros(offset.shape, dtype=torch.int32, device=query.device)
    for part in slices(tiles):
        some = tiles[part]
        rows, keys = (some.unit, some.query_tile), (key_units(problem, some.unit), some.key_tile)
        reached = distances(problem, q[rows], k[keys], maximum[rows], offset[rows], some) > 0
        size.index_put_(rows, reached.sum(-1, dtype=torch.int32), accumulate=True)
        marks.view(-1, *marks.shape[2:])[(*tuple(some),)] = reached.any(-1).any(-1)
    size = size.flatten(1)[:, : problem.query_length].reshape(problem.batch, problem.heads, problem.query_length)
    return size, marks
