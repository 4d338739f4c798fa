"""The forward pass in plain PyTorch, tile by tile: threshold, output, support.

The stages are those of the kernels. Scores of the tiles that intervals and masks leave are computed once, densely. The
maxima of their blocks of keys certify which tiles can hold support. The solve and the output touch only those. Tiles of
rows that read about as many tiles of keys form a group, so that each stage is a few batched operations. Arithmetic is
in float32, or float64 for float64 inputs. Beside copies of the inputs, no temporary holds more than a few times
CHUNK_SCORES numbers, or the scores of one tile of rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Problem
from ...core.tensors import empty_stored_as, row_dtype
from ...core.threshold import certified_offset, probability, smallest_offset, solve, support_weight
from .score import by_head, distances, product_with, products, scores
from .tiles import TILE, Group, TileVisibility, by_tile, groups, pad_rows, tiles_of, tiles_of_keys, unpadded


class Solution(NamedTuple):
    """What the forward pass returns. The gradient needs all but the output."""

    output: Tensor
    value_mean: Tensor
    maximum: Tensor
    offset: Tensor
    reached_keys: Tensor
    reaching_queries: Tensor


class GroupSolution(NamedTuple):
    """Of the tiles of rows of one group: (n, rows, ...), and the live ones of its (n, m) tiles of keys."""

    output: Tensor
    value_mean: Tensor
    maximum: Tensor
    offset: Tensor
    live: Tensor


def reach_shapes(problem: Problem, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The packed map of live tiles, by which both gradients go; see backends.Backend."""
    return problem.live_shape(TILE), (problem.batch, problem.heads, 0)


def reached_tiles(problem: Problem, dtype: torch.dtype, reached_keys: Tensor) -> Tensor:
    """The map of live tiles; see backends.Backend."""
    return problem.unpack_live(reached_keys, TILE)


def attention_forward(problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool) -> Solution:
    """(output, value_mean, maximum, offset, reached_keys, reaching_queries); see backends.Backend."""
    output, value_mean = (empty_stored_as(query, problem.value_size) for _ in range(2))
    maximum, offset = (query.new_empty(query.shape[:3], dtype=row_dtype(query)) for _ in range(2))
    reach = (query.new_empty(shape, dtype=torch.int32) for shape in reach_shapes(problem, query.dtype))
    whole = Solution(output, value_mean, maximum, offset, *reach)
    if not needs_backward:
        whole = Solution(output, *(tensor.new_empty(0) for tensor in whole[1:]))
    for part, own, shared in by_head(problem):
        pieces = solve_heads(part, query[:, own], key[:, shared], value[:, shared], needs_backward)
        for result, piece in zip(whole[:5], pieces, strict=True):
            if piece is not None:
                result[:, own] = piece
    return whole


def solve_heads(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
) -> tuple[Tensor | None, ...]:
    """`attention_forward` with one alpha and scale, in the compute dtype; None for what is not needed."""
    visibility = TileVisibility.of(problem, query.device)
    q, k, v = (tiles_of(tensor) for tensor in (query, key, value))
    output, value_mean = (q.new_zeros(*q.shape[:-1], v.shape[-1]) for _ in range(2))
    maximum, offset = q.new_full(q.shape[:-1], torch.inf), q.new_ones(q.shape[:-1])
    live = visibility.tiles(problem)
    for group in groups(live):
        product = products(problem, q[group.rows], tiles_of_keys(k, group.keys(problem), group.used))
        part = solve_group(problem, group, *scores(problem, visibility, product, group), v, needs_backward)
        for whole, piece in zip((output, value_mean, maximum, offset), part[:4], strict=True):
            whole[group.rows] = piece
        live[group.tiles] = part.live
    if not needs_backward:
        return unpadded(output, query), None, None, None, None
    rows = (unpadded(tiles, query) for tiles in (output, value_mean, maximum, offset))
    return *rows, problem.pack_live(live.unflatten(0, query.shape[:2]), TILE)


