"""The public call of attention over keys in pages, for generation: check, lower, call."""

from typing import NoReturn

from torch import Tensor

from .backends import Impl
from .core.call import ScoreOptions
from .core.intervals import FURTHEST, UNLIMITED
from .core.keywords import check_keywords
from .core.paged_checks import check_paged_inputs
from .core.pages import Pages
from .operators.paged import attend_paged

LAST_TOKENS = "queries are the last tokens of their batch row, always"
OTHERWISE_HERE = {
    "is_causal": LAST_TOKENS,
    "query_positions": LAST_TOKENS,
    "key_summary": "keys in 8 bits stand beside a cache in one piece, not in pages",
}


def entmax_attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    cu_seq_q: Tensor | None = None,
    max_q: int | None = None,
    alpha: float | Tensor = 1.5,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    impl: Impl = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Causal entmax attention over keys and values that lie in pages, for inference: it has no derivatives.

    Key n of batch row b is number ``n % page_size`` of page ``block_table[b, n // page_size]``. The queries of a row
    are its last tokens: of Q queries, query i stands at position key_lengths[b] - Q + i and sees the keys up to there.
    So the keys of the queries themselves must be in the pages already.

    Up to 16 queries of a row read the pages where they are. Nothing is copied, nothing waits for the device, and a CUDA
    graph may be replayed after lengths, boundaries and page numbers have changed on the device. The result has the bits
    of ``entmax_attention(..., is_causal=True, key_lengths=..., query_positions=...)`` on the same keys in one piece.

    Three kinds of calls copy the pages of all rows first, and set memory aside for as many keys and values as
    ``block_table`` has entries for: more than 16 queries of a row (chunked prefill), ``impl`` other than the kernels,
    and caches whose head sizes or strides 16 does not divide (of these the kernels make one copy more). Cut the
    columns of ``block_table`` to what the longest row needs. See :func:`flash_entmax.entmax_attention` for the
    mathematics and for all options that are not listed here.

    Args:
        query: (batch, heads, queries, head size), or packed, (tokens, heads, head size), beside ``cu_seq_q``.
        key_cache: (pages, page size, key heads, head size), any page size, any strides. A new page size compiles the
            kernels again.
        value_cache: (pages, page size, key heads, value size).
        block_table: (batch, pages of a row) int32 or int64, the numbers of the pages of each row. Rows may share pages.
            An entry behind the last page that has keys of the row may be anything.
        key_lengths: (batch,) int32 or int64 on the device of the query: how many keys each row has, 0 or more. What is
            in a page behind them may be anything.
        cu_seq_q: (batch + 1,) int32 or int64: the queries of row b are the tokens cu_seq_q[b] to cu_seq_q[b + 1]. Rows
            may have different numbers of queries, or none. Tokens of no row get output 0.
        max_q: at least the most queries of a row, where queries are packed.
        window_size: (left, right): a query sees at most ``left`` keys before its own; right counts as 0.
        alibi_slopes: (heads,), or (batch, heads) where queries are not packed.

    Returns:
        The output in the shape of the query, with the value size, and in its dtype: autocast casts nothing. A query
        that stands before key 0 sees no key and gets output 0. ``inspection.record`` does not see this call.

    Raises:
        TypeError: an input that is not a tensor of the right kind, mixed dtypes, or an option of the wrong type.
        ValueError: shapes, devices or options that do not fit, and tensors that may need a derivative. Of CPU tensors
            also lengths beyond the pages of a row, boundaries that fall or exceed the tokens or ``max_q``, and numbers
            of pages that do not exist. On a GPU, where reading them would wait for the device, a row whose length or
            boundaries do not fit gets NaN, and the numbers of its pages are trusted.
    """
    if unknown:
        check_keywords(entmax_attention_paged, unknown, OTHERWISE_HERE)
    score = ScoreOptions(alpha, scale, softcap, alibi_slopes)
    check_paged_inputs(
        query, key_cache, value_cache, block_table, key_lengths, cu_seq_q, max_q, score, window_size
    )  # fmt: skip
    left = min(window_size[0], FURTHEST)
    pages = Pages(block_table, key_lengths, cu_seq_q, left, key_cache.shape[1])
    if cu_seq_q is None or max_q is None:  # the checks took both or neither
        return attend_paged(query, key_cache, value_cache, pages, query.shape[2], score, impl)
    rows = query.transpose(0, 1).unsqueeze(0)
    output = attend_paged(rows, key_cache, value_cache, pages, max_q, score, impl)
    return output.squeeze(0).transpose(0, 1)
