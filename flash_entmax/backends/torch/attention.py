"""The algorithm in plain PyTorch, tile by tile: for CPU tensors, float64, and any device without Triton.

The stages are those of the kernels. Of the tiles that intervals and masks leave, scores are computed once, densely; the
maxima of their blocks of keys certify which tiles can hold support; the solve, the output and the gradient then touch
only those. Tiles of rows that read about as many tiles of keys form a group, so that each stage is a few batched
operations. Arithmetic is in float32 (float64 for float64 inputs). Beside copies of the inputs, no temporary holds more
than a few times CHUNK_SCORES numbers, or the scores of one tile of rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Modifiers, Problem, Tangents, empty_stored_as
from ...core.threshold import certified_offset, probability, smallest_offset, solve, support_weight
from ...core.visibility import WHOLE
from .tiles import TILE, Group, Scope, add_tiles, by_tile, groups, pad_rows, tiles_of, tiles_of_keys, unpadded


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
    parameters: Tensor


def by_head(problem: Problem, modifiers: Modifiers) -> Iterator[tuple[Problem, Modifiers, slice, slice]]:
    """The call as it is, or a call for each head where each has its alpha and scale; with its heads and key heads."""
    if modifiers.alpha is None:
        yield problem, modifiers, slice(None), slice(None)
        return
    for head, (alpha, scale) in enumerate(zip(modifiers.alpha.tolist(), modifiers.scale.tolist(), strict=True)):
        own, shared = (slice(index, index + 1) for index in (head, head // problem.group))
        slopes = None if modifiers.slopes is None else modifiers.slopes[:, own]
        kinds = None if modifiers.kinds is None else modifiers.kinds.expand(-1, problem.heads, -1, -1)[:, own]
        part = replace(problem, heads=1, key_heads=1, alpha=alpha, scale=scale)
        yield part, modifiers._replace(alpha=None, scale=None, slopes=slopes, kinds=kinds), own, shared


def attention(problem: Problem, modifiers: Modifiers, query: Tensor, key: Tensor, value: Tensor) -> Solution:
    """Output and value_mean (input dtype), maximum and offset (compute dtype), and the packed map of live tiles."""
    output, value_mean = (empty_stored_as(query, problem.value_size) for _ in range(2))
    row_dtype = torch.promote_types(query.dtype, torch.float32)
    maximum, offset = (query.new_empty(query.shape[:3], dtype=row_dtype) for _ in range(2))
    whole = Solution(output, value_mean, maximum, offset, query.new_empty(problem.live_shape(TILE), dtype=torch.int32))
    for part, own_modifiers, own, shared in by_head(problem, modifiers):
        pieces = attend(part, own_modifiers, query[:, own], key[:, shared], value[:, shared])
        for result, piece in zip(whole, pieces, strict=True):
            result[:, own] = piece
    return whole


def attend(problem: Problem, modifiers: Modifiers, query: Tensor, key: Tensor, value: Tensor) -> Solution:
    """`attention` with one alpha and scale, in the compute dtype."""
    scope = Scope.of(problem, modifiers, query.device)
    q, k, v = (tiles_of(tensor) for tensor in (query, key, value))
    output, value_mean = (q.new_zeros(*q.shape[:-1], v.shape[-1]) for _ in range(2))
    maximum, offset = q.new_full(q.shape[:-1], torch.inf), q.new_ones(q.shape[:-1])
    live = scope.tiles(problem)
    for group in groups(live):
        product = products(problem, q[group.rows], tiles_of_keys(k, group.keys(problem), group.used))
        part = attend_group(problem, group, *scores(problem, scope, product, group), v)
        for whole, piece in zip((output, value_mean, maximum, offset), part, strict=False):
            whole[group.rows] = piece
        live[group.tiles] = part.live
    rows = (unpadded(tiles, query) for tiles in (output, value_mean, maximum, offset))
    return Solution(*rows, problem.pack_live(live.unflatten(0, query.shape[:2]), TILE))


def attend_group(problem: Problem, group: Group, z: Tensor, visible: Tensor, v: Tensor) -> Solution:
    """All stages after the scores, for the tiles of rows of one group; live is (n, m)."""
    tiles = by_tile(z, group).unsqueeze(0)
    block_maxima = tiles.amax(-1)
    maximum = torch.where(visible > 0, block_maxima.amax(-1), torch.inf)
    low = smallest_offset(visible.to(z.dtype), problem.alpha)
    offset = certified_offset(block_maxima, maximum, problem.alpha)
    output, value_mean = (v.new_zeros(*maximum.shape, v.shape[-1]) for _ in range(2))
    for inner in groups(survivors(block_maxima, maximum, offset) & group.used):
        rows = inner.rows
        relative = gathered(tiles, inner) - maximum[rows].unsqueeze(-1)
        pending = maximum[rows] < torch.inf
        offset[rows] = solve(problem.alpha, relative, pending, low[inner.query_tile], offset[rows])
        values = tiles_of_keys(v, group.part(inner).keys(problem), inner.used)
        output[rows], value_mean[rows] = outputs(problem.alpha, relative, offset[rows], values)
    live = survivors(block_maxima, maximum, offset) & group.used
    return Solution(*(result.squeeze(0) for result in (output, value_mean, maximum, offset, live)))


def products(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    """query . key; with a softcap, tanh(scale * query . key / softcap)."""
    product = torch.bmm(q, k.mT)
    return product.mul_(problem.scale / problem.softcap).tanh_() if problem.softcap else product


def scores(problem: Problem, scope: Scope, product: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """z of (n, rows, m width), in place of the products, -inf where hidden; (n, rows), how many keys each row sees."""
    z = product.mul_((problem.alpha - 1.0) * problem.softcap if problem.softcap else problem.slope)
    if scope.slopes is not None:
        slopes = (problem.alpha - 1.0) * scope.slopes[group.unit]
        z.sub_(scope.separations(group).mul_(slopes[:, None, None]))
    return z, hide(z, scope, group)


def hide(z: Tensor, scope: Scope, group: Group) -> Tensor:
    """Write -inf over what a row does not see; returns (n, rows), how many keys it sees.

    Tiles that all their rows see whole are not touched.
    """
    start, stop = (limit[group.rows].unsqueeze(-1) for limit in (scope.start, scope.stop))
    keys, kinds = scope.keys_of(group.key_tile), scope.kinds_of(group)
    whole = (start.amax(1) <= keys[..., 0]) & (keys[..., -1] < stop.amin(1)) & (kinds == WHOLE)
    row, column = (~whole).nonzero(as_tuple=True)
    key = keys[row, column].unsqueeze(1)
    seen = (start[row] <= key) & (key < stop[row]) & scope.mask(kinds[row, column])
    tiles = by_tile(z, group)
    tiles[row, :, column] = tiles[row, :, column].masked_fill_(~seen, -torch.inf)
    in_whole = scope.width * whole.sum(-1, keepdim=True, dtype=torch.int32)
    return in_whole.repeat(1, z.shape[1]).index_add_(0, row, seen.sum(-1, dtype=torch.int32))


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


def product_with(p: Tensor, v: Tensor, block: int = 512) -> Tensor:
    """p @ v, a block of keys at a time: a float32 sum of 131,072 equal parts in one go would be off by 5e-4."""
    return sum(p[..., start : start + block] @ v[:, start : start + block] for start in range(0, p.shape[-1], block))


def attention_backward(
    problem: Problem, modifiers: Modifiers, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor,
    value_mean: Tensor, maximum: Tensor, offset: Tensor, live: Tensor, parameters: bool,
) -> Gradients:  # fmt: skip
    """dQ, dK, dV and, if wanted, (3, batch, heads) of alpha, scale and slopes. Sums run in one order on every call."""
    of_query, of_key, of_value = (empty_stored_as(tensor, tensor.shape[-1]) for tensor in (query, key, value))
    of_key, of_value = (torch.zeros_like(tensor, dtype=offset.dtype) for tensor in (of_key, of_value))
    of_parameters = offset.new_empty(3 if parameters else 0, *query.shape[:2])
    for part, own_modifiers, own, shared in by_head(problem, modifiers):
        of_rows = (tensor[:, own] for tensor in (grad_output, query, value_mean, maximum, offset, live))
        pieces = differentiate(part, own_modifiers, key[:, shared], value[:, shared], *of_rows, parameters)
        of_query[:, own] = pieces.query
        of_key[:, shared] += pieces.key
        of_value[:, shared] += pieces.value
        of_parameters[:, :, own] = pieces.parameters
    return Gradients(of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_parameters)


def differentiate(
    problem: Problem, modifiers: Modifiers, key: Tensor, value: Tensor, grad_output: Tensor, query: Tensor,
    value_mean: Tensor, maximum: Tensor, offset: Tensor, live: Tensor, parameters: bool,
) -> Gradients:  # fmt: skip
    """`attention_backward` with one alpha and scale, in the compute dtype: dS = u (dP - delta), delta = dO . O1."""
    scope = Scope.of(problem, modifiers, query.device)
    blind = maximum == torch.inf  # what comes in there, NaN included, goes nowhere
    if blind.any():
        grad_output = grad_output.masked_fill(blind.unsqueeze(-1), 0.0)
    q, k, v, do = (tiles_of(tensor) for tensor in (query, key, value, grad_output))
    delta = pad_rows((grad_output.to(offset.dtype) * value_mean.to(offset.dtype)).sum(-1), 0.0)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    of_alpha, of_slopes = torch.zeros_like(delta), torch.zeros_like(delta)
    for group in groups(problem.unpack_live(live, TILE).flatten(0, 1)):
        rows, keys = group.rows, group.keys(problem)
        k_group, v_group = (tiles_of_keys(tensor, keys, group.used) for tensor in (k, v))
        product = products(problem, q[rows], k_group)
        steepness = 1 - product * product if problem.softcap else None
        distance = distances(scores(problem, scope, product, group)[0], maximum[rows], offset[rows])
        p, u = probability(distance, problem.alpha), support_weight(distance, problem.alpha)
        dp = torch.bmm(do[rows], v_group.mT).sub_(delta[rows].unsqueeze(-1))
        if parameters:
            # sum u (dP - delta) = 0 up to the rounding of value_mean, which weights that sum to 0 do not see.
            weight = p * (1 - torch.where(distance > 0, distance, 1.0).log_())
            excess = weight.sum(-1, keepdim=True) / u.sum(-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
            of_alpha[rows] = (weight - u * excess).mul_(dp).sum(-1)
        ds = dp.mul_(u)
        if parameters and scope.slopes is not None:
            of_slopes[rows] = -(ds * scope.separations(group)).sum(-1)
        if steepness is not None:
            ds.mul_(steepness)
        dq[rows] = ds @ k_group
        add_tiles(dk, keys, group.used, ds.mT @ q[rows])
        add_tiles(dv, keys, group.used, p.mT @ do[rows])
    of_rows = torch.stack((of_alpha / (problem.alpha - 1.0) ** 2, (dq * q).sum(-1), of_slopes))
    of_parameters = of_rows.sum((-2, -1)).unflatten(-1, query.shape[:2])[: 3 * parameters]
    gradients = zip((dq * problem.scale, dk * problem.scale, dv), (query, key, value), strict=True)
    return Gradients(*(unpadded(tiles, like) for tiles, like in gradients), of_parameters)


def attention_tangent(
    problem: Problem, modifiers: Modifiers, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor,
    maximum: Tensor, offset: Tensor, live: Tensor, tangents: Tangents,
) -> Tensor:  # fmt: skip
    """The output's derivative along the tangents, in the dtype of the output."""
    result = torch.empty_like(value_mean)
    for part, own_modifiers, own, shared in by_head(problem, modifiers):
        of_keys = (
            None if tensor is None else tensor[:, shared] for tensor in (key, value, tangents.key, tangents.value)
        )
        key_part, value_part, key_tangent, value_tangent = of_keys
        own_tangents = Tangents(
            None if tangents.query is None else tangents.query[:, own],
            key_tangent,
            value_tangent,
            *(None if number is None else number[own].item() for number in (tangents.alpha, tangents.scale)),
            None if tangents.slopes is None else tangents.slopes[:, own],
        )
        of_rows = (tensor[:, own] for tensor in (query, value_mean, maximum, offset, live))
        result[:, own] = tangent_of(part, own_modifiers, key_part, value_part, *of_rows, own_tangents)
    return result


