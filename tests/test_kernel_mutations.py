"""Deliberate faults in the kernels, in Triton's interpreter, where a jit function can be replaced like any other."""

import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Case, crowd
from checks import check_attention, check_row_sums
from conftest import HAS_CUDA

from flash_entmax import entmax_attention
from flash_entmax.testing import DISTRIBUTIONS, iid_inputs, score_rows, topic_inputs

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from flash_entmax.backends.triton import alpha, attention, certify, lists, score, tile
from flash_entmax.backends.triton import gradient as backward
from flash_entmax.backends.triton import visibility as view

KERNELS = [module for name, module in sys.modules.items() if name.startswith("flash_entmax.backends.triton.")]
assert attention in KERNELS
shorten, close_list, lean = certify.shorten, lists.close_list, score.lean
listed_scores, listed_maxima, listed_products = score.listed_scores, score.listed_maxima, score.listed_products
Numbers = attention.Numbers


@triton.jit
def bound_is_too_small(offset, total, weight, exponent):
    return 0.7 * alpha.newton_step(offset, total, weight, exponent)


@triton.jit
def one_key_too_many(row, extent, CAUSAL: tl.constexpr):  # noqa: N803
    return tl.where(row < extent.query_length, tl.minimum(row + 2, extent.key_length), 0)


@triton.jit
def nothing_is_hidden(score, key, start, stop, S):  # noqa: N803
    return score


@triton.jit
def the_last_key_is_seen_twice_over(score, key, start, stop, S):  # noqa: N803
    return view.tl.where((key <= stop) & (key >= start), score, float("-inf"))


@triton.jit
def no_bit_is_looked_at(score, row, key, unit, query_tile, key_tile, extent, view, S):  # noqa: N803
    return score


@triton.jit
def no_tile_needs_a_mask(unit, query_tile, key_tile, extent, view, S):  # noqa: N803
    return query_tile + key_tile >= 0


@triton.jit
def the_last_tile_is_dropped(places, capacity, counts):
    tiles = close_list(places, capacity, counts)
    return tile.TileList(tiles.tiles, tiles.split, tiles.count - 1)


@triton.jit
def the_reach_falls_short(tiles, column, reach, S):  # noqa: N803
    return shorten(tiles, column, reach - 0.3, S)


@triton.jit
def nan_is_lost(score, maximum, slope, intercept):
    d = (score - maximum) * slope + intercept
    return tl.where(d > 0, d, 0.0)


