"""Deliberate faults in the lists of single keys and queries, in Triton's interpreter. mutants.py explains FAULTS."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from checks import check_attention
from conftest import HAS_CUDA, Backend
from mutants import Mutant, plant

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from single_keys import limits, lone_case, with_single_keys

from flash_entmax.backends.triton import certify, gather, gradient, mark, query_lists, reach, share, solve

# Each with the check that must fail.
FAULTS = {
    "the first key of a list is dropped": (
        gather, "append_rows", "tl.store(rows + place, row, mask=...)",
        "tl.store(rows + place, tl.where(place > 0, row, row ^ 1), mask=...)", "causal",
    ),
    "a key stands for its neighbour": (
        gather, "append_rows", "tile[:, None] * C.TILE + tl.arange(0, C.TILE)[None, :]",
        "tile[:, None] * C.TILE + (tl.arange(0, C.TILE)[None, :] + 1) % C.TILE", "causal",
    ),
    "what exceeds the quota is dropped": (
        gather, "append_rows", "return RowCount(...), taken", "return RowCount(...), few", "small quota",
    ),
    "the last block is filled with rows that are listed": (
        gather, "fill_last_block", "1 - flags", "1 + 0 * flags", "causal",
    ),
    "a bit is read for its neighbour's": (
        gather, "load_bits", "row % C.BITS", "(row + 1) % C.BITS", "causal",
    ),
    "a bit is set for its neighbour's": (
        certify, "store_reaching_queries", "tl.arange(0, BITS)[None, :, None]",
        "(tl.arange(0, BITS)[None, :, None] + 1) % BITS", "causal",
    ),
    "a word is set for the next tile of keys": (
        certify, "store_reaching_queries", "tl.cast(number, tl.int64)", "tl.cast(number + 1, tl.int64)", "causal",
    ),
    "bits go by an offset that is too small": (
        certify, "certify_kernel", "store_reaching_queries(word, stride, tiles, column, depth, ...)",
        "store_reaching_queries(word, stride, tiles, column, depth - 0.3, ...)", "causal",
    ),
    "marks go by an offset that is too small": (
        certify, "lowest_reaching_score", "offset * SAFETY", "offset * 0.7", "causal",
    ),
    "marks have no margin": (certify, "lowest_reaching_score", "2.0 * score_error", "0.0", "margin"),
    "the marks of one query count": (
        mark, "mark_kernel", "tl.store(..., ..., mask=is_reached)",
        "tl.store(flags + (place[None, :] + keys.column[:, None]), one, mask=is_reached & (keys.column != 1)[:, None])",
        "causal",
    ),
    "keys of pairs that are not marked are left out": (
        query_lists, "list_queries_kernel", "tl.where(taken, 0, 1)", "tl.where(taken, 0, 0)", "causal",
    ),
    "the first tile of queries that sees a tile of keys is left out": (
        query_lists, "first_reaching_tile", "... // C.TILE", "... // C.TILE + 1", "causal",
    ),
    "every query head has the words of the first of its group": (
        reach, "key_words", "unit * ...", "unit // sizes.group * sizes.group * ...", "grouped heads",
    ),
    "every query head writes the words of the first of its group": (
        reach, "query_words", "tl.cast(unit - first_unit, tl.int64)",
        "tl.cast((unit - first_unit) // sizes.group * sizes.group, tl.int64)", "grouped heads",
    ),
    "words that are computed again go by an offset that is too small": (
        query_lists, "is_reaching", "highest <= lowest", "highest <= lowest + 3.0", "words again",
    ),
    "words that are computed again are of the next tile of queries": (
        query_lists, "store_words", "row + tile[None, :] * WORDS + ...", "row + (tile[None, :] ^ 1) * WORDS + ...",
        "words again",
    ),
    "single keys count in the threshold only": (
        solve, "solve_kernel", "tl.store(record.row_blocks, row_blocks)", "tl.store(record.row_blocks, 0)", "causal",
    ),
    "a part of a sink is left out": (
        share, "sum_of_parts", "first + number < count", "first + number < count - 1", "shares",
    ),
    "a block is in two parts": (
        gradient, "gradient_key_value_kernel", "(part + 1) * total // count", "(part + 1) * total // count + 1",
        "shares",
    ),
    "a part is read from the wrong place": (
        share, "sum_of_parts", "(first + number) * units", "first + number", "shares of heads",
    ),
    "a split tile of a chunk is taken for one of the first chunk": (
        share, "add_parts_kernel", "(first_key + tile) * TILE", "tile * TILE", "shares of chunks",
    ),
}  # fmt: skip

BACKEND = Backend("triton", "cpu")


def check_case(case, **numbers) -> None:
    with limits(**numbers):
        with_single_keys(case, partial(check_attention, impl="triton"))


def check_margin() -> None:
    """The lowest score is below that of any key of the support by one rounding of the score, after its own rounding."""
    generator = torch.Generator().manual_seed(0)
    z_scale, count = 0.3, 1024
    maximum = 10.0 ** (6 * torch.rand(count, generator=generator) - 2)
    offset = torch.rand(count, generator=generator)
    error = 2.0**-18 * z_scale * maximum  # 16 products, each of which may be rounded by 2^-22
    lowest = torch.empty(count)
    lowest_kernel[(1,)](lowest, maximum, offset, error, z_scale, N=count)
    exact = maximum.double() - (offset.double() + error.double()) / z_scale
    assert (lowest.double() <= exact).all()


@triton.jit
def lowest_kernel(lowest, maximum, offset, error, z_scale, N: tl.constexpr):
    place = tl.arange(0, N)
    own_maximum, own_offset, own_error = tl.load(maximum + place), tl.load(offset + place), tl.load(error + place)
    tl.store(lowest + place, certify.lowest_reaching_score(own_maximum, own_offset, own_error, z_scale))


CAUSAL = lone_case(BACKEND, 170, is_causal=True)
GROUPED = lone_case(BACKEND, 170, heads=2, is_causal=True)
SINK = lone_case(BACKEND, 250, heads=3, is_causal=True, keys_of_topic=1)
SHARING = {"blocks_of_part": 1, "FEWEST_SHARED": 0}
CHECKS = {
    "causal": partial(check_case, CAUSAL),
    "grouped heads": partial(check_case, GROUPED),
    "small quota": partial(check_case, lone_case(BACKEND, 170, keys_of_topic=3), reach=(32, 1024)),
    "words again": partial(check_case, CAUSAL, reach=(96, 0)),
    "shares": partial(check_case, SINK, **SHARING),
    "shares of chunks": partial(
        check_case,
        lone_case(BACKEND, 256, heads=2, keys_of_topic=1, sinks=(0, 140)),
        **SHARING,
        REACHING=5600,
        MOST_SLOTS=4,
    ),
    "shares of heads": partial(
        check_case, lone_case(BACKEND, 250, heads=2, key_heads=2, is_causal=True, keys_of_topic=1), **SHARING
    ),
    "margin": check_margin,
}


@pytest.mark.parametrize("check", CHECKS)
def test_lists_pass_without_a_fault(check):
    CHECKS[check]()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_list_is_seen(fault, monkeypatch, tmp_path):
    *mutant, check = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[check]()
