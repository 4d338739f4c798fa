"""Decoding in plain PyTorch: few query rows against many keys, row by row, without tiles of rows.

One product has the scores of all keys. The query heads of a key head are its rows, so keys are neither copied nor
repeated. The maxima of blocks of keys certify an offset at or above that of each row, which leaves few keys of a row.
Only these are listed, solved, and read of the values. A row that keeps a large share of its keys is solved over all of
them, and multiplied with all values.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import MOST_DECODED, Problem
from ...core.tensors import ceil_div, row_dtype
from ...core.threshold import certified_offset, smallest_offset, solve
from .output import outputs
from .tiles import CHUNK_SCORES, TILE, TileVisibility, limits_of

BLOCK = 64  # keys of which one maximum is kept
LIST = 64  # lists of keys, and of blocks, are filled up to multiples of it: then sums go in the same order
DENSE_SHARE = 1 / 4  # of the keys: a row that keeps more is not listed
STEPS = 2  # of Newton on the maxima of blocks
GATHERED = 2**20  # numbers of values that are gathered at a time


class RowThresholds(NamedTuple):
    """Of each row: its maximum of z, and what its offset lies between, (rows,)."""

    maximum: Tensor
    low: Tensor
    high: Tensor


class ListedKeys(NamedTuple):
    """Of each row the keys that may be in its support, in order, filled up to one width.

    key and relative: (rows, width), where relative is z - maximum, and -inf where there is no key. count: (rows,).
    """

    key: Tensor
    relative: Tensor
    count: Tensor


def is_decoding(problem: Problem, needs_backward: bool) -> bool:
    """Whether `decode` computes the call: few queries, and no gradient."""
    return not needs_backward and not problem.is_empty and problem.query_length <= MOST_DECODED


def decode(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
) -> tuple[Tensor | None, ...]:
    """The output with one alpha and scale, in the compute dtype, and None for what only a gradient needs."""
    parts = list(parts_by_size(problem))
    if len(parts) == 1:
        output = decode_part(problem, query, key, value).view(*query.shape[:3], -1)
    else:
        output = query.new_empty(*query.shape[:3], problem.value_size, dtype=row_dtype(query))
        for part, batch, own, shared in parts:
            rows = decode_part(part, query[batch, own], key[batch, shared], value[batch, shared])
            output[batch, own] = rows.view(part.batch, part.heads, part.query_length, -1)
    return output, None, None, None, None


def parts_by_size(problem: Problem) -> Iterator[tuple[Problem, slice, slice, slice]]:
    """Calls of at most CHUNK_SCORES scores, or of one key head; their batch rows, heads, and key heads."""
    of_key_head = problem.group * problem.query_length * problem.key_length
    batch_step = max(1, CHUNK_SCORES // (problem.key_heads * of_key_head))
    head_step = min(problem.key_heads, max(1, CHUNK_SCORES // of_key_head))
    for row in range(0, problem.batch, batch_step):
        for head in range(0, problem.key_heads, head_step):
            batch = slice(row, min(row + batch_step, problem.batch))
            shared = slice(head, min(head + head_step, problem.key_heads))
            own = slice(shared.start * problem.group, shared.stop * problem.group)
            yield part_of(problem, batch, own, shared), batch, own, shared


def part_of(problem: Problem, batch: slice, own: slice, shared: slice) -> Problem:
    """The call of some batch rows and heads."""
    score, visibility = problem.score, problem.visibility
    if score.alibi_slopes is not None:
        score = score._replace(alibi_slopes=score.alibi_slopes[batch, own])
    if visibility.intervals is not None:
        visibility = visibility._replace(intervals=visibility.intervals[batch])
    if visibility.tile_kinds is not None:
        kinds = visibility.tile_kinds.expand(problem.batch, -1, -1, -1)[batch]
        visibility = visibility._replace(tile_kinds=kinds if kinds.shape[1] == 1 else kinds[:, own])
    sizes = {"batch": batch.stop - batch.start, "heads": own.stop - own.start, "key_heads": shared.stop - shared.start}
    return replace(problem, **sizes, score=score, visibility=visibility)


def decode_part(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(rows, value size), with the rows in the order (batch, heads, query length)."""
    limits = None if sees_all_keys(problem) else limits_of(problem, query.device)
    first, end = (0, problem.key_length) if limits is None else seen_range(problem, limits)
    if first >= end:
        return query.new_zeros(*query.shape[:3], problem.value_size, dtype=row_dtype(query)).flatten(0, 2)
    key, value = key[:, :, first:end], value[:, :, first:end]
    z = scores(problem, query, key)
    visible = torch.full_like(z[..., 0], end - first)
    if limits is not None:
        visible = hide(problem, z[..., : end - first], first, *limits).to(z.dtype).expand_as(visible)
    z, visible = z.flatten(0, 2), visible.flatten()
    block_maxima = z.unflatten(-1, (-1, BLOCK)).amax(-1)
    rows = certified_rows(problem.score.alpha, block_maxima, visible)
    listed, is_dense = listed_keys(z, block_maxima, rows)
    output = outputs_of_lists(problem, listed, rows, value)
    if is_dense is not None:
        size = len(z) // problem.batch
        for some, first, end in seen_by_batch_rows(problem, block_maxima):
            own = slice(size * some.start, size * some.stop)
            thresholds, own_value = RowThresholds(*(numbers[own] for numbers in rows)), value[some, :, first:end]
            write_dense_outputs(problem, output[own], z[own, first:end], thresholds, own_value, is_dense[own])
    return output if limits is None else output.masked_fill_((visible == 0).unsqueeze(-1), 0.0)