def tangent_of(
    problem: Problem, modifiers: Modifiers, key: Tensor, value: Tensor, query: Tensor, value_mean: Tensor,
    maximum: Tensor, offset: Tensor, live: Tensor, tangents: Tangents,
) -> Tensor:  # fmt: skip
    """`attention_tangent` with one alpha and scale, whose tangents are numbers, in the compute dtype.

    dO = sum dp v + sum p dv with t = u ds + r^2 d alpha p (1 - ln d) and dp = t - u sum t / sum u: sum p stays 1.
    """
    scope = Scope.of(problem, modifiers, query.device)
    q, k, v, mean = (tiles_of(tensor) for tensor in (query, key, value, value_mean))
    dq, dk, dv = (None if t is None else tiles_of(t) for t in (tangents.query, tangents.key, tangents.value))
    slopes = None if tangents.slopes is None else tangents.slopes.to(q.dtype).flatten()
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    result = torch.zeros_like(mean)
    for group in groups(problem.unpack_live(live, TILE).flatten(0, 1)):
        rows, keys = group.rows, group.keys(problem)
        k_group, v_group = (tiles_of_keys(tensor, keys, group.used) for tensor in (k, v))
        product = products(problem, q[rows], k_group)
        steepness = 1 - product * product if problem.softcap else 1.0
        ds = torch.zeros_like(product)
        if dq is not None:
            ds.add_(torch.bmm(dq[rows], k_group.mT), alpha=problem.scale)
        if dk is not None:
            ds.add_(torch.bmm(q[rows], tiles_of_keys(dk, keys, group.used).mT), alpha=problem.scale)
        if tangents.scale:
            ds.add_(torch.bmm(q[rows], k_group.mT), alpha=tangents.scale)
        ds.mul_(steepness)
        if slopes is not None:
            ds.sub_(scope.separations(group).mul_(slopes[group.unit][:, None, None]))
        distance = distances(scores(problem, scope, product, group)[0], maximum[rows], offset[rows])
        p, u = probability(distance, problem.alpha), support_weight(distance, problem.alpha)
        dp = torch.where(u == 0, 0.0, u * ds)
        if tangents.alpha:
            weight = p * (1 - torch.where(distance > 0, distance, 1.0).log_())
            dp.add_(weight, alpha=tangents.alpha / (problem.alpha - 1.0) ** 2)
        total = u.sum(-1, keepdim=True)
        dp.sub_(u * (dp.sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)))
        result[rows] = product_with(dp, v_group)
        if dv is not None:
            result[rows] += product_with(p, tiles_of_keys(dv, keys, group.used))
    return unpadded(result, query)