def solve_group(
    problem: Problem, group: Group, z: Tensor, visible: Tensor, v: Tensor, needs_backward: bool
) -> GroupSolution:
    """All stages after the scores, for the tiles of rows of one group."""
    alpha = problem.score.alpha
    tiles = by_tile(z, group).unsqueeze(0)
    block_maxima = tiles.amax(-1)
    maximum = torch.where(visible > 0, block_maxima.amax(-1), torch.inf)
    low = smallest_offset(visible.to(z.dtype), alpha)
    offset = certified_offset(block_maxima, maximum, alpha)
    output, value_mean = (v.new_zeros(*maximum.shape, v.shape[-1]) for _ in range(2))
    for inner in groups(survivors(block_maxima, maximum, offset) & group.used):
        rows = inner.rows
        relative = gathered(tiles, inner) - maximum[rows].unsqueeze(-1)
        pending = maximum[rows] < torch.inf
        offset[rows] = solve(alpha, relative, pending, low[inner.query_tile], offset[rows])
        values = tiles_of_keys(v, group.part(inner).keys(problem), inner.used)
        output[rows], value_mean[rows] = outputs(alpha, relative, offset[rows], values)
    live = survivors(block_maxima, maximum, offset) & group.used
    return GroupSolution(*(result.squeeze(0) for result in (output, value_mean, maximum, offset, live)))


def survivors(block_maxima: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """(units, query tiles, key tiles) bool: some row of the tile may have a score above its threshold. NaN survives."""
    distance = block_maxima - maximum.unsqueeze(-1) + offset.unsqueeze(-1)
    return ~(distance <= 0).all(2)


def gathered(tiles: Tensor, group: Group) -> Tensor:
    """(n, rows, m width): the live tiles of each tile of rows side by side; -inf in the unused ones."""
    unit, query_tile, key_tile = group.tiles
    live = tiles[unit, query_tile, :, key_tile].masked_fill_(~group.used[:, :, None, None], -torch.inf)
    return live.transpose(1, 2).flatten(2)


def outputs(alpha: float, relative: Tensor, offset: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O = sum p v and O1 = sum u v / sum u, with one more step of tau on the output itself.

    dO / d offset = r sum u v, so the step (1 - sum p) / (r sum u) adds (1 - sum p) O1.
    """
    distance = (relative + offset.unsqueeze(-1)).clamp_min_(0)
    p, u = probability(distance, alpha), support_weight(distance, alpha)
    weight = u.sum(-1, keepdim=True)
    mean = product_with(u, v) / torch.where(weight == 0, 1, weight)
    return product_with(p, v) + (1 - p.sum(-1, keepdim=True)) * mean, mean


def attention_support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, reached_keys: Tensor,
    reaching_queries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(maximum in units of z, support size, exact map of live tiles, keys of each tile); see backends.Backend."""
    size = torch.empty_like(maximum, dtype=torch.int32)
    marks = reached_tiles(problem, query.dtype, reached_keys)
    keys = torch.empty(marks.shape[:3], dtype=torch.int32, device=marks.device)
    for part, own, shared in by_head(problem):
        own_rows = (tensor[:, own] for tensor in (query, maximum, offset, marks))
        size[:, own], marks[:, own], keys[:, own] = count_support(part, key[:, shared], *own_rows)
    return maximum.clone(), size, marks, keys


def count_support(
    problem: Problem, key: Tensor, query: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, live tiles, and how many keys each tile of queries attends to, with one alpha and scale."""
    visibility = TileVisibility.of(problem, query.device)
    q, k = tiles_of(query), tiles_of(key)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    size, marks = torch.zeros_like(offset, dtype=torch.int32), live.flatten(0, 1).clone()
    union = torch.zeros_like(size[:, :, 0])
    for group in groups(marks):
        rows = group.rows
        keys = tiles_of_keys(k, group.keys(problem), group.used)
        z, _ = scores(problem, visibility, products(problem, q[rows], keys), group)
        positive = distances(z, maximum[rows], offset[rows]) > 0
        size[rows] = positive.sum(-1, dtype=torch.int32)
        union[rows] = positive.any(1).sum(-1, dtype=torch.int32)
        marks[group.tiles] = by_tile(positive, group).any(-1).any(1)
    return unpadded(size, query), *(counts.unflatten(0, query.shape[:2]) for counts in (marks, union))
