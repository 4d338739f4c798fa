"""What a call takes beyond inputs, output and gradients: at most 256 MiB, and 512 bytes for each query of each head.

Nothing is allocated: sizes follow from the plan.
"""

from importlib.util import find_spec
from math import prod

import pytest
import torch

if not find_spec("triton"):
    pytest.skip("needs Triton", allow_module_level=True)

from flash_entmax.backends.triton.config import KEPT_BYTES, Outline
from flash_entmax.backends.triton.plan import plan_of
from flash_entmax.backends.triton.reach import reach_shapes
from flash_entmax.core.call import Problem, ScoreOptions, VisibilityArgs

FIXED = 256 * 2**20
LENGTHS = sorted({2**n for n in range(9, 21)} | {1000, 3000, 40_000, 100_000, 300_000})
HEADS = [
    (1, 1, 1),
    (1, 8, 1),
    (1, 40, 8),
    (4, 16, 16),
    (4, 32, 4),
    (64, 16, 16),
    (256, 1, 1),
]  # batch, heads, key heads
MOST_ROWS = 2**26  # with more, all that has a size of its own is smaller beside 512 bytes for each


def problem_of(batch: int, heads: int, key_heads: int, length: int, dim: int, is_causal: bool, span: int) -> Problem:
    intervals = None if span == length else torch.empty(batch, 3, length, dtype=torch.int32, device="meta")
    visibility = VisibilityArgs(intervals, None, None, is_causal, span)
    query, value = (torch.Size((batch, n, length, dim)) for n in (heads, key_heads))
    return Problem.of(query, value, ScoreOptions(1.5, dim**-0.5), visibility)


def kept_bytes(problem: Problem, dtype: torch.dtype) -> int:
    """What the forward pass leaves for the backward: O1, maximum, offset, and what is reached."""
    rows = problem.batch * problem.heads * problem.query_length
    return rows * (problem.value_size * dtype.itemsize + 8) + 4 * sum(map(prod, reach_shapes(problem, dtype)))


def peaks(problem: Problem, dtype: torch.dtype, needs_backward: bool) -> list[int]:
    """Bytes at the same time: in the forward pass, and in the backward."""
    plan = plan_of(Outline.of(problem, dtype, needs_backward))
    forward = plan.forward_scratch.size + 4 * plan.chunk_words
    if not needs_backward:
        return [forward]
    kept = kept_bytes(problem, dtype)
    return [kept + forward, kept + plan.backward_scratch.size]


@pytest.mark.parametrize("mask", ["causal", "not causal", "window"])
@pytest.mark.parametrize("needs_backward", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_scratch_is_bounded(dim, needs_backward, mask):
    for length in LENGTHS:
        for heads in (heads for heads in HEADS if prod(heads[:2]) * length <= MOST_ROWS):
            problem = problem_of(
                *heads, length, dim, mask == "causal", min(length, 4096) if mask == "window" else length
            )
            allowed = FIXED + KEPT_BYTES * prod(heads[:2]) * length
            for peak in peaks(problem, torch.bfloat16, needs_backward):
                excess = (peak - allowed) / 2**20
                assert excess <= 0, f"{excess:.1f} MiB too much with {length} tokens and {heads} of batch and heads"


def test_queries_of_many_heads_and_few_keys_are_bounded():
    for queries, keys in ((2**18, 1000), (1000, 2**18), (1, 2**20)):
        visibility = VisibilityArgs(None, None, None, False, keys)
        problem = Problem.of((4, 32, queries, 64), (4, 8, keys, 64), ScoreOptions(1.5, 0.125), visibility)
        allowed = FIXED + KEPT_BYTES * 4 * 32 * max(queries, keys)
        assert max(peaks(problem, torch.bfloat16, True)) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_scratch_of_decoding_is_bounded(dtype, dim):
    for batch, heads, key_heads in ((1, 32, 8), (16, 32, 8), (64, 8, 8), (1, 64, 1), (4, 128, 2), (2**12, 16, 16)):
        for queries, keys in ((1, 2**20), (16, 2**20), (16, 2**17), (5, 3000), (16, 272), (16, 64), (16, 1)):
            visibility = VisibilityArgs(None, None, None, False, keys)
            query, value = torch.Size((batch, heads, queries, dim)), torch.Size((batch, key_heads, keys, dim))
            problem = Problem.of(query, value, ScoreOptions(1.5, 0.125), visibility)
            plan = plan_of(Outline.of(problem, dtype, needs_backward=False, decodes=True))
            assert plan.decode_scratch.size <= FIXED
            assert sum(chunk.programs for chunk in plan.decode_chunks) == batch * heads * queries