def distances(z: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """[z - tau]_+, in place; 0 where the key is hidden and in unused tiles."""
    return z.sub_(maximum.unsqueeze(-1)).add_(offset.unsqueeze(-1)).clamp_min_(0)


def support(
    problem: Problem, modifiers: Modifiers, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum in units of z, the support size of each row (int32) and the exact map of live tiles (bool)."""
    size = torch.empty_like(maximum, dtype=torch.int32)
    marks = problem.unpack_live(live, TILE)
    for part, own_modifiers, own, shared in by_head(problem, modifiers):
        of_rows = (tensor[:, own] for tensor in (query, maximum, offset, marks))
        size[:, own], marks[:, own] = count_support(part, own_modifiers, key[:, shared], *of_rows)
    return maximum.clone(), size, marks


def count_support(
    problem: Problem, modifiers: Modifiers, key: Tensor, query: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Sizes and live tiles with one alpha and scale."""
    scope = Scope.of(problem, modifiers, query.device)
    q, k = tiles_of(query), tiles_of(key)
    maximum, offset = pad_rows(maximum, torch.inf), pad_rows(offset, 1.0)
    size, marks = torch.zeros_like(offset, dtype=torch.int32), live.flatten(0, 1).clone()
    for group in groups(marks):
        rows = group.rows
        keys = tiles_of_keys(k, group.keys(problem), group.used)
        z, _ = scores(problem, scope, products(problem, q[rows], keys), group)
        reached = distances(z, maximum[rows], offset[rows]) > 0
        size[rows] = reached.sum(-1, dtype=torch.int32)
        marks[group.tiles] = by_tile(reached, group).any(-1).any(1)
    return unpadded(size, query), marks.unflatten(0, query.shape[:2])
