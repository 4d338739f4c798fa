"""Deliberate faults in KeySummaries, in Triton's interpreter. mutants.py says what a line of FAULTS means."""

from importlib.util import find_spec

import pytest
import torch
from conftest import HAS_CUDA, Backend
from decoded_by_summaries import (
    blocks_side_by_side,
    check,
    decode,
    few_queries,
    keys_of_whole_numbers,
    near_ties,
    sparse,
    support_in_a_wide_block,
)
from mutants import Mutant, plant

from flash_entmax import KeySummaries

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton import append, decode_blocks, decode_summaries

# Each with the check that must fail.
FAULTS = {
    "the margin is forgotten": (
        decode_summaries, "bound_scores", "margin = ...", "margin = 0.0 * (...)", "nearly one",
    ),
    "a tile's largest score is bounded from above only": (
        decode_summaries, "bound_scores", "largest - 2.0 * tl.max(margin, 0)", "largest", "nearly one",
    ),
    "the low bits of the query are left out": (
        decode_summaries, "product_of_integers", "queries.low", "0 * queries.low", "whole numbers",
    ),
    "scores of candidates are their bounds": (
        decode_summaries, "score_candidates", "range(0, count, BLOCK)", "range(0, 0, BLOCK)", "nearly one",
    ),
    "the offset is not moved to the row's maximum": (
        decode_summaries, "moved_offset", "(row.maximum - least)", "0.0", "planted",
    ),
    "the last key's error is forgotten": (
        append, "append_kernel", "tl.max(tl.where(inside, key_errors, 0.0), 0)", "0.0", "nearly one",
    ),
    "blocks are taken for points": (
        append, "bounds_of", "tl.max(norm(x - c[None, :], 1), 0)", "0.0", "wide block",
    ),
    "tau is taken to be nearer to the maximum": (
        decode_blocks, "list_reached_tiles", "-1.0 - ...", "-0.05", "side by side",
    ),
    "a listed tile is dropped": (decode_blocks, "list_reached_tiles", "return ...", "return ... - 1", "side by side"),
    "a key that is not finite is rounded": (
        append, "rounded_of", 'tl.where(is_finite, unit, float("nan"))', "unit", "bad key",
    ),
}  # fmt: skip
INTERPRETER = Backend("triton", "cpu")
CHECKS = {
    "nearly one": lambda: check(near_ties(INTERPRETER), "triton"),
    "whole numbers": lambda: check(keys_of_whole_numbers(INTERPRETER), "triton"),
    "planted": lambda: check(sparse(INTERPRETER)[0], "triton"),
    "wide block": lambda: check(support_in_a_wide_block(INTERPRETER), "triton"),
    "side by side": lambda: check(blocks_side_by_side(INTERPRETER), "triton"),
}


def check_bad_key() -> None:
    case = few_queries(INTERPRETER)
    case.key[0, 0, 129, 3] = torch.nan
    assert decode(case, "triton", KeySummaries.of(case.key, impl="triton")).isnan().all()


CHECKS["bad key"] = check_bad_key


@pytest.mark.parametrize("check_of_faults", CHECKS)
def test_kernels_pass_without_a_fault(check_of_faults):
    CHECKS[check_of_faults]()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    *mutant, name = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[name]()
