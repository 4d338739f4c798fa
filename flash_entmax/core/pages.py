"""Keys in pages: which page has which key of a batch row, and the same keys next to one another."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Problem, VisibilityArgs
from .intervals import UNLIMITED, intervals_of_rows


class Pages(NamedTuple):
    """Key n of batch row b is number n % page_size of page block_table[b, n // page_size].

    The queries of a row are its last tokens. Each sees the keys up to its own position.

    Attributes:
        block_table: (batch, pages of a row), int32 or int64. An entry of a page that has no key of the row may be
            anything.
        key_lengths: (batch,), int32 or int64: how many keys each row has.
        cu_seq_q: of packed queries, (batch + 1,), int32 or int64: where the queries of each row start and end; else
            None.
        left: how many keys before its own a query sees; -1 is no limit.
        page_size: keys of a page.
    """

    block_table: Tensor
    key_lengths: Tensor
    cu_seq_q: Tensor | None
    left: int
    page_size: int

    @property
    def capacity(self) -> int:
        """How many keys the pages of a row have room for."""
        return self.block_table.shape[1] * self.page_size

    @property
    def has_window(self) -> bool:
        return self.left != UNLIMITED

    @property
    def boundaries(self) -> Tensor:
        """`cu_seq_q`, where queries are packed."""
        assert self.cu_seq_q is not None
        return self.cu_seq_q


def rows_fit(pages: Pages, longest: int, tokens: int) -> Tensor:
    """(batch,) bool: the keys of a row fit its pages, and its packed queries are of the `tokens`, at most `longest`."""
    lengths, boundaries = pages.key_lengths, pages.cu_seq_q
    fit = (lengths >= 0) & (lengths <= pages.capacity)
    if boundaries is not None:
        first, end = boundaries[:-1], boundaries[1:]
        fit = fit & (first >= 0) & (first <= end) & (end <= tokens) & (end - first <= longest)
    return fit


def used_entries(pages: Pages) -> Tensor:
    """(batch, pages of a row) bool: the page has keys of the row."""
    first_key = torch.arange(pages.block_table.shape[1], device=pages.block_table.device) * pages.page_size
    return first_key < pages.key_lengths.unsqueeze(-1)


def check_values(pages: Pages, page_count: int, longest: int, tokens: int) -> None:
    """The values of lengths, boundaries and page numbers, of CPU tensors."""
    fit = rows_fit(pages, longest, tokens)
    if not fit.all():
        lengths, boundaries = pages.key_lengths, pages.cu_seq_q
        if boundaries is None or not ((lengths >= 0) & (lengths <= pages.capacity)).all():
            raise ValueError(
                f"key_lengths must be from 0 to {pages.capacity}, the keys of {pages.block_table.shape[1]} pages of "
                f"{pages.page_size}, got {lengths.tolist()}"
            )
        raise ValueError(
            f"cu_seq_q must rise from 0 to at most {tokens} tokens in steps of at most {longest}, got "
            f"{boundaries.tolist()}"
        )
    used = pages.block_table[used_entries(pages)]
    if used.numel() and not (used.min() >= 0 and used.max() < page_count):
        raise ValueError(
            f"block_table must have numbers of pages from 0 to {page_count - 1} for the keys of a row, got "
            f"{used.min().item()} to {used.max().item()}"
        )


def gathered(pages: Pages, cache: Tensor) -> Tensor:
    """(batch, key heads, capacity, dim): the keys or values of each row next to one another, and zeros behind them."""
    numbers = torch.where(used_entries(pages), pages.block_table, 0)
    rows = cache[numbers].flatten(1, 2)
    absent = torch.arange(pages.capacity, device=cache.device) >= pages.key_lengths.unsqueeze(-1)
    return rows.masked_fill_(absent[:, :, None, None], 0.0).transpose(1, 2)


def attend_gathered(
    attention_forward: Callable[..., tuple[Tensor, ...]], problem: Problem, pages: Pages, query: Tensor,
    key_cache: Tensor, value_cache: Tensor,
) -> Tensor:  # fmt: skip
    """The output by a backend's ordinary forward pass."""
    ordinary, key, value = gathered_problem(problem, pages, query, key_cache, value_cache)
    output = attention_forward(ordinary, query, key, value, False)[0]
    return spoil_misfits(output, pages, problem.query_length)


def spoil_misfits(output: Tensor, pages: Pages, longest: int) -> Tensor:
    """NaN in rows whose lengths or boundaries do not fit: of packed queries, in all of them."""
    fit = rows_fit(pages, longest, output.shape[2])
    misfit = ~fit[:, None, None, None] if pages.cu_seq_q is None else ~fit.all()
    return output.masked_fill_(misfit, torch.nan)


def gathered_problem(
    problem: Problem, pages: Pages, query: Tensor, key_cache: Tensor, value_cache: Tensor
) -> tuple[Problem, Tensor, Tensor]:
    """(problem, key, value): the same call without pages. Packed queries see one batch row of all keys."""
    key, value = gathered(pages, key_cache), gathered(pages, value_cache)
    span = pages.left + 64 if pages.has_window else pages.capacity
    if pages.cu_seq_q is None:
        intervals = intervals_of_rows(
            last_positions(pages, problem.query_length), pages.key_lengths, None, None,
            (problem.batch, problem.query_length, pages.capacity), 0, (pages.left, 0), query.device,
        )  # fmt: skip
    else:
        key, value = (tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0) for tensor in (key, value))
        intervals, span = packed_intervals(pages, query.shape[2]), key.shape[2]
    visibility = VisibilityArgs(intervals, None, None, False, span)
    batch, query_length, key_length = query.shape[0], query.shape[2], key.shape[2]
    ordinary = replace(
        problem, batch=batch, query_length=query_length, key_length=key_length, visibility=visibility
    )  # fmt: skip
    return ordinary, key, value


