"""The specification: entmax attention by its definition, dense, in plain autograd. Slow on purpose; best in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Problem, Support
from .sight import UNLIMITED, Sight
from .threshold import threshold_by_bisection, threshold_by_sort


def entmax_rows(z: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities p = [z - tau]_+^(1 / (alpha - 1)) over the last dimension, with the row's maximum and offset.

    Differentiable in z, and in alpha where it is a tensor. tau is found without autograd; one Newton step, next to zero
    in value, then gives it the gradient of the implicit function: d tau / d z_j = u_j / sum u.
    """
    if z.shape[-1] == 0:
        return z, torch.full_like(z.sum(-1), torch.inf), torch.ones_like(z.sum(-1))
    r = 1.0 / (alpha - 1.0)
    with torch.no_grad():
        value = float(alpha)
        solve = threshold_by_sort if value in (1.5, 2.0) else threshold_by_bisection
        maximum, offset = solve(z, value)
    distance = positive(z - maximum.unsqueeze(-1) + offset.unsqueeze(-1))
    slope = r * torch.where(distance > 0, distance.detach() ** (r - 1.0), 0.0).sum(-1)
    total = positive_power(distance, r).sum(-1)
    correction = torch.where(slope > 0, (total - 1.0) / slope.clamp_min(torch.finfo(z.dtype).tiny), 0.0)
    distance = positive(z - maximum.unsqueeze(-1) + (offset - correction).unsqueeze(-1))
    return positive_power(distance, r), maximum, offset


def positive(x: Tensor) -> Tensor:
    """x where it is positive, else 0; NaN stays NaN, and masked entries pass no gradient."""
    return torch.where(x <= 0, 0.0, x)


def positive_power(distance: Tensor, r: float | Tensor) -> Tensor:
    """distance^r; a tensor r gets no gradient, and no NaN, from distances of 0."""
    if not isinstance(r, Tensor):
        return distance**r
    inside = torch.where(distance > 0, distance, 1.0)
    return torch.where(distance > 0, inside**r, distance)


def visible_mask(problem: Problem, sight: Sight, device: torch.device) -> tuple[Tensor, Tensor]:
    """((batch or 1, heads or 1, query length, key length) bool, True where the query sees the key;
    (batch or 1, 1, query length, key length), the distance from the query's position to the key)."""
    position = sight.query_positions if isinstance(sight.query_positions, Tensor) else None
    batch = 1 if position is None or position.dim() == 1 else problem.batch
    visible = torch.zeros(batch, 1, problem.query_length, problem.key_length, dtype=torch.bool, device=device)
    distance = torch.zeros_like(visible, dtype=torch.int64)
    left, right = sight.window
    for queries, keys in sequences(problem, sight):
        among = torch.arange(keys.stop - keys.start, device=device)
        if position is None:
            first = sight.query_positions
            first = (keys.stop - keys.start) - (queries.stop - queries.start) if first is None else first
            place = (torch.arange(queries.stop - queries.start, device=device) + first).expand(batch, -1)
        else:
            place = position.expand(batch, -1)[:, queries].long()
        ahead = (among - place.unsqueeze(-1)).unsqueeze(1)
        inside = torch.ones_like(ahead, dtype=torch.bool)
        if left != UNLIMITED:
            inside &= ahead >= -left
        if right != UNLIMITED:
            inside &= ahead <= right
        visible[:, :, queries, keys] = inside
        distance[:, :, queries, keys] = ahead.abs()
    if sight.key_lengths is not None:
        visible = visible & (torch.arange(problem.key_length, device=device) < sight.key_lengths[:, None, None, None])
    if sight.key_mask is not None:
        visible = visible & sight.key_mask[:, None, None, :]
    if sight.block_mask is not None:
        visible = visible & blocks_mask(problem, sight.block_mask)
    return visible, distance


def sequences(problem: Problem, sight: Sight) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each packed sequence, or of the one that there is."""
    if sight.cu_seq_q is None:
        yield slice(0, problem.query_length), slice(0, problem.key_length)
        return
    cu_q, cu_k = sight.cu_seq_q.tolist(), sight.cu_seq_k.tolist()
    for n in range(len(cu_q) - 1):
        yield slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])


def blocks_mask(problem: Problem, block_mask) -> Tensor:
    """(batch or 1, heads or 1, query length, key length) bool of a FlexAttention BlockMask."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = block_mask.kv_indices.shape[:2]
    extents = batch, heads, problem.query_length, problem.key_length
    partial = create_mask(block_mask.mask_mod, *extents, device=block_mask.kv_indices.device)
    whole = torch.zeros_like(partial)
    listed = torch.zeros_like(partial)
    rows, columns = block_mask.BLOCK_SIZE
    for b in range(batch):
        for h in range(heads):
            for i, count in enumerate(block_mask.kv_num_blocks[b, h].tolist()):
                for j in block_mask.kv_indices[b, h, i, :count].tolist():
                    listed[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
            if block_mask.full_kv_num_blocks is None:
                continue
            for i, count in enumerate(block_mask.full_kv_num_blocks[b, h].tolist()):
                for j in block_mask.full_kv_indices[b, h, i, :count].tolist():
                    whole[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
    return whole | (listed & partial)


def alibi(slopes: Tensor, distance: Tensor) -> Tensor:
    """(batch, heads, query length, key length): slope * distance; 0 at distance 0, whatever the slope."""
    return torch.where(distance == 0, 0.0, slopes[:, :, None, None] * distance.to(slopes.dtype))


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scale: float | Tensor,
    slopes: Tensor | None = None,
    sight: Sight | None = None,
    tile: int = 64,
) -> tuple[Tensor, Support]:
    """Output and support of entmax attention; softmax where alpha is exactly 1, which attends to every visible key.

    alpha and scale are floats, or tensors (heads,); slopes are (batch, heads).
    """
    sight = Sight(problem.is_causal) if sight is None else sight
    key = key.repeat_interleave(problem.group, dim=1)
    value = value.repeat_interleave(problem.group, dim=1)
    visible, distance = visible_mask(problem, sight, query.device)
    scores = (scale.view(-1, 1, 1) if isinstance(scale, Tensor) else scale) * (query @ key.mT)
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if slopes is not None:
        visible = visible & ~((slopes == torch.inf)[:, :, None, None] & (distance > 0))
        scores = torch.where(visible, scores - alibi(slopes, distance).to(scores.dtype), 0.0)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        scores = scores.masked_fill(~visible, -torch.inf)
        probability = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        maximum, offset = scores.amax(-1), torch.full_like(scores[..., 0], torch.inf)
    else:
        z = ((alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha) - 1.0) * scores
        z = z.masked_fill(~visible, -torch.inf)
        if isinstance(alpha, Tensor):
            heads = [entmax_rows(z[:, h], a) for h, a in enumerate(alpha)]
            probability, maximum, offset = (torch.stack(parts, 1) for parts in zip(*heads, strict=True))
        else:
            probability, maximum, offset = entmax_rows(z, alpha)
    return probability.to(value.dtype) @ value, support_of(probability, maximum, offset, tile)


def support_of(probability: Tensor, maximum: Tensor, offset: Tensor, tile: int) -> Support:
    live = probability.detach() > 0
    rows, keys = live.shape[-2:]
    padded = torch.nn.functional.pad(live, (0, -keys % tile, 0, -rows % tile))
    tiles = padded.unflatten(-1, (-1, tile)).unflatten(-3, (-1, tile)).any(-1).any(-2)
    return Support(maximum.detach(), offset.detach(), live.sum(-1, dtype=torch.int32), tiles, (tile, tile))