@triton.jit
def every_head_reads_the_first(m, unit, extent):
    return tile.head_of(m, unit // extent.heads, 0)


@triton.jit
def every_head_has_the_first_number(number, unit, extent, S):  # noqa: N803
    return tl.load(number) if S.PER_HEAD else number


@triton.jit
def every_tile_is_the_first(queries, key, tiles, place, extent, view, S):  # noqa: N803
    return listed_scores(queries, key, tiles, 0, extent, view, S)


@triton.jit
def every_maximum_is_of_the_first(queries, key, tiles, place, extent, view, S):  # noqa: N803
    return listed_maxima(queries, key, tiles, 0, extent, view, S)


@triton.jit
def maxima_are_not_capped(queries, key, tiles, place, extent, view, S):  # noqa: N803
    product = listed_products(queries, key, tiles, place, S)
    return tl.max(tl.reshape(product, (S.TILE, S.ABREAST, S.TILE)), 2)


@triton.jit
def the_bound_forgets_the_bias(queries, block, extent, MOST: tl.constexpr, S):  # noqa: N803
    return 0.0


@triton.jit
def the_bias_grows_the_other_way(distance, tilt):
    return lean(distance, -tilt)


@triton.jit
def tanh_is_the_identity(x, ACCURATE):  # noqa: N803
    return x


@triton.jit
def any_step_is_the_last(total, weight, slope, exponent, limit):
    return total >= 0.0


@triton.jit
def no_tile_is_left(places, tiles, column, reach, S):  # noqa: N803
    return tile.TileList(places, 0, 0)


def the_scale_is_missing(scale, slope, exponent):
    return Numbers(1.0, slope, exponent)


# Each with the check that must fail.
FAULTS = {
    "the certificate is too small": ("newton_step", bound_is_too_small, "causal"),
    "queries see one key too many": ("visible_keys", one_key_too_many, "causal"),
    "the mask is left out": ("hide", nothing_is_hidden, "causal"),
    "the mask is off by one": ("hide", the_last_key_is_seen_twice_over, "window"),
    "the filter is left out": ("hide_filtered", no_bit_is_looked_at, "key mask"),
    "tiles with a mask are taken for whole": ("are_whole", no_tile_needs_a_mask, "window"),
    "a listed tile is dropped": ("close_list", the_last_tile_is_dropped, "causal"),
    "a live tile is dropped": ("shorten", the_reach_falls_short, "causal"),
    "blocks of keys are taken for points": ("NORM_ROUNDING", tl.constexpr(0.05), "wide block"),
    "the bound on blocks ignores ALiBi": ("block_lean", the_bound_forgets_the_bias, "far keys"),
    "ALiBi has the wrong sign": ("lean", the_bias_grows_the_other_way, "far keys"),
    "the softcap is left out": ("tanh", tanh_is_the_identity, "alpha by head, softcap"),
    "NaN is lost": ("distance", nan_is_lost, "NaN"),
    "every query head reads the first key head": ("key_head", every_head_reads_the_first, "causal"),
    "every query head takes the first alpha": ("of_head", every_head_has_the_first_number, "alpha by head, softcap"),
    "u is p": ("support_weight", alpha.probability, "causal"),
    "every tile is read as the first": ("listed_scores", every_tile_is_the_first, "topics"),
    "every maximum is of the first tile": ("listed_maxima", every_maximum_is_of_the_first, "topics"),
    "maxima are not capped": ("listed_maxima", maxima_are_not_capped, "alpha by head, softcap"),
    "the solve ends with its first step": ("is_settled", any_step_is_the_last, "crowd"),
    "later steps of the solve have no tiles": ("tiles_within", no_tile_is_left, "crowd"),
    "gradients lack the scale": ("Numbers", the_scale_is_missing, "causal"),
}
IN_THEIR_HOME = ("visible_keys", "hide", "hide_filtered", "distance", "tanh", "lean", "are_whole", "of_head")


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


def cases() -> dict[str, Case]:
    inputs = iid_inputs(1, 2, 70, 16, key_heads=2, dtype=torch.float32)
    return {
        "causal": Case(*inputs, is_causal=True),
        "topics": Case(*topic_inputs(1, 1, 128, 16, 4, dtype=torch.float32)),
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


CHECKS["NaN"] = check_nan


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_pass_without_a_fault(check):
    CHECKS[check]()


@triton.jit
def logarithm_too_high(d, HARDWARE):  # noqa: N803
    exact = tl.log2(d)
    return exact + 2.0**-22 * tl.maximum(1.0, tl.abs(exact))


@triton.jit
def logarithm_too_low(d, HARDWARE):  # noqa: N803
    exact = tl.log2(d)
    return exact - 2.0**-22 * tl.maximum(1.0, tl.abs(exact))


@triton.jit
def logarithm_of_either_sign(d, HARDWARE):  # noqa: N803
    """An error of one sign is mostly normalised away; here close arguments have different ones."""
    exact = tl.log2(d)
    sign = tl.where(tl.cast(d * 2.0**20, tl.int32) % 2 == 0, 1.0, -1.0)
    return exact + sign * 2.0**-22 * tl.maximum(1.0, tl.abs(exact))


@pytest.mark.parametrize("alpha_of_call", [1.02, 1.3, 1.9])
@pytest.mark.parametrize("logarithm", [logarithm_too_high, logarithm_too_low, logarithm_of_either_sign])
def test_the_error_of_a_processors_logarithm_is_no_fault(monkeypatch, logarithm, alpha_of_call):
    """What 16-bit types get on a GPU may be off by so much; the gradient of alpha takes it too."""
    for module in (alpha, backward):
        monkeypatch.setattr(module, "binary_logarithm", logarithm)
    noise, topics = iid_inputs(1, 1, 130, 16, dtype=torch.float16), topic_inputs(1, 1, 128, 16, 4, dtype=torch.float16)
    for inputs, number in ((noise, alpha_of_call), (topics, alpha_of_call), (noise, torch.tensor(alpha_of_call))):
        check_attention(Case(*inputs, alpha=number, is_causal=True), "triton")


def test_every_distribution_without_a_fault():
    rows = [score_rows(name, 100, dtype=torch.float32) for name in DISTRIBUTIONS]
    check_row_sums(torch.cat(rows), 1.5, "triton")


@pytest.mark.parametrize("fault", FAULTS)
def test_kernel_fault_is_seen(fault, monkeypatch):
    name, mutant, check = FAULTS[fault]
    homes = [module for module in KERNELS if name in vars(module)]
    assert homes
    for module in homes:
        if module not in (alpha, tile) or name in IN_THEIR_HOME:
            monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        CHECKS[check]()
