"""Stages over a part of the keys, each by itself: row maxima, F and sum u at an offset, the output at an offset.

Maxima of several parts combine by max, over the parts in which a row sees a key. Everything else combines by addition:
see docs/math.md. The keys of a part stand at positions of their own: the intervals of the problem count from its first
key.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.call import Problem
from ...core.tensors import row_dtype
from ...core.threshold import probability, support_weight
from .output import product_with
from .score import by_head, distances, products, scores
from .tiles import Group, TileVisibility, groups, keys_of, pad_rows, tile_rows, tiles_of, unpadded


def row_maxima(problem: Problem, query: Tensor, key: Tensor) -> Tensor:
    """Each row's maximum of z; see backends.Backend."""
    maximum = query.new_empty(query.shape[:3], dtype=row_dtype(query))
    for part, own, shared in by_head(problem):
        tiles = pad_rows(torch.full_like(maximum[:, own], torch.inf), torch.inf)
        for group, z, visible in groups_of_scores(part, query[:, own], key[:, shared]):
            tiles[group.rows] = torch.where(visible > 0, z.amax(-1), torch.inf)
        maximum[:, own] = unpadded(tiles, query[:, own])
    return maximum


def sums_at(problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(F, sum u) of each row; see backends.Backend."""
    total, weight = torch.empty_like(maximum), torch.empty_like(maximum)
    for part, own, shared in by_head(problem):
        row_maximum, row_offset = pad_rows(maximum[:, own], torch.inf), pad_rows(offset[:, own], 1.0)
        totals, weights = torch.zeros_like(row_offset), torch.zeros_like(row_offset)
        for group, z, _ in groups_of_scores(part, query[:, own], key[:, shared]):
            distance = distances(z, row_maximum[group.rows], row_offset[group.rows])
            totals[group.rows] = probability(distance, part.score.alpha).sum(-1)
            weights[group.rows] = support_weight(distance, part.score.alpha).sum(-1)
        total[:, own], weight[:, own] = unpadded(totals, query[:, own]), unpadded(weights, query[:, own])
    return total, weight


def output_at(problem: Problem, query: Tensor, key: Tensor, value: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """sum p v; see backends.Backend."""
    output = maximum.new_empty(*maximum.shape, problem.value_size)
    for part, own, shared in by_head(problem):
        row_maximum, row_offset = pad_rows(maximum[:, own], torch.inf), pad_rows(offset[:, own], 1.0)
        v = tiles_of(value[:, shared])
        tiles = v.new_zeros(*row_offset.shape, v.shape[-1])
        for group, z, _ in groups_of_scores(part, query[:, own], key[:, shared]):
            p = probability(distances(z, row_maximum[group.rows], row_offset[group.rows]), part.score.alpha)
            tiles[group.rows] = product_with(p, keys_of(part, v, group))
        output[:, own] = unpadded(tiles, query[:, own])
    return output


def groups_of_scores(problem: Problem, query: Tensor, key: Tensor) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Groups of all tiles that are seen, with their z and how many keys each row sees."""
    visibility = TileVisibility.of(problem, query.device)
    q, k = tiles_of(query), tiles_of(key)
    for group in groups(visibility.tiles(problem), tile_rows(problem.key_length)):
        product = products(problem, q[group.rows], keys_of(problem, k, group))
        yield group, *scores(problem, visibility, product, group)
