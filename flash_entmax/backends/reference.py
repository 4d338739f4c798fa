"""The specification: entmax attention by its definition, dense, in plain autograd. Slow on purpose; best in float64."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.call import Problem, Support
from ..core.intervals import UNLIMITED
from ..core.threshold import row_maximum, threshold_by_bisection, threshold_by_sort
from ..core.visibility import Visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def entmax_rows(z: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities p = [z - tau]_+^(1 / (alpha - 1)) over the last dimension, with the row's maximum and offset.

    Twice differentiable in z, and in alpha where it is a tensor. tau is found without autograd; a Newton step, next to
    zero in value, then gives it the first derivative of the implicit function, d tau / d z_j = u_j / sum u, and another
    step the second one.
    """
    if z.shape[-1] == 0:
        return z, torch.full_like(z.sum(-1), torch.inf), torch.ones_like(z.sum(-1))
    r = 1.0 / (alpha - 1.0)
    with torch.no_grad():
        if isinstance(alpha, Tensor):
            maximum, offset = threshold_by_bisection(z.detach(), alpha.detach())
        else:
            solve = threshold_by_sort if alpha in (1.5, 2.0) else threshold_by_bisection
            maximum, offset = solve(z.detach(), alpha)
    below = z - maximum.unsqueeze(-1)
    moving = offset
    for _ in range(2):
        distance = positive(below + moving.unsqueeze(-1))
        slope = (r * positive_power(distance, r - 1.0).masked_fill(distance <= 0, 0.0)).sum(-1)
        excess = positive_power(distance, r).sum(-1) - 1.0
        moving = moving - torch.where(slope > 0, excess / slope.clamp_min(torch.finfo(z.dtype).tiny), 0.0)
    distance = positive(below + moving.unsqueeze(-1))
    return positive_power(distance, r), maximum, offset


def positive(x: Tensor) -> Tensor:
    """x where it is positive, else 0; NaN stays NaN, and masked entries pass no gradient."""
    return torch.where(x <= 0, 0.0, x)


def positive_power(distance: Tensor, r: float | Tensor) -> Tensor:
    """distance^r for r >= 0, with derivatives of 0, and none of them NaN, at distances of 0."""
    inside = torch.where(distance > 0, distance, 1.0)
    return torch.where(distance > 0, inside**r, distance)


def visible_mask(problem: Problem, options: Visibility, device: torch.device) -> tuple[Tensor, Tensor]:
    """((batch or 1, heads or 1, query length, key length) bool, True where the query sees the key;
    (batch or 1, 1, query length, key length), the distance from the query's position to the key)."""
    query, key = (torch.arange(length, device=device) for length in (problem.query_length, problem.key_length))
    visible = torch.ones(problem.query_length, problem.key_length, dtype=torch.bool, device=device)
    first: int | Tensor = 0
    position = query + problem.diagonal
    if options.cu_seq_q is not None and options.cu_seq_k is not None:
        visible, first, position = sequences(options.cu_seq_q.long(), options.cu_seq_k.long(), query, key)
    if isinstance(options.query_positions, Tensor):
        position = first + options.query_positions.long()
    elif options.query_positions is not None:
        position = query + options.query_positions
    if options.known_intervals is not None:
        start, stop, position = options.known_intervals.long().unbind(1)
        visible = ((start.unsqueeze(-1) <= key) & (key < stop.unsqueeze(-1))).unsqueeze(1)
    position = position if position.dim() == 2 else position.unsqueeze(0)
    ahead = (key - position.unsqueeze(-1)).unsqueeze(1).masked_fill(~visible, 0)
    visible = visible.expand_as(ahead)
    left, right = options.window
    if left != UNLIMITED:
        visible = visible & (ahead >= -left)
    if right != UNLIMITED:
        visible = visible & (ahead <= right)
    if options.key_lengths is not None:
        visible = visible & (key < options.key_lengths[:, None, None, None])
    if options.key_mask is not None:
        visible = visible & options.key_mask[:, None, None, :]
    if options.block_mask is not None:
        visible = visible & blocks_mask(problem, options.block_mask)
    return visible, ahead.abs()


