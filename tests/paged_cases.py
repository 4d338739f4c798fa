"""Calls over keys in pages, and the same calls over keys in one piece."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from flash_entmax import entmax_attention, entmax_attention_paged
from flash_entmax.core.tensors import ceil_div

SPARE = 3  # pages of NaN behind the caches, in the same memory


@dataclass
class PagedCase:
    """Rows of `lengths` keys in pages. Keys and values of one piece are (batch, key heads, capacity, dim).

    Everything in pages that is behind the keys of a row is NaN, and so are pages that no row has.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    key_lengths: Tensor
    options: dict = field(default_factory=dict)

    @property
    def paged(self) -> tuple[Tensor, ...]:
        return self.query, self.key_cache, self.value_cache, self.block_table, self.key_lengths

    def attend(self, impl: str, **more) -> Tensor:
        return entmax_attention_paged(*self.paged, **self.options, **more, impl=impl)

    def attend_in_one_piece(self, impl: str, rows=slice(None), dtype: torch.dtype | None = None) -> Tensor:
        query, key, value = (tensor[rows].to(dtype or tensor.dtype) for tensor in (self.query, self.key, self.value))
        lengths = self.key_lengths[rows]
        positions = lengths.long()[:, None] - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        masks = {"is_causal": True, "key_lengths": lengths, "query_positions": positions}
        return entmax_attention(query, key, value, **self.options, **masks, impl=impl)


def make_paged_case(
    backend, lengths=(0, 1, 63, 64, 65, 130), page=16, *, queries=2, heads=2, key_heads=1, dim=16, value_dim=None,
    dtype=torch.float32, index_dtype=torch.int32, behind="NaN page", extra_columns=1, seed=0, **options,
) -> PagedCase:  # fmt: skip
    """Pages in random order. `behind` is what entries of the table hold behind the keys of a row."""
    generator = torch.Generator().manual_seed(seed)
    batch, columns = len(lengths), ceil_div(max(1, *lengths), page) + extra_columns
    capacity, count = columns * page, batch * columns
    drawn = (
        torch.randn(batch, heads_of, length, size, generator=generator).to(dtype)
        for heads_of, length, size in (
            (heads, queries, dim), (key_heads, capacity, dim), (key_heads, capacity, value_dim or dim),
        )
    )  # fmt: skip
    query, key, value = drawn
    for row, length in enumerate(lengths):
        key[row, :, length:], value[row, :, length:] = 0.0, 0.0
    table = torch.randperm(count, generator=generator).view(batch, columns)
    caches = [in_pages(tensor, table, lengths, page) for tensor in (key, value)]
    other = {"NaN page": count + 1, "far": 2**30, "negative": -1}[behind]
    used = torch.arange(columns) * page < torch.tensor(lengths)[:, None]
    table = torch.where(used, table, other).to(index_dtype)
    tensors = query, key, value, *caches, table, torch.tensor(lengths, dtype=index_dtype)
    return PagedCase(*(tensor.to(backend.device) for tensor in tensors[:3]), *on_device(tensors[3:], backend), options)


def on_device(tensors, backend) -> list[Tensor]:
    """The caches without their spare pages, which stay behind them in memory; the rest as it is."""
    *caches, table, lengths = (tensor.to(backend.device) for tensor in tensors)
    return [*(cache[:-SPARE] for cache in caches), table, lengths]


def in_pages(rows: Tensor, table: Tensor, lengths: tuple[int, ...], page: int) -> Tensor:
    """(pages, page size, key heads, dim), with spare pages of NaN."""
    cache = rows.new_full((table.numel() + SPARE, page, rows.shape[1], rows.shape[3]), torch.nan)
    for row, length in enumerate(lengths):
        for start in range(0, length, page):
            keys = rows[row, :, start : min(start + page, length)].transpose(0, 1)
            cache[table[row, start // page], : len(keys)] = keys
    return cache


def packed(case: PagedCase, counts: tuple[int, ...], spare: int = 0) -> dict[str, Tensor]:
    """The last `counts` queries of each row one after another, and tokens of no row behind them."""
    rows = [case.query[row, :, case.query.shape[2] - count :] for row, count in enumerate(counts)]
    rows.append(case.query.new_full((case.query.shape[1], spare, case.query.shape[3]), torch.nan))
    boundaries = torch.tensor([0, *counts], dtype=torch.int32, device=case.query.device).cumsum(0, dtype=torch.int32)
    return {"query": torch.cat(rows, 1).transpose(0, 1).contiguous(), "cu_seq_q": boundaries}


def attend_packed(case: PagedCase, counts, impl: str, spare: int = 0, max_q: int | None = None) -> list[Tensor]:
    """The outputs of each row, (heads, count, dim), and that of the spare tokens."""
    tokens = packed(case, counts, spare)
    output = entmax_attention_paged(
        tokens["query"], *case.paged[1:], cu_seq_q=tokens["cu_seq_q"], max_q=max_q or max(counts), **case.options,
        impl=impl,
    )  # fmt: skip
    edges = [*tokens["cu_seq_q"].tolist(), output.shape[0]]
    return [output[start:stop].transpose(0, 1) for start, stop in pairwise(edges)]


def check_pages(case: PagedCase, impl: str) -> None:
    assert torch.equal(case.attend(impl), case.attend_in_one_piece(impl))
