"""Numbers at the ends of their range: infinite and very large keys, alpha close to 1, scores that all are -inf."""

import pytest
import torch
from torch import inf, nan

from flash_entmax import KeySummaries, entmax, entmax_attention
from flash_entmax.core.call import ScoreOptions
from flash_entmax.core.visibility import Visibility
from flash_entmax.distributed import decode


def drawn(backend, queries: int, keys: int, head: int, dtype=torch.float32, value: int = 16) -> list[torch.Tensor]:
    shapes = (1, 1, queries, head), (1, 1, keys, head), (1, 1, keys, value)
    return [torch.randn(shape, device=backend.device).to(dtype) for shape in shapes]


def error(backend, inputs, key_summary=None, **options) -> float:
    """Of the output against the float64 reference; NaN where only one of them is."""
    slopes = options.get("alibi_slopes")
    exact = options | ({} if slopes is None else {"alibi_slopes": slopes.double()})
    wanted = entmax_attention(*(tensor.double() for tensor in inputs), impl="reference", **exact)
    result = entmax_attention(*inputs, impl=backend.impl, key_summary=key_summary, **options)
    return (result.double() - wanted).abs().max().item()


def test_a_key_that_nobody_can_reach_in_a_last_tile_rules_out_no_other(backend):
    """The mean of its block is infinite, and so no bound is known there."""
    for dtype in (torch.float16, torch.float32):
        query, key, value = drawn(backend, 70, 200, 16, dtype)
        query[..., 0].abs_().add_(0.1)
        key[:, :, 199, 0] = -inf
        assert error(backend, (query, key, value)) < 5e-3


def test_finite_keys_whose_sum_overflows(backend):
    query, key, value = drawn(backend, 70, 200, 16)
    query, key = query * 1e-36, key * 1e36
    query[..., 0], key[:, :, 192:, 0] = 2e-39, -1e38
    assert error(backend, (query, key, value)) < 1e-5


@pytest.mark.parametrize("queries", [20, 2])
@pytest.mark.parametrize("place", [3, 400])
def test_an_infinite_number_in_one_half_of_a_wide_head(backend, queries, place):
    query, key, value = drawn(backend, queries, 70, 512, torch.float16)
    query.abs_().add_(0.1)
    key[:, :, 50, place] = -inf
    assert error(backend, (query, key, value)) < 5e-3
    query.requires_grad_()
    assert error(backend, (query, key, value)) < 5e-3


@pytest.mark.parametrize("sign", ["mixed", "negative"])
def test_large_keys_in_8_bits_beside_small_queries(backend, sign):
    query, key, value = drawn(backend, 1, 70, 16)
    query, key = query * 1e-28, key * 1e36
    if sign == "negative":
        query, key = query.abs(), -key.abs()
    summaries = KeySummaries.of(key, impl=backend.impl)
    assert error(backend, (query, key, value), summaries, scale=4e-10) < 1e-5


def test_the_largest_penalty_of_a_block_may_be_in_its_middle(backend):
    large = 1e5
    query, key, value = drawn(backend, 1, 128, 272)
    query.zero_()[..., 0], _ = 1, key.zero_()
    key[0, 0, :64, 0], key[0, 0, 32, 0], key[0, 0, 64:, 0] = -5 * large, 635 * large, 0.8385 * large
    slopes = torch.tensor([-large / 100], device=backend.device)
    summaries = KeySummaries.of(key, skips_blocks=True, impl=backend.impl)
    limits = {"query_positions": 32, "window_size": (-1, 32)}
    options = {"scale": 1.0, "alpha": 2.0, "softcap": large, "alibi_slopes": slopes} | limits
    assert error(backend, (query, key, value), summaries, **options) < 1e-4


