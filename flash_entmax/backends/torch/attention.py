"""The forward pass in plain PyTorch, tile by tile: threshold, output, support. Calls of few queries go to `decode`.

Scores of the tiles that intervals and masks leave are computed once, densely. The maxima of tiles of keys certify an
offset at or above that of each row, and so which keys a tile of rows may reach. The solve and the output touch only
those: single keys, or whole tiles where most keys are reached. Tiles of rows that reach about as many form a group, so
that each stage is a few batched operations. Arithmetic is in float32, or float64 for float64 inputs. Beside copies of
the inputs, no temporary holds more than a few times CHUNK_SCORES numbers, or the scores of one tile of rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Problem
from ...core.tensors import empty_stored_as, row_dtype
from ...core.threshold import certified_offset, smallest_offset, solve
from .decode import decode, is_decoding
from .output import outputs
from .reach import bands, groups_by_share, pack_keys, reach_shapes, reached_groups, reached_tiles
from .score import by_head, distances, products, scores
from .tiles import TILE, Group, TileVisibility, by_block, groups, keys_of, pad_rows, tile_rows, tiles_of, unpadded

CACHED = 2**18  # numbers of a temporary that need not go through main memory


class Solution(NamedTuple):
    """What the forward pass returns. The gradient needs all but the output."""

    output: Tensor
    value_mean: Tensor
    maximum: Tensor
    offset: Tensor
    reached_keys: Tensor
    reaching_queries: Tensor


class GroupSolution(NamedTuple):
    """Of the tiles of rows of one group: (n, rows, ...), and which of its keys each tile reaches, (n, m, width)."""

    output: Tensor
    value_mean: Tensor
    maximum: Tensor
    offset: Tensor
    reached: Tensor


def attention_forward(problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool) -> Solution:
    """(output, value_mean, maximum, offset, reached_keys, reaching_queries); see backends.Backend."""
    whole = empty_solution(problem, query, needs_backward)
    compute = decode if is_decoding(problem, needs_backward) else solve_heads
    for part, own, shared in by_head(problem):
        pieces = compute(part, query[:, own], key[:, shared], value[:, shared], needs_backward)
        for result, piece in zip(whole[:5], pieces, strict=True):
            if piece is not None:
                result[:, own] = piece
    return whole


def empty_solution(problem: Problem, query: Tensor, needs_backward: bool) -> Solution:
    """Unwritten, in the shapes of `attention_forward`."""
    output = empty_stored_as(query, problem.value_size)
    value_mean = torch.empty_like(output) if needs_backward else output.new_empty(0)
    shapes = (query.shape[:3], query.shape[:3], *reach_shapes(problem, query.dtype)) if needs_backward else 4 * ((0,),)
    dtypes = 2 * (row_dtype(query),) + 2 * (torch.int32,)
    state = (query.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return Solution(output, value_mean, *state)


def solve_heads(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
) -> tuple[Tensor | None, ...]:
    """`attention_forward` with one alpha and scale, in the compute dtype; None for what is not needed."""
    visibility, width = TileVisibility.of(problem, query.device), tile_rows(problem.key_length)
    q, k, v = (tiles_of(tensor) for tensor in (query, key, value))
    output, value_mean = (q.new_zeros(*q.shape[:-1], v.shape[-1]) for _ in range(2))
    maximum, offset = q.new_full(q.shape[:-1], torch.inf), q.new_ones(q.shape[:-1])
    seen, words = visibility.tiles(problem), []
    for band in bands(problem):
        reached = seen[:, band].unsqueeze(-1).repeat(1, 1, 1, width).zero_()
        for group in groups(seen[:, band], width):
            group = group._replace(query_tile=group.query_tile + band.start)
            product = products(problem, q[group.rows], keys_of(problem, k, group))
            part = solve_group(problem, group, *scores(problem, visibility, product, group), v)
            for whole, piece in zip((output, value_mean, maximum, offset), part[:4], strict=True):
                whole[group.rows] = piece
            unit, query_tile, key_tile = group.used_blocks
            reached[unit, query_tile - band.start, key_tile] = part.reached[group.used]
        words.append(pack_keys(reached.flatten(2), problem.key_length))
    if not needs_backward:
        return unpadded(output, query), None, None, None, None
    rows = (unpadded(tiles, query) for tiles in (output, value_mean, maximum, offset))
    return *rows, torch.cat(words, 1).flatten(1).unflatten(0, query.shape[:2])


def solve_group(problem: Problem, group: Group, z: Tensor, visible: Tensor, v: Tensor) -> GroupSolution:
    """All stages after the scores, for the tiles of rows of one group. z is overwritten."""
    alpha = problem.score.alpha
    block_maxima = by_block(z, group).amax(-1)
    maximum = torch.where(visible > 0, block_maxima.amax(-1), torch.inf)
    low = smallest_offset(visible.to(z.dtype), alpha)
    offset = certified_offset(block_maxima, maximum, alpha)
    output, value_mean = (v.new_zeros(*maximum.shape, v.shape[-1]) for _ in range(2))
    relative = z.sub_(maximum.unsqueeze(-1))
    may_reach = reached_keys(relative, offset, group).flatten(1).unsqueeze(0)
    reached = torch.zeros_like(may_reach)
    for inner in groups_by_share(may_reach, group.width):
        rows = inner.query_tile
        own, pending = gathered(relative, inner), maximum[rows] < torch.inf
        offset[rows] = solve(alpha, own, pending, low[rows], offset[rows])
        output[rows], value_mean[rows] = outputs(alpha, own, offset[rows], keys_of(problem, v, group.part(inner)))
        by_block(reached, inner)[inner.used_blocks] = reached_keys(own, offset[rows], inner)[inner.used]
    return GroupSolution(output, value_mean, maximum, offset, by_block(reached[0], group))


def reached_keys(relative: Tensor, offset: Tensor, group: Group) -> Tensor:
    """(n, m, width) bool: some row of the tile may have its score of this key above its threshold. NaN is reached."""
    tiles = zip(*(numbers.split(max(1, CACHED // relative[0].numel())) for numbers in (relative, offset)), strict=True)
    highest = torch.cat([(z + own_offset.unsqueeze(-1)).amax(1) for z, own_offset in tiles])
    return ~(highest.view(*group.block.shape, -1) <= 0) & group.used.unsqueeze(-1)


def gathered(relative: Tensor, inner: Group) -> Tensor:
    """(n, rows, m width): the blocks of each tile of rows side by side; -inf in the unused ones."""
    blocks = by_block(relative, inner)[inner.query_tile.unsqueeze(-1), :, inner.block]
    blocks[inner.unused] = -torch.inf
    return blocks.transpose(1, 2).flatten(2)


def attention_support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, reached_keys: Tensor,
    reaching_queries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(maximum in units of z, support size, exact map of live tiles, keys of each tile); see backends.Backend."""
    size = torch.empty_like(maximum, dtype=torch.int32)
    marks = torch.empty_like(reached_tiles(problem, query.dtype, reached_keys))
    keys = torch.empty(marks.shape[:3], dtype=torch.int32, device=marks.device)
    for part, own, shared in by_head(problem):
        own_rows = (tensor[:, own] for tensor in (query, maximum, offset, reached_keys))
        size[:, own], marks[:, own], keys[:, own] = count_support(part, key[:, shared], *own_rows)
    return maximum.clone(), size, marks, keys


def count_support(
    problem: Problem, key: Tensor, query: Tensor, maximum: Tensor, offset: Tensor, reached_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, live tiles and keys of each tile with one alpha and scale."""
    visibility = TileVisibility.of(problem, query.device)
    q, k = tiles_of(query), tiles_of(key)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    size, marks = torch.zeros_like(offset, dtype=torch.int32), torch.zeros_like(visibility.tiles(problem))
    union = torch.zeros_like(size[:, :, 0])
    for group in reached_groups(problem, reached_keys):
        rows = group.rows
        z, _ = scores(problem, visibility, products(problem, q[rows], keys_of(problem, k, group)), group)
        positive = distances(z, maximum[rows], offset[rows]) > 0
        size[rows] = positive.sum(-1, dtype=torch.int32)
        union[rows] = positive.any(1).sum(-1, dtype=torch.int32)
        live = by_block(positive.any(1), group).any(-1)
        unit, query_tile, block = group._replace(used=live).used_blocks
        marks[unit, query_tile, block * group.width // TILE] = True
    return unpadded(size, query), *(counts.unflatten(0, query.shape[:2]) for counts in (marks, union))
