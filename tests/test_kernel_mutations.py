"""Deliberate faults in the attention kernels, in Triton's interpreter. mutants.py says what a line of FAULTS means."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Case, crowd
from checks import check_attention, check_row_sums
from conftest import HAS_CUDA
from key_parts import check_parts
from mutants import Mutant, plant

from flash_entmax import entmax_attention
from flash_entmax.testing import DISTRIBUTIONS, iid_inputs, inputs_with_scores, score_rows, topic_inputs

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton

from flash_entmax.backends.triton import (
    alpha,
    bound,
    certify,
    config,
    keys,
    lists,
    output,
    parts,
    plan,
    queries,
    scan,
    score,
    solve,
    tile,
    visibility,
)

# Each with the check that must fail.
FAULTS = {
    "the certificate is too small": (alpha, "newton_step", "return ...", "return 0.7 * ...", "causal"),
    "queries see one key too many": (visibility, "visible_keys", "... + 1", "... + 2", "causal"),
    "the mask is left out": (visibility, "hide", "return ...", "return score", "causal"),
    "the mask is off by one": (visibility, "hide", "column < stop", "column <= stop", "window"),
    "the filter is left out": (visibility, "hide_filtered", "return ...", "return score", "key mask"),
    "tiles with a mask are taken for whole": (
        visibility, "are_whole", "return ...", "return query_tile + key_tile >= 0", "window",
    ),
    "a listed tile is dropped": (lists, "close_list", "front + back", "front + back - 1", "causal"),
    "a live tile is dropped": (certify, "shorten", "depth", "depth - 0.3", "causal"),
    "blocks of keys are taken for points": (bound, "summary_kernel", "tl.max(distance, 0)", "0.0", "wide block"),
    "the bound on blocks ignores ALiBi": (
        bound, "block_alibi_penalty", "return ...", "return 0.0", "far keys",
    ),
    "ALiBi has the wrong sign": (score, "alibi_penalty", "return ...", "return -(...)", "far keys"),
    "the softcap is left out": (score, "tanh", "return ...", "return x", "alpha by head, softcap"),
    "NaN is lost": (score, "distance_to_threshold", "tl.PropagateNan.ALL", "tl.PropagateNan.NONE", "NaN"),
    "every query head reads the first key head": (tile, "key_head", "... // sizes.group", "0", "causal"),
    "every query head takes the first alpha": (
        queries, "number_of_head", "tl.load(...)", "tl.load(number)", "alpha by head, softcap",
    ),
    "u is p": (alpha, "support_weight", "POWER - 1", "POWER", "causal"),
    "a digit of a whole power is left out": (alpha, "product", "result * d", "result", "alpha 1.2"),
    "every tile is read as the first": (
        lists, "walk", "tl.load(tiles.tiles + n)", "tl.load(tiles.tiles)", 2, "topics",
    ),
    "every maximum is of the first tile": (
        scan, "scan_tiles", "open_listed_keys(key, tiles, place, ...)", "open_listed_keys(key, tiles, 0, ...)",
        "topics",
    ),
    "maxima are not capped": (
        score, "tile_maxima", "apply_softcap(maxima, ...)", "(maxima, 1.0)", "alpha by head, softcap",
    ),
    "the solve ends with its first step": (alpha, "is_settled", "return ...", "return total >= 0.0", "crowd"),
    "later steps of the solve have no tiles": (
        certify, "sublist", "return ...", "return TileList(places, 0, 0)", "crowd",
    ),
    "gradients lack the scale": (
        plan, "kernel_options", "KernelScoreOptions(scale, ...)", "KernelScoreOptions(1.0, ...)", "causal",
    ),
    "two tiles side by side are one tile": (keys, "open_listed_keys", "... + 1", "...", "tiles apart"),
    "the second of two tiles is read next to the first": (
        keys, "open_listed_keys", "shift", "0 * shift", "tiles apart",
    ),
    "O1 is not computed": (config.Config, "MEAN", "return ...", "return False", "tiles apart"),
    "no whole tile is kept for the backward": (
        solve, "solve_kernel", "set_bits(record.whole, ...)", "set_bits(record.live, ...)", "causal",
    ),
    "without gradients, the output is not divided by F": (
        output, "output_kernel", "total /= ...", "total /= 1.0", "without gradients",
    ),
    "without records of keys, the last tile is not listed": (
        lists, "listed_tiles", "tl.where(valid, 1, 0)", "tl.where(valid & (candidate < end - 1), 1, 0)", "parts",
    ),
    "the maximum of a part lacks the tiles with a mask": (
        scan, "add_maximum", "return ...", "return maximum if MASKED else ...", "parts",
    ),
    "the maximum of a part that no row sees is -inf": (
        scan, "maxima_of_blocks", "return ...", "return maximum", "parts",
    ),
    "sum u of a part is F": (
        parts, "sums_kernel", "store_row(weight, queries.unit, queries.row, sizes, row_weight)",
        "store_row(weight, queries.unit, queries.row, sizes, row_total)", "parts",
    ),
    "the output of a part is relative to the offset": (
        parts, "output_at_kernel", "sums.weighted * ...", "sums.weighted", "parts",
    ),
}  # fmt: skip


def far_keys_are_favoured():
    """The nearest keys have the best scores by far, and a negative slope makes up for it further away."""
    query, key, value = iid_inputs(1, 1, 160, 16, dtype=torch.float32)
    query[..., 0] += 8.0
    key[..., 0] += 0.4 * torch.arange(160.0)
    return query[:, :, :40], key, value


def support_in_a_wide_block():
    """The first block of keys has all the support, but its mean is far from the queries and from the other keys."""
    query, key, value = iid_inputs(1, 1, 160, 16, dtype=torch.float32)
    query[..., 0] += 8.0
    key[..., 0] += 6.0
    key[:, :, :32, 0] = torch.tensor([16.0, -16.0]).repeat(16)
    return query, key, value


def tiles_apart():
    """Of three tiles of keys, the bound rules out the second."""
    query, key, value = iid_inputs(1, 1, 192, 16, dtype=torch.float16)
    query[..., 0] += 8.0
    key[..., 0] += 3.0
    key[:, :, 64:128, 0] -= 12.0
    return query[:, :, :40], key, value


def cases() -> dict[str, Case]:
    inputs = iid_inputs(1, 2, 70, 16, key_heads=2, dtype=torch.float32)
    return {
        "causal": Case(*inputs, is_causal=True),
        "alpha 1.2": Case(*inputs, alpha=1.2),
        "topics": Case(*topic_inputs(1, 1, 128, 16, 4, dtype=torch.float32)),
        "tiles apart": Case(*tiles_apart()),
        "wide block": Case(*support_in_a_wide_block()),
        "window": Case(*inputs, options={"window_size": (30, 5)}),
        "key mask": Case(*inputs, options={"key_mask": torch.arange(70).remainder(3)[None] > 0}),
        "alpha by head, softcap": Case(*inputs, alpha=torch.tensor([1.4, 1.8]), options={"softcap": 1.0}),
        "crowd": crowd(1.5, -0.001, 0.004, torch.float16),
        "far keys": Case(*far_keys_are_favoured(), options={"alibi_slopes": torch.tensor([-1.0])}),
    }


CHECKS = {name: partial(check_attention, case, "triton") for name, case in cases().items()}


def check_nan() -> None:
    query, key, value = iid_inputs(1, 1, 40, 16)
    query[0, 0, 3] = torch.nan
    output = entmax_attention(query, key, value, impl="triton")
    assert output[0, 0, 3].isnan().all()
    assert output[0, 0, 4].isfinite().all()


def check_without_gradients() -> None:
    """A mean of 64 equal probabilities next to the middle of two float16. An offset is off by 2^-22 of the score: that
    makes F 1 + 8e-5, and without the division by F the mean is on the other side."""
    rows = torch.full((20, 64), 20.0, dtype=torch.float16)  # more than are decoded
    query, key, scale = inputs_with_scores(rows, 1.5)
    value = torch.ones(1, 1, 64, 16, dtype=torch.float16)
    value[:, :, :31] += 2.0**-10
    assert (entmax_attention(query, key, value, scale=scale, impl="triton") == 1.0).all()


def check_causal_parts() -> None:
    inputs = iid_inputs(1, 2, 40, 16, key_length=100, key_heads=1)
    check_parts(Case(*inputs, alpha=1.3, is_causal=True), "triton", (36, 95))


CHECKS |= {"NaN": check_nan, "without gradients": check_without_gradients, "parts": check_causal_parts}


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_pass_without_a_fault(check):
    CHECKS[check]()


ERROR_OF_LOGARITHM = "2.0**-22 * tl.maximum(1.0, tl.abs(...))"
LOGARITHMS = {
    "too high": f"return ... + {ERROR_OF_LOGARITHM}",
    "too low": f"return ... - {ERROR_OF_LOGARITHM}",
    # An error of one sign is mostly normalised away. Here close arguments have different ones.
    "of either sign": f"return ... + (1 - 2 * (tl.cast(d * 2.0**20, tl.int32) % 2)) * {ERROR_OF_LOGARITHM}",
}


@pytest.mark.parametrize("alpha_of_call", [1.02, 1.3, 1.9])
@pytest.mark.parametrize("logarithm", LOGARITHMS)
def test_the_error_of_a_processors_logarithm_is_no_fault(monkeypatch, tmp_path, logarithm, alpha_of_call):
    """What 16-bit types get on a GPU may be off by so much; the gradient of alpha takes it too."""
    plant(Mutant(alpha, "binary_logarithm", "return ...", LOGARITHMS[logarithm]), monkeypatch, tmp_path)
    noise, topics = iid_inputs(1, 1, 130, 16, dtype=torch.float16), topic_inputs(1, 1, 128, 16, 4, dtype=torch.float16)
    for inputs, number in ((noise, alpha_of_call), (topics, alpha_of_call), (noise, torch.tensor(alpha_of_call))):
        check_attention(Case(*inputs, alpha=number, is_causal=True), "triton")


def test_every_distribution_without_a_fault():
    rows = [score_rows(name, 100, dtype=torch.float32) for name in DISTRIBUTIONS]
    check_row_sums(torch.cat(rows), 1.5, "triton")


@pytest.fixture
def no_plans():
    """Plans keep what a fault would change."""
    plan.plan_of.cache_clear()
    yield
    plan.plan_of.cache_clear()


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("fault", FAULTS)
def test_kernel_fault_is_seen(fault, monkeypatch, tmp_path):
    if fault == "NaN is lost" and triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 keeps NaN in any case")
    *mutant, check = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[check]()
