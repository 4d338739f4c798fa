"""An interval of keys for each query: what causality, windows, positions, padding and packed sequences are lowered to.

flash_entmax::intervals    first key, one past the last, and position of each query
"""

import torch
from torch import Tensor

from .registration import batch_into, fake, operator

UNLIMITED = -1
FURTHEST = 2**30  # a position beyond is taken for this one, so that differences fit 32 bits


@operator(
    "Tensor query, Tensor? query_positions, Tensor? key_lengths, Tensor? cu_seq_q, Tensor? cu_seq_k, "
    "SymInt key_length, SymInt first_position, SymInt left, SymInt right, SymInt max_q, SymInt max_k",
    results=1,
)
def intervals(
    query: Tensor, query_positions: Tensor | None, key_lengths: Tensor | None, cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None, key_length: int, first_position: int, left: int, right: int, max_q: int, max_k: int,
) -> Tensor:  # fmt: skip
    sizes = query.shape[0], query.shape[2], key_length
    if key_lengths is not None:
        check_lengths(key_lengths, key_length)
    if cu_seq_q is not None and cu_seq_k is not None:
        check_packing(cu_seq_q, cu_seq_k, *sizes[1:], max_q, max_k)
    elif query_positions is None:
        left, right = narrowest_window(left, right, first_position, first_position + query.shape[2] - 1, key_length)
    limits = query_positions, key_lengths, cu_seq_q, cu_seq_k
    return intervals_of_rows(*limits, sizes, first_position, (left, right), query.device)


@fake("intervals")
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], 3, query.shape[2], dtype=torch.int32)


batch_into(intervals, (0, None, 0), (0,))


def intervals_of_rows(
    query_positions: Tensor | None,
    key_lengths: Tensor | None,
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    sizes: tuple[int, int, int],
    first_position: int,
    window: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """(batch, 3, query length) int32: the first key that a query sees, one past the last, and the query's position.

    Keys count from 0 in the whole key tensor, in packed sequences too. `sizes` are (batch, query length, key length).
    Without positions, queries stand at `first_position` and on; the last query of a packed sequence stands at its last
    key. Decoding waits for each operator here, so there are as few as can be: four for `key_lengths` in int32.
    """
    batch, query_length, key_length = sizes
    left, right = window
    dtype = torch.int32 if max(window) < FURTHEST // 2 else torch.int64  # a position and a window add up in it
    start: Tensor | int = 0
    stop: Tensor | int = key_length
    position = None if query_positions is None else query_positions.clamp(-FURTHEST, FURTHEST).to(dtype)
    if cu_seq_q is not None and cu_seq_k is not None:
        start, stop, own_position = packed_rows(query_length, cu_seq_q, cu_seq_k, dtype)
        position = own_position if position is None else start + position
    elif position is None:
        position = torch.arange(first_position, first_position + query_length, dtype=dtype, device=device)
    if key_lengths is not None:
        stop = key_lengths.unsqueeze(-1)
    if left != UNLIMITED:
        first = position - left
        start = torch.maximum(first, start) if isinstance(start, Tensor) else first
    if right != UNLIMITED:
        end = position + (right + 1)
        stop = torch.minimum(end, stop) if isinstance(stop, Tensor) else end
    start, stop = (within_keys(row, position, key_length) for row in (start, stop))
    rows = torch.broadcast_tensors(*(row.to(torch.int32) for row in (start, stop, position)))
    return torch.stack(rows, -2).expand(batch, -1, -1).contiguous()


def narrowest_window(left: int, right: int, first: int, last: int, key_length: int) -> tuple[int, int]:
    """(left, right) for queries from position `first` to `last`. A side that reaches past all keys is no limit."""
    return UNLIMITED if last <= left else left, UNLIMITED if first + right + 1 >= key_length else right


def within_keys(row: Tensor | int, position: Tensor, key_length: int) -> Tensor:
    """A row of limits, or one that all queries share."""
    return row.clamp(0, key_length) if isinstance(row, Tensor) else torch.full_like(position, row)


def packed_rows(query_length: int, cu_q: Tensor, cu_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of each query token: the first key of its sequence, one past the last, and its own position.

    Tokens past the last boundary are a sequence without keys, behind the others.
    """
    row = torch.arange(query_length, device=cu_q.device, dtype=cu_q.dtype)
    sequence = torch.searchsorted(cu_q[1:], row, right=True)
    end_q, end_k = (torch.cat((cu[1:], cu[-1:])) for cu in (cu_q, cu_k))
    first, end, to_keys = torch.stack((cu_k, end_k, end_k - end_q)).to(dtype).index_select(1, sequence)
    return first, end, row + to_keys


def check_lengths(key_lengths: Tensor, key_length: int) -> None:
    """Their values, where reading them waits for no device. Elsewhere intervals end at the keys that there are."""
    if key_lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = key_lengths.tolist()
    if not all(0 <= length <= key_length for length in lengths):
        raise ValueError(f"key_lengths must be from 0 to {key_length}, the number of keys, got {lengths}")


def check_packing(
    cu_seq_q: Tensor, cu_seq_k: Tensor, query_length: int, key_length: int, max_q: int, max_k: int
) -> None:
    """The boundaries' values. On a GPU reading them would wait for the device, so they are asserted there."""
    packings = [("cu_seq_q", cu_seq_q, query_length, max_q), ("cu_seq_k", cu_seq_k, key_length, max_k)]
    if cu_seq_q is cu_seq_k:
        packings = [("cu_seq_q", cu_seq_q, min(query_length, key_length), min(max_q, max_k))]
    for name, boundaries, tokens, longest in packings:
        valid = _boundaries_are_valid(boundaries, tokens, longest)
        message = f"{name} must rise from 0 to at most {tokens} tokens in steps of at most {longest}"
        if boundaries.is_cuda:
            torch._assert_async(valid, message)
        elif not boundaries.is_meta and not valid:
            raise ValueError(f"{message}, got {boundaries.tolist()}")


def _boundaries_are_valid(boundaries: Tensor, tokens: int, longest: int) -> Tensor:
    """Scalar bool on the device: from 0 upwards to at most `tokens`, in steps of at most `longest`."""
    steps, longest = boundaries.diff(), min(longest, torch.iinfo(boundaries.dtype).max)
    return (boundaries[0] == 0) & (boundaries[-1] <= tokens) & ((steps >= 0) & (steps <= longest)).all()
