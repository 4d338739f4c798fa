"""The operator of attention over keys in pages, and the way to it.

    flash_entmax::attention_paged  -> output

It has no derivatives.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..backends import BACKENDS, choose, reference
from ..core.alphas import check_alphas
from ..core.call import Problem, ScoreOptions, VisibilityArgs
from ..core.modes import as_given
from ..core.pages import Pages, check_values, gathered, last_positions, padded, spoil_misfits, unpadded
from ..core.registration import fake, operator
from ..core.tensors import empty_stored_as, row_dtype
from ..core.visibility import Visibility
from .eager import recorded


def attend_paged(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Pages, max_q: int, score: ScoreOptions, impl: str
) -> Tensor:
    """A call that is checked: a query (batch, heads, query length, dim), or packed (1, heads, tokens, dim)."""
    backend = choose(query.dtype, query.device, impl, others=("reference",))
    alpha, scale, softcap, slopes = score.lowered(query.shape, row_dtype(query), query.device)
    learned = (number if isinstance(number, Tensor) else None for number in (alpha, scale))
    numbers = (1.5 if isinstance(number, Tensor) else number for number in (alpha, scale))
    block_table, key_lengths, cu_seq_q, left, _ = pages
    tensors = query, key_cache, value_cache, block_table, key_lengths, cu_seq_q, *learned, slopes
    return recorded(attention_paged, None, tensors)(*tensors, max_q, left, *numbers, softcap, backend)


@operator(
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor key_lengths, Tensor? cu_seq_q, "
    "Tensor? alpha_tensor, Tensor? scale_tensor, Tensor? alibi_slopes_tensor, SymInt max_q, SymInt left, float alpha, "
    "float scale, float softcap, str backend",
    results=1,
)
def attention_paged(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, key_lengths: Tensor,
    cu_seq_q: Tensor | None, alphas: Tensor | None, scales: Tensor | None, slopes: Tensor | None, max_q: int, left: int,
    alpha: float, scale: float, softcap: float, backend: str,
) -> Tensor:  # fmt: skip
    if alphas is not None:
        check_alphas(alphas)
    pages = Pages(block_table, key_lengths, cu_seq_q, left, key_cache.shape[1])
    score = ScoreOptions(alpha if alphas is None else alphas, scale if scales is None else scales, softcap, slopes)
    _, heads, tokens, head_size = query.shape
    key_heads, value_size = value_cache.shape[2:]
    longest = tokens if cu_seq_q is None else max_q
    visibility = VisibilityArgs(None, None, None, True, pages.capacity)
    sizes = block_table.shape[0], heads, key_heads, longest, pages.capacity, head_size, value_size
    problem = Problem(*sizes, score, visibility)
    if query.is_cpu:
        check_values(pages, key_cache.shape[0], longest, tokens)
    if 0 in (problem.batch, heads, key_heads, tokens):
        return empty_stored_as(query, value_size).zero_()
    with as_given(query):
        if backend in BACKENDS and not score.is_softmax():
            return BACKENDS[backend].attention_paged(problem, pages, query, key_cache, value_cache)
        return attend_without_tiles(problem, pages, query, key_cache, value_cache, backend)


@fake("attention_paged")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any) -> Tensor:
    return empty_stored_as(query, value_cache.shape[3])


def attend_without_tiles(
    problem: Problem, pages: Pages, query: Tensor, key_cache: Tensor, value_cache: Tensor, backend: str
) -> Tensor:
    """The specification, or softmax. Packed queries are padded to one length."""
    rows = query if pages.cu_seq_q is None else padded(pages, query, problem.query_length)
    key, value = gathered(pages, key_cache), gathered(pages, value_cache)
    positions = last_positions(pages, problem.query_length)
    visibility = Visibility(True, (pages.left, 0), query_positions=positions, key_lengths=pages.key_lengths)
    slopes = problem.score.alibi_slopes
    score = problem.score._replace(alibi_slopes=None if slopes is None else slopes.expand(problem.batch, -1))
    problem = replace(problem, score=score, visibility=visibility.lowered(rows, problem.key_length, None))
    if backend == "reference":
        output, _ = reference.attention(problem, rows, key, value, visibility)
    else:
        from ..backends.softmax import softmax_attention

        output = softmax_attention(problem, rows, key, value, visibility)
    output = output if pages.cu_seq_q is None else unpadded(pages, output, query.shape[2])
    result = empty_stored_as(query, problem.value_size).copy_(output)
    return spoil_misfits(result, pages, problem.query_length)