def seen_by_batch_rows(problem: Problem, block_maxima: Tensor) -> list[tuple[slice, int, int]]:
    """(batch rows, the first key that they see, one past the last), at the edges of blocks: all at once if they see the
    same, else each by itself. So the sums of a row have as many terms whatever else is in the batch.
    """
    is_seen = (block_maxima != -torch.inf).view(problem.batch, -1, block_maxima.shape[1]).any(1)
    each = [seen.nonzero().flatten().tolist() or [0] for seen in is_seen]
    ranges = [(BLOCK * blocks[0], BLOCK * (blocks[-1] + 1)) for blocks in each]
    if len(set(ranges)) == 1:
        return [(slice(0, problem.batch), *ranges[0])]
    return [(slice(row, row + 1), *own) for row, own in enumerate(ranges)]


def sees_all_keys(problem: Problem) -> bool:
    """No score is hidden or changed by the position of its key."""
    visibility = problem.visibility
    is_masked = visibility.intervals is not None or visibility.tile_kinds is not None
    is_causal = visibility.is_causal and problem.query_length > 1
    return not is_masked and not is_causal and problem.score.alibi_slopes is None


def seen_range(problem: Problem, limits: tuple) -> tuple[int, int]:
    """The first key and one past the last of all that some row sees, at the edges of blocks."""
    start, stop = limits[:2]
    is_blind = start >= stop
    end = stop.masked_fill(is_blind, 0).amax().item()
    first = start.masked_fill(is_blind, problem.key_length).amin().item()
    return BLOCK * (first // BLOCK), min(BLOCK * ceil_div(end, BLOCK), problem.key_length)


def scores(problem: Problem, query: Tensor, key: Tensor) -> Tensor:
    """z before any mask, (batch, heads, query length, keys), and -inf up to whole blocks of keys."""
    alpha, scale, softcap, _ = problem.score
    rows = query.to(row_dtype(query)).reshape(problem.batch, problem.key_heads, -1, problem.head_size)
    z = products_by_key_head(rows, key, scale / softcap if softcap else problem.z_scale)
    if softcap:
        z.tanh_().mul_((alpha - 1.0) * softcap)
    if key.shape[2] % BLOCK:
        z = pad(z, (0, -key.shape[2] % BLOCK), value=-torch.inf)
    return z.view(*query.shape[:3], -1)


def products_by_key_head(rows: Tensor, key: Tensor, factor: float) -> Tensor:
    """factor * row . key, (batch, key heads, rows, keys). Keys in 16 bits are converted some at a time."""
    batch, heads, keys, size = key.shape
    is_converted = key.dtype != rows.dtype
    if not is_converted and (batch == 1 or key.stride(0) == heads * key.stride(1)):
        return products(rows.flatten(0, 1), key.flatten(0, 1), factor).unflatten(0, (batch, heads))
    step = max(1, CHUNK_SCORES // (heads * size)) if is_converted else keys
    product = rows.new_empty(*rows.shape[:3], keys)
    for own_rows, own_keys, own in zip(rows, key, product, strict=True):
        for start in range(0, keys, step):
            some = slice(start, start + step)
            own[..., some] = products(own_rows, own_keys[:, some].to(rows.dtype), factor)
    return product


def products(rows: Tensor, key: Tensor, factor: float) -> Tensor:
    """factor * rows @ key^T, contiguous. With keys on the left, several rows need half the time, transposed or not."""
    nothing = rows.new_zeros(1, 1, 1)
    if rows.shape[1] == 1:
        return torch.baddbmm(nothing, rows, key.mT, beta=0, alpha=factor)
    return torch.baddbmm(nothing, key, rows.mT, beta=0, alpha=factor).mT.contiguous()


def hide(
    problem: Problem, z: Tensor, first: int, start: Tensor, stop: Tensor, position: Tensor, slopes: Tensor | None
) -> Tensor:
    """Take ALiBi's penalty from z, and write -inf where a row does not see the key.

    z has the keys from the first on. Returns (batch, heads or 1, query length), how many keys each row sees.
    """
    key = torch.arange(first, first + z.shape[-1], device=z.device)
    if slopes is not None:
        apart = (position.to(z.dtype).unsqueeze(-1) - key.to(z.dtype)).abs_()
        z.sub_(apart * ((problem.score.alpha - 1.0) * slopes)[..., None, None])
    seen = (start.unsqueeze(-1) <= key) & (key < stop.unsqueeze(-1))
    if problem.visibility.tile_kinds is not None:
        seen = seen & seen_by_tiles(problem, start, stop, position)[..., first : first + z.shape[-1]]
    z.masked_fill_(~seen, -torch.inf)
    return seen.sum(-1)


def seen_by_tiles(problem: Problem, *limits: Tensor) -> Tensor:
    """(batch, heads or 1, query length or 1, keys of whole tiles) bool: the pairs that the filter by tiles leaves."""
    kinds = problem.visibility.tile_kinds[:, :, 0, :-1]
    visibility = TileVisibility(*limits, None, None, problem.visibility.tile_bits)
    key = torch.arange(TILE, device=kinds.device).expand(kinds.numel(), -1)
    seen = visibility.mask(kinds.flatten(), key).expand(-1, -1, TILE)
    return seen.unflatten(0, kinds.shape).transpose(2, 3).flatten(3)


def certified_rows(alpha: float, block_maxima: Tensor, visible: Tensor) -> RowThresholds:
    """Where the thresholds of the rows lie. A row with a NaN or an infinite maximum gets NaN for its offset."""
    largest, sees = block_maxima.amax(-1), visible > 0
    maximum = torch.where(sees, largest, torch.inf)
    filled = pad(block_maxima, (0, -block_maxima.shape[-1] % LIST), value=-torch.inf)
    high = certified_offset(filled, maximum, alpha, STEPS)
    high.masked_fill_(sees & (largest - largest != 0), torch.nan)
    return RowThresholds(maximum, smallest_offset(visible, alpha), high)


def listed_keys(z: Tensor, block_maxima: Tensor, rows: RowThresholds) -> tuple[ListedKeys, Tensor | None]:
    """Keys above the certified threshold. Of rows that have too many, none; (rows,) bool, which these are, if any."""
    count, blocks = block_maxima.shape
    cut = (rows.maximum - rows.high).nextafter(rows.maximum.new_tensor(-torch.inf)).unsqueeze(-1)
    row, block = (block_maxima > cut).nonzero(as_tuple=True)
    listed = z.view(-1, BLOCK).index_select(0, row * blocks + block)
    place = (listed > cut[row]).view(-1).nonzero().squeeze(-1)
    edges = torch.searchsorted(place, BLOCK * torch.arange(len(row) + 1, device=row.device))
    counts = row.new_zeros(count).index_add_(0, row, edges.diff())
    longest, most = int(counts.max()), max(LIST, DENSE_SHARE * z.shape[-1])
    if longest > most:
        is_dense = counts > most
        return listed_keys(z, block_maxima.masked_fill(is_dense.unsqueeze(-1), -torch.inf), rows)[0], is_dense
    within = place // BLOCK
    row, key = row[within], block[within] * BLOCK + place % BLOCK
    relative = listed.view(-1)[place] - rows.maximum[row]
    width = LIST * max(1, ceil_div(longest, LIST))
    place = row * width + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys = key.new_zeros(count * width).index_copy_(0, place, key)
    relative = z.new_full((count * width,), -torch.inf).index_copy_(0, place, relative)
    return ListedKeys(keys.view(count, width), relative.view(count, width), counts), None


def outputs_of_lists(problem: Problem, listed: ListedKeys, rows: RowThresholds, value: Tensor) -> Tensor:
    """(rows, value size): the output over the listed keys."""
    alpha, width = problem.score.alpha, listed.key.shape[1]
    relative, high = listed.relative.unsqueeze(1), rows.high.unsqueeze(1)
    offset = solve(alpha, relative, relative[..., 0] > -torch.inf, rows.low.unsqueeze(1), high)
    # What is multiplied with 0 is the value of the row's maximum, so that no NaN of another key comes in.
    largest = listed.key.gather(1, listed.relative.argmax(1, keepdim=True))
    key = torch.where(listed.relative + offset > 0, listed.key, largest)
    values, place = rows_of_values(problem, value, key)
    output = value.new_empty(len(key), value.shape[-1], dtype=offset.dtype)
    for some, width in chunks_of_lists(listed, value.shape[-1]):
        chosen = values.index_select(0, place[some, :width].flatten()).view(-1, width, value.shape[-1])
        output[some] = outputs(alpha, relative[some, :, :width], offset[some], chosen.to(output.dtype))[0].squeeze(1)
    return output


def chunks_of_lists(listed: ListedKeys, value_size: int) -> Iterator[tuple[Tensor | slice, int]]:
    """Rows whose values are gathered together, and the width of their lists: rows with long lists come first."""
    rows, width = listed.key.shape
    if rows * width * value_size <= GATHERED:
        yield slice(None), width
        return
    order = listed.count.argsort(descending=True, stable=True)
    widths = [LIST * max(1, ceil_div(count, LIST)) for count in listed.count[order].tolist()]
    start = 0
    while start < rows:
        stop = start + max(1, GATHERED // (widths[start] * value_size))
        yield order[start:stop], widths[start]
        start = stop


def rows_of_values(problem: Problem, value: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """A view of the values with a row at every element, and (rows, width), which of them the keys of each row are."""
    value = value if value.stride(3) == 1 else value.contiguous()
    heads = [
        row * value.stride(0) + head // problem.group * value.stride(1)
        for row in range(problem.batch)
        for head in range(problem.heads)
    ]
    first = torch.tensor(heads, device=key.device).repeat_interleave(problem.query_length).unsqueeze(-1)
    elements = sum((size - 1) * stride for size, stride in zip(value.shape[:3], value.stride()[:3], strict=True)) + 1
    return value.as_strided((elements, value.shape[3]), (1, 1)), first + key * value.stride(2)


def write_dense_outputs(
    problem: Problem, output: Tensor, z: Tensor, rows: RowThresholds, value: Tensor, is_dense: Tensor
) -> None:
    """Solve the dense rows over all keys. The rows of a key head are multiplied with its values together."""
    units = value.shape[0] * problem.key_heads
    is_dense, output, z = (tensor.unflatten(0, (units, -1)) for tensor in (is_dense, output, z))
    unit = is_dense.any(-1).nonzero().squeeze(-1)
    maximum, low, high = (numbers.view(units, -1)[unit] for numbers in rows)
    relative = z[unit] - maximum.unsqueeze(-1)
    offset = solve(problem.score.alpha, relative, is_dense[unit], low, high)
    all_units = len(unit) == units
    chosen = value.flatten(0, 1) if all_units else value[unit // problem.key_heads, unit % problem.key_heads]
    dense = outputs(problem.score.alpha, relative[..., : value.shape[2]], offset, chosen.to(offset.dtype))[0]
    output[unit] = torch.where(is_dense[unit].unsqueeze(-1), dense, output[unit])
