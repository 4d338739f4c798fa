"""Deliberate faults in decoding, in Triton's interpreter. mutants.py explains FAULTS."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Case, attend
from conftest import HAS_CUDA, Backend
from decoding import case_with, check_decode, few_queries, small_steps
from mutants import Mutant, plant

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton import decode, decode_lists, decode_values, pages, visibility
from flash_entmax.testing import inputs_with_scores, poisoned, score_rows

# Each with the check that must fail.
FAULTS = {
    "the last tile has no mask": (
        decode, "tiles_of_split", "queries.stop // C.TILE", "tl.cdiv(queries.stop, C.TILE)", "causal",
    ),
    "the first tile has no mask": (
        decode, "tiles_of_split", "tl.cdiv(queries.start, C.TILE)", "queries.start // C.TILE", "window",
    ),
    "a row ends at its last whole tile": (
        decode, "tiles_of_split", "tl.where(sees, tl.cdiv(queries.stop, C.TILE), 0)",
        "tl.where(sees, queries.stop // C.TILE, 0)", "long",
    ),
    "a split leaves out its last tile": (
        decode, "tiles_of_split", "tl.minimum(begin + steps, end)", "tl.minimum(begin + steps - 1, end)", "long",
    ),
    "every chunk has the first key heads": (
        decode, "decode_scores_kernel", "first_unit + program // tiles", "program // tiles", "chunks",
    ),
    "every chunk has the first rows": (
        decode, "head_of_row", "first_row + (place % rows).to(tl.int32)", "(place % rows).to(tl.int32)", "chunks",
    ),
    "NaN is left out of a maximum": (
        decode, "score_tiles", "tl.where(score == score, score, float('inf'))",
        "tl.where(score == score, score, float('-inf'))", "NaN",
    ),
    "a row with NaN is not spoiled": (
        decode, "is_spoiled", "maximum == float('inf')", "maximum != maximum", "NaN",
    ),
    "a query has the numbers of another query head": (
        decode, "open_group", "tl.minimum(row // sizes.query_length, ...)", "tl.minimum(row % sizes.query_length, ...)",
        "long",
    ),
    "every batch row has the intervals of the first": (
        pages, "interval_of_row", "visible_interval(number, batch * sizes.heads, ...)",
        "visible_interval(number, batch * 0, ...)", "key lengths",
    ),
    "the output goes to another query head": (
        decode, "head_of_row", "row // sizes.query_length", "row % sizes.group", "long",
    ),
    "the certificate is too small": (
        decode, "certified_offset", "return offset", "return 0.5 * offset", "sparse",
    ),
    "the last live tile is dropped": (
        decode_lists, "list_live_tiles", "return crowded, single", "return tl.maximum(crowded - 1, 0), single", "long",
    ),
    "the last tile with a single key is dropped": (
        decode_lists, "list_live_tiles", "return crowded, single", "return crowded, tl.maximum(single - 1, 0)",
        "sparse",
    ),
    "a tile with several keys is taken for one with one": (
        decode_lists, "list_live_tiles", "alive & above_threshold(row, load_numbers(second, ...), offset)",
        "alive & (alive == 0)", "long",
    ),
    "the second score of a tile is not looked for": (
        decode, "store_maxima", "tl.where(tl.arange(0, C.TILE)[:, None] == first[None, :], ...)", "score - 1e9",
        "long",
    ),
    "each step of single keys writes over those before": (
        decode_lists, "append_singles", "return count + tiles", "return count + 0 * tiles", "sparse",
    ),
    "candidates of the first step only": (
        decode_lists, "list_crowded", "range(0, end, LISTED)",
        "range(0, tl.minimum(end, LISTED), LISTED)", "long",
    ),
    "the scores of a step are taken again in the next one": (
        decode_lists, "list_crowded", "first + LISTED", "first", "long",
    ),
    "the numbers of a step are added again in the next one": (decode, "sums_at", "first + PLACES", "first", "long"),
    "each step writes over the keys of the one before": (
        decode_lists, "append_keys", "count + tl.cumsum(alive, 0) - 1", "tl.cumsum(alive, 0) - 1", "long",
    ),
    "the solve takes no step": (decode, "solve_offset", "offset = stepped", "offset = offset", "long"),
    "the last step is left out": (
        decode, "solve_offset", "tl.where(weight == 0, 0.0, ...)", "0.0 * total", "crowd",
    ),
    "a key of probability 0 is in the support": (
        decode, "keep_support", "tl.where(p > 0, 1, 0)", "tl.where(p >= 0, 1, 0)", "NaN value",
    ),
    "a key at the end of a part is in no part": (
        decode, "decode_parts_kernel", "tl.minimum(part * PART + PART, count)",
        "tl.minimum(part * PART + PART - 1, count)", "long",
    ),
    "a key is in two parts": (
        decode, "decode_parts_kernel", "tl.minimum(part * PART + PART, count)",
        "tl.minimum(part * PART + PART + 1, count)", "long",
    ),
    "the last part is not added": (decode_values, "sum_of_parts", "range(part_count)", "range(part_count - 1)", "long"),
    "keys beyond the first part are dropped": (
        decode, "decode_parts_kernel", "tl.where(count > PART, tl.cdiv(count, PART), 0)",
        "tl.where(count > PART, 1, 0)", "long",
    ),
    "parts are added before the last of them": (
        decode, "decode_parts_kernel", "tl.minimum(splits, part_count) - 1", "tl.minimum(splits, part_count) - 2",
        "long",
    ),
    "programs count on from what memory held": (
        decode, "decode_solve_kernel", "tl.store(finished + place, 0)", "None", "long",
    ),
    "hidden tiles are seen by the bits of another": (
        visibility, "hide_filtered", "tl.where(kind == HIDDEN, 0, seen)", "seen", "right padding",
    ),
}  # fmt: skip

BACKEND = Backend("triton", "cpu")


def check(case: Case, **steps: int) -> None:
    """In small steps, whatever memory held before."""
    with small_steps(**steps), poisoned():
        check_decode(case, "triton")


def check_bad_key() -> None:
    case = few_queries(BACKEND, 2, 70)
    case.key[0, 0, 66] = torch.nan
    output = attend(case, "triton")
    assert output[:, 0].isnan().all()
    assert output[:, 1].isfinite().all()


def check_bad_value() -> None:
    """No query attends to key 0."""
    case = few_queries(BACKEND, 2, 70, scale=1.0, alpha=2.0)
    case.query, case.key = case.query.abs(), case.key.abs()
    case.key[:, :, 0], case.value[:, :, 0] = 0.0, torch.nan
    with small_steps(places=16):
        assert attend(case, "triton").isfinite().all()


def check_crowd() -> None:
    """Of one sum, to the last digits."""
    z = score_rows("one maximum over a crowd", 2048, rows=1).float()
    query, key, scale = inputs_with_scores(z, 2.0)
    case = Case(query, key, torch.ones(1, 1, 2048, 8), alpha=2.0, scale=scale)
    torch.testing.assert_close(attend(case, "triton"), torch.ones(1, 1, 1, 8), rtol=0, atol=2e-6)


LONG = {"heads": 4, "key_heads": 2, "alpha": 1.2, "scale": 0.05}
CHECKS = {
    "long": partial(check, few_queries(BACKEND, 2, 170, **LONG)),
    "chunks": partial(check, few_queries(BACKEND, 2, 100, **LONG), decoded=3000),
    "sparse": partial(check, few_queries(BACKEND, 2, 100, alpha=2.0)),
    "causal": partial(check, few_queries(BACKEND, 5, 64, is_causal=True, scale=0.1)),
    "window": partial(check, few_queries(BACKEND, 2, 130, window_size=(50, 0), scale=0.1)),
    "key lengths": partial(check, case_with(BACKEND, "key lengths", scale=0.1)),
    "right padding": partial(check, case_with(BACKEND, "right padding", scale=0.1)),
    "NaN": check_bad_key,
    "NaN value": check_bad_value,
    "crowd": check_crowd,
}


@pytest.mark.parametrize("name", CHECKS)
def test_decoding_passes_without_a_fault(name):
    CHECKS[name]()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_decoding_is_seen(fault, monkeypatch, tmp_path):
    *mutant, name = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[name]()
