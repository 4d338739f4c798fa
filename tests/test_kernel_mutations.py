"""Deliberate faults in the kernels, in Triton's interpreter, where a jit function can be replaced like any other."""

import sys
from importlib.util import find_spec

import pytest
import torch
from checks import Case, check_attention, check_row_sums
from conftest import HAS_CUDA

from flash_entmax.testing import DISTRIBUTIONS, iid_inputs, score_rows, topic_inputs

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from flash_entmax.kernels import alpha, attention, certify, tile

KERNELS = [module for name, module in sys.modules.items() if name.startswith("flash_entmax.kernels.")]
assert attention in KERNELS
shorten = certify.shorten
listed_scores = tile.listed_scores


@triton.jit
def bound_is_too_small(offset, total, weight, exponent):
    return 0.7 * alpha.newton_step(offset, total, weight, exponent)


@triton.jit
def one_key_too_many(row, extent, CAUSAL: tl.constexpr):  # noqa: N803
    return tl.where(row < extent.query_length, tl.minimum(row + 2, extent.key_length), 0)


@triton.jit
def nothing_is_hidden(score, key, limit):
    return score


@triton.jit
def the_reach_falls_short(tiles, column, reach, full, S):  # noqa: N803
    return shorten(tiles, column, reach - 0.3, full, S)


@triton.jit
def nan_is_lost(score, maximum, slope, intercept):
    d = (score - maximum) * slope + intercept
    return tl.where(d > 0, d, 0.0)


@triton.jit
def every_head_reads_the_first(m, unit, extent):
    return tile.head_of(m, unit // extent.heads, 0)


@triton.jit
def every_tile_is_the_first(q, key, tiles, place, S):  # noqa: N803
    return listed_scores(q, key, tiles, 0, S)


FAULTS = {
    "the certificate is too small": ("newton_step", bound_is_too_small),
    "queries see one key too many": ("visible_keys", one_key_too_many),
    "the mask is left out": ("hide", nothing_is_hidden),
    "a live tile is dropped": ("shorten", the_reach_falls_short),
    "blocks of keys are taken for points": ("NORM_ROUNDING", tl.constexpr(0.05)),
    "NaN is lost": ("distance", nan_is_lost),
    "every query head reads the first key head": ("key_head", every_head_reads_the_first),
    "u is p": ("support_weight", alpha.probability),
    "every tile is read as the first": ("listed_scores", every_tile_is_the_first),
}


def check_kernels() -> None:
    inputs = iid_inputs(1, 2, 100, 16, key_heads=2, dtype=torch.float32)
    check_attention(Case(*inputs, is_causal=True), "triton")
    check_attention(Case(*topic_inputs(1, 1, 128, 16, 4, dtype=torch.float32)), "triton")
    check_attention(Case(*support_in_a_wide_block()), "triton")
    rows = [score_rows(name, 100, dtype=torch.float32) for name in DISTRIBUTIONS]
    check_row_sums(torch.cat(rows), 1.5, "triton")
    query, key, value = iid_inputs(1, 1, 40, 16)
    query[0, 0, 3] = torch.nan
    output = attention_output(query, key, value)
    assert output[0, 0, 3].isnan().all()
    assert output[0, 0, 4].isfinite().all()


def support_in_a_wide_block():
    """The first block of keys has all the support, but its mean is far from the queries and from the other keys."""
    query, key, value = iid_inputs(1, 1, 160, 16, dtype=torch.float32)
    query[..., 0] += 8.0
    key[..., 0] += 6.0
    key[:, :, :32, 0] = torch.tensor([16.0, -16.0]).repeat(16)
    return query, key, value


def attention_output(*tensors):
    from flash_entmax import entmax_attention

    return entmax_attention(*tensors, impl="triton")


def test_kernels_pass_without_a_fault():
    check_kernels()


@pytest.mark.parametrize("fault", FAULTS)
def test_kernel_fault_is_seen(fault, monkeypatch):
    name, mutant = FAULTS[fault]
    homes = [module for module in KERNELS if name in vars(module)]
    assert homes
    for module in homes:
        if module not in (alpha, tile) or name in ("visible_keys", "hide", "distance"):
            monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        check_kernels()
