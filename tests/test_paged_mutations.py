"""Deliberate faults in what reads keys in pages. mutants.py says what a line of FAULTS means."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import HAS_CUDA, Backend
from mutants import Mutant, plant
from paged_cases import attend_packed, check_pages, make_paged_case

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton import decode, pages
from flash_entmax.core import pages as core_pages

KERNELS = Backend("triton", "cpu")
FAULTS = {
    "a key is looked for one page too far": (
        pages, "offsets_of_keys", "key // C.PAGE", "key // C.PAGE + 1", "small pages",
    ),
    "a tile is looked for one page too far": (
        pages, "open_keys_of_row", "block.first // C.PAGE", "block.first // C.PAGE + 1", "large pages",
    ),
    "every tile of a page is its first": (pages, "open_keys_of_row", "block.first % C.PAGE", "0", "large pages"),
    "a key is not counted inside its page": (pages, "offsets_of_keys", "key % C.PAGE", "key % 8", "small pages"),
    "the next row's table is read": (
        pages, "open_batch_row", "tl.cast(batch, tl.int64)", "(tl.cast(batch, tl.int64) + 1) % 2", "small pages",
    ),
    "a row ends one key late": (
        pages, "open_batch_row", "tl.where(fits, length, 0)", "tl.where(fits, length + 1, 0)", "small pages",
    ),
    "a row has all keys of its pages": (
        pages, "open_batch_row", "tl.where(fits, length, 0)", "tl.where(fits, sizes.key_length, 0)", "large pages",
    ),
    "queries see later ones": (
        pages, "interval_of_row", "visible_keys(number, sizes, True)", "visible_keys(number, sizes, False)",
        "small pages",
    ),
    "the window is off by one": (pages, "interval_of_row", "position - left", "position - left - 1", "window"),
    "packed queries are read from their first": (
        pages, "open_batch_row", "end - sizes.query_length", "begin", "packed",
    ),
    "the first packed query of a row is left out": (
        pages, "open_batch_row", "begin - first", "begin - first + 1", "packed",
    ),
    "what does not fit is not marked": (
        decode, "decode_solve_kernel", "tl.where(batch_row.fits, ...)", "total", "misfit",
    ),
    "a page of one key is not gathered": (
        core_pages, "used_entries", "first_key < ...", "first_key + 1 < ...", "chunk",
    ),
    "gathered keys end one early": (
        core_pages, "gathered", "... >= pages.key_lengths.unsqueeze(-1)",
        "... + 1 >= pages.key_lengths.unsqueeze(-1)", "chunk",
    ),
    "queries of a chunk stand one too early": (
        core_pages, "last_positions", "... - query_length", "... - query_length - 1", "chunk",
    ),
}  # fmt: skip


def check_packed() -> None:
    case, counts = make_paged_case(KERNELS, lengths=(20, 33), queries=3), (1, 2)
    *rows, _ = attend_packed(case, counts, "triton", max_q=3)
    whole = case.attend_in_one_piece("triton")
    for row, count in enumerate(counts):
        assert torch.equal(rows[row], whole[row, :, 3 - count :])


def check_misfit() -> None:
    from test_paged import call_of_a_backend

    case = make_paged_case(KERNELS, lengths=(20, 5))
    case.key_lengths[1] = 1000
    assert call_of_a_backend(KERNELS, case)[1].isnan().all()


CASES = {
    "small pages": {"lengths": (17, 70), "page": 16},
    "large pages": {"lengths": (33, 100), "page": 128, "dim": 16},
    "window": {"lengths": (17, 40), "page": 16, "window_size": (9, 0)},
    "chunk": {"lengths": (17, 33), "page": 16, "queries": 17, "seed": 3},  # where the last key has some probability
}
CHECKS = {name: partial(check_pages, make_paged_case(KERNELS, **case), "triton") for name, case in CASES.items()}
CHECKS |= {"packed": check_packed, "misfit": check_misfit}


@pytest.mark.parametrize("check", CHECKS)
def test_pages_pass_without_a_fault(check):
    CHECKS[check]()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    *mutant, check = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[check]()
