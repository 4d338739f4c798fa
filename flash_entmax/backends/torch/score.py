"""Scores of groups of tiles, and their distance to the threshold; a call with one alpha and scale for each head."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...core.call import Problem
from ...core.tile_filter import WHOLE
from .tiles import Group, TileVisibility, by_block


def by_head(problem: Problem) -> Iterator[tuple[Problem, slice, slice]]:
    """The call as it is, or a call for each head where each has its own alpha and scale; its heads, its key heads."""
    score, visibility = problem.score, problem.visibility
    if not isinstance(score.alpha, Tensor):
        yield problem, slice(None), slice(None)
        return
    for head, (alpha, scale) in enumerate(zip(score.alpha.tolist(), score.scale.tolist(), strict=True)):
        own, shared = (slice(index, index + 1) for index in (head, head // problem.group))
        slopes = None if score.alibi_slopes is None else score.alibi_slopes[:, own]
        kinds = visibility.tile_kinds
        if kinds is not None:
            kinds = kinds.expand(-1, problem.heads, -1, -1)[:, own]
        part = replace(
            problem,
            heads=1,
            key_heads=1,
            score=score._replace(alpha=alpha, scale=scale, alibi_slopes=slopes),
            visibility=visibility._replace(tile_kinds=kinds),
        )
        yield part, own, shared


def products(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    """query . key; with a softcap, tanh(scale * query . key / softcap)."""
    product, softcap = torch.bmm(q, k.mT), problem.score.softcap
    return product.mul_(problem.score.scale / softcap).tanh_() if softcap else product


def scores(problem: Problem, visibility: TileVisibility, product: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """z of (n, rows, m width), in place of the products, -inf where hidden; (n, rows), how many keys each row sees."""
    alpha, softcap = problem.score.alpha, problem.score.softcap
    z = product.mul_((alpha - 1.0) * softcap if softcap else problem.z_scale)
    if visibility.alibi_slopes is not None:
        slopes = (alpha - 1.0) * visibility.alibi_slopes[group.unit]
        z.sub_(visibility.separations(group).mul_(slopes[:, None, None]))
    return z, hide(z, visibility, group)


def hide(z: Tensor, visibility: TileVisibility, group: Group) -> Tensor:
    """Write -inf where a row does not see the key. Returns (n, rows), how many keys each row sees.

    A block that all its rows see whole is not touched.
    """
    start, stop = (limit[group.rows].unsqueeze(-1) for limit in (visibility.start, visibility.stop))
    keys, kinds, blocks = group.keys, visibility.kinds_of(group), by_block(z, group).transpose(1, 2)
    whole = (start.amax(1) <= keys[..., 0]) & (keys[..., -1] < stop.amin(1)) & (kinds == WHOLE)
    row, column = (group.used & ~whole).nonzero(as_tuple=True)
    key = keys[row, column]
    seen = (start[row] <= key.unsqueeze(1)) & (key.unsqueeze(1) < stop[row])
    seen &= visibility.mask(kinds[row, column], key)
    blocks[row, column] = blocks[row, column].masked_fill_(~seen, -torch.inf)
    blocks[group.unused] = -torch.inf
    in_whole = group.width * whole.sum(-1, keepdim=True, dtype=torch.int32)
    return in_whole.repeat(1, z.shape[1]).index_add_(0, row, seen.sum(-1, dtype=torch.int32))


def distances(z: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """[z - tau]_+, in place; 0 where the key is hidden and in unused tiles."""
    return z.sub_(maximum.unsqueeze(-1)).add_(offset.unsqueeze(-1)).clamp_min_(0)