def test_a_key_of_nan_rules_out_no_block(backend):
    query, key, value = drawn(backend, 1, 192, 32)
    key[0, 0, 3, 1] = nan
    slopes, summaries = torch.ones(1, device=backend.device), KeySummaries.of(key, skips_blocks=True, impl=backend.impl)
    options = {"scale": 1.0, "alpha": 2.0, "softcap": 1.0, "alibi_slopes": slopes, "key_summary": summaries}
    assert entmax_attention(query, key, value, impl=backend.impl, **options).isnan().all()


def test_alpha_close_to_1_in_float32(backend):
    """Rounded by 2^-24 / (alpha - 1); no digit is left closer to 1, and such numbers are refused."""
    tensors = drawn(backend, 20, 300, 16)
    for alpha in (1.001, 1.0001):
        assert error(backend, tensors, alpha=alpha) < 2.0**-24 / (alpha - 1)
    for alpha in (1.00009, 1 + 1e-12, 0.9999):
        with pytest.raises(ValueError, match=r"1 \(softmax\), or from 1\.0001 to 2 \(sparsemax\), got"):
            entmax_attention(*tensors, alpha=alpha, impl=backend.impl)


@pytest.mark.parametrize(
    ("alpha", "slope"), [(1.0001, 1e8), (1.0001, 1e10), (1.001, 1e8), (1.005, 1e8), (1.0001, None)]
)
def test_large_scores_with_an_alpha_close_to_1(backend, alpha, slope):
    """What rounding may add to the offset, to the power of 1 / (alpha - 1), is beyond float32."""
    inputs = drawn(backend, 20, 20, 16)
    if slope is None:
        inputs[0] *= 1e7
    inputs = [tensor.requires_grad_() for tensor in inputs]
    slopes = None if slope is None else torch.full((1,), slope, device=backend.device)
    output = entmax_attention(*inputs, alpha=alpha, is_causal=True, alibi_slopes=slopes, impl=backend.impl)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), inputs))
    if slope is not None:  # no other key is left
        torch.testing.assert_close(output, inputs[2], rtol=1e-4, atol=1e-4)


def test_entmax_of_alpha_close_to_1(backend):
    """In plain PyTorch, whatever would run by default; the kernels refuse it."""
    x = drawn(backend, 20, 300, 16)[0]
    for alpha in (1.005, 1 + 1e-5, 1 + 1e-10, 1 - 1e-5):
        expected = entmax(x.double(), alpha, impl="torch")
        torch.testing.assert_close(entmax(x, alpha).double(), expected, rtol=1e-4, atol=1e-6)
        if backend.impl == "triton":
            with pytest.raises(ValueError, match=r"takes alpha 1, or from 1\.01 to 2, got"):
                entmax(x, alpha, impl="triton")


@pytest.mark.parametrize("is_masked", [False, True])
def test_parts_whose_scores_all_are_minus_infinity_are_nan(backend, is_masked, monkeypatch):
    """As in one piece; a row that sees no key has 0."""
    query, key, value = drawn(backend, 3, 70, 16)
    query.fill_(1e30)[:, :, 0], key = 1e-12, -(key.abs() + 0.1) * 1e12
    mask = torch.arange(70, device=backend.device).unsqueeze(0) > 3 if is_masked else None
    intervals = torch.tensor([[[0] * 3, [70, 70, 0], [69] * 3]], dtype=torch.int32, device=backend.device)
    score = ScoreOptions(1.5, None).lowered(query.shape, torch.float32, query.device)
    visible = Visibility(key_mask=mask, known_intervals=intervals)
    tile = decode.tile_of(backend.impl, query, value)
    problem = decode.Problem.of(query.shape, value.shape, score, visible.lowered(query, 70, tile))
    monkeypatch.setattr(decode, "gathered", lambda tensor, ranks: tensor.unsqueeze(0))
    output = decode.solved(problem, query, key, value, backend.impl, None)[0, 0]
    assert output[0].isfinite().all()
    assert output[1].isnan().all()
    assert (output[2] == 0).all()