def last_positions(pages: Pages, query_length: int) -> Tensor:
    """(batch, query length): the positions of the last tokens of each row."""
    token = torch.arange(query_length, device=pages.key_lengths.device)
    return pages.key_lengths.unsqueeze(-1) - query_length + token


def packed_intervals(pages: Pages, tokens: int) -> Tensor:
    """(1, 3, tokens) int32: the first key that a query sees, one past the last, its position, among all rows' keys."""
    batch_row, before_end = rows_of_tokens(pages, tokens)
    length = torch.where(before_end > 0, pages.key_lengths[batch_row], 0)
    position = length - before_end
    start = torch.zeros_like(position) if pages.left == UNLIMITED else (position - pages.left).clamp_min(0)
    stop = torch.minimum((position + 1).clamp_min(0), length)
    return (torch.stack((start, stop, position)) + batch_row * pages.capacity).to(torch.int32).unsqueeze(0)


def rows_of_tokens(pages: Pages, tokens: int) -> tuple[Tensor, Tensor]:
    """(batch row of each packed query, how far it is before the end of its row's queries: 1 for the last, 0 or less for
    a token of no row)."""
    boundaries = pages.boundaries
    token = torch.arange(tokens, device=boundaries.device)
    last = boundaries.shape[0] - 2
    batch_row = (torch.searchsorted(boundaries, token.to(boundaries.dtype), right=True) - 1).clamp(0, last)
    before_end = boundaries[batch_row + 1] - token
    return batch_row, torch.where(token >= boundaries[0], before_end, 0)


def padded(pages: Pages, query: Tensor, longest: int) -> Tensor:
    """(batch, heads, longest, dim): the packed queries of each row, the last of them last; anything before them."""
    back = torch.arange(longest, 0, -1, device=query.device)
    token = (pages.boundaries[1:, None] - back).clamp(0, max(query.shape[2] - 1, 0))
    return query[0][:, token].transpose(0, 1)


def unpadded(pages: Pages, output: Tensor, tokens: int) -> Tensor:
    """(1, heads, tokens, dim): the inverse of `padded`; zeros for tokens of no row."""
    batch_row, before_end = rows_of_tokens(pages, tokens)
    place = (output.shape[2] - before_end).clamp(0, output.shape[2] - 1)
    rows = output[batch_row, :, place].masked_fill((before_end <= 0)[:, None, None], 0.0)
    return rows.transpose(0, 1).unsqueeze(0)