def sequences(cu_q: Tensor, cu_k: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of packed sequences: (query length, key length) bool, whether query and key are of one sequence; of each query,
    the first key of its sequence, and its position, by which the last query stands at the last key."""
    count = cu_q.shape[0] - 1
    own, other = (torch.searchsorted(cu, token, right=True) - 1 for cu, token in ((cu_q, query), (cu_k, key)))
    same = (own.unsqueeze(-1) == other) & (other < count)
    end = (own + 1).clamp_max(count)
    return same, cu_k[own.clamp_max(count)], cu_k[end] - cu_q[end] + query


def blocks_mask(problem: Problem, block_mask: "BlockMask") -> Tensor:
    """(batch or 1, heads or 1, query length, key length) bool of a FlexAttention BlockMask."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = block_mask.kv_indices.shape[:2]
    sizes = batch, heads, problem.query_length, problem.key_length
    partial = create_mask(block_mask.mask_mod, *sizes, device=block_mask.kv_indices.device)
    whole = torch.zeros_like(partial)
    listed = torch.zeros_like(partial)
    rows, columns = block_mask.BLOCK_SIZE
    for b in range(batch):
        for h in range(heads):
            for i, count in enumerate(block_mask.kv_num_blocks[b, h].tolist()):
                for j in block_mask.kv_indices[b, h, i, :count].tolist():
                    listed[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
            if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
                continue
            for i, count in enumerate(block_mask.full_kv_num_blocks[b, h].tolist()):
                for j in block_mask.full_kv_indices[b, h, i, :count].tolist():
                    whole[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
    return whole | (listed & partial)


def alibi(slopes: Tensor, distance: Tensor) -> Tensor:
    """(batch, heads, query length, key length): slope * distance; 0 at distance 0, whatever the slope."""
    return torch.where(distance == 0, 0.0, slopes[:, :, None, None] * distance.to(slopes.dtype))


def scores_by_definition(
    problem: Problem, query: Tensor, key: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (batch, heads, query length, key length), of hidden keys too; then, of such or broadcastable shapes, True
    where the query sees the key, and the distance from the query's position to the key. An infinite slope hides keys.
    """
    _, scale, softcap, slopes = problem.score
    assert scale is not None  # the score is lowered
    key = key.repeat_interleave(problem.group, dim=1)
    visible, distance = visible_mask(problem, visibility, query.device)
    scores = (scale.view(-1, 1, 1) if isinstance(scale, Tensor) else scale) * (query @ key.mT)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        visible = visible & ~((slopes == torch.inf)[:, :, None, None] & (distance > 0))
        scores = torch.where(visible, scores - alibi(slopes, distance).to(scores.dtype), 0.0)
    return scores, visible, distance


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility | None = None,
    tile: int = 64,
) -> tuple[Tensor, Support]:
    """Output and support of entmax attention; softmax where alpha is exactly 1, which attends to every visible key.

    Masks are read as the caller gave them. Without them, the problem's own is_causal holds.
    """
    visibility = Visibility(problem.visibility.is_causal) if visibility is None else visibility
    alpha = problem.score.alpha
    value = value.repeat_interleave(problem.group, dim=1)
    scores, visible, _ = scores_by_definition(problem, query, key, visibility)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        scores = scores.masked_fill(~visible, -torch.inf)
        probability = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        maximum = row_maximum(scores)
        offset = torch.full_like(maximum, torch.inf)
    else:
        z = ((alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha) - 1.0) * scores
        z = z.masked_fill(~visible, -torch.inf)
        z = z.masked_fill((z == -torch.inf).all(-1, keepdim=True) & visible, torch.nan)  # no key is the largest
        if isinstance(alpha, Tensor):
            heads = [entmax_rows(z[:, h], a) for h, a in enumerate(alpha)] or [entmax_rows(z.sum(1), 1.5)]
            probability, maximum, offset = (
                torch.stack(parts, 1)[:, : len(alpha)] for parts in zip(*heads, strict=True)
            )
        else:
            probability, maximum, offset = entmax_rows(z, alpha)
    output = (probability.to(value.dtype) @ value).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return output, support_of(probability, maximum, offset, tile)


def support_of(probability: Tensor, maximum: Tensor, offset: Tensor, tile: int) -> Support:
    live = probability.detach() > 0
    rows, keys = live.shape[-2:]
    padded = live.new_zeros(*live.shape[:-2], rows + -rows % tile, keys + -keys % tile)
    padded[..., :rows, :keys] = live
    by_tile_of_queries = padded.unflatten(-2, (-1, tile)).any(-2)
    tiles = by_tile_of_queries.unflatten(-1, (-1, tile)).any(-1)
    size, union = (marks.sum(-1, dtype=torch.int32) for marks in (live, by_tile_of_queries))
    return Support(maximum.detach(), offset.detach(), size, tiles, (tile, tile), union)
