"""alpha = 1 is softmax: PyTorch's own attention, with this library's causal alignment."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention
from flash_entmax.testing import iid_inputs

each_impl = pytest.mark.parametrize("impl", ["auto", "torch", "reference"])


@each_impl
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_pytorch(impl, scale):
    query, key, value = iid_inputs(2, 4, 50, 16, key_length=70, key_heads=2, value_dim=8)
    expected = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    actual = entmax_attention(query, key, value, alpha=1.0, scale=scale, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entmax_attention(query, key, value, alpha=1, scale=scale, impl=impl), expected)


@each_impl
def test_causal_equals_pytorch_at_equal_lengths(impl):
    query, key, value = iid_inputs(1, 2, 60, 16)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    actual = entmax_attention(query, key, value, alpha=1.0, is_causal=True, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@each_impl
@pytest.mark.parametrize(("queries", "keys"), [(40, 70), (70, 40), (1, 9), (9, 1)])
def test_causal_mask_is_aligned_to_the_lower_right(impl, queries, keys):
    query, key, value = (t.requires_grad_() for t in iid_inputs(1, 4, queries, 8, key_length=keys, key_heads=2))
    output = entmax_attention(query, key, value, alpha=1.0, is_causal=True, impl=impl)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    scores = wide[0] @ wide[1].repeat_interleave(2, 1).mT / 8**0.5
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    expected = weights @ wide[2].repeat_interleave(2, 1)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert (output[:, :, : max(0, queries - keys)] == 0).all()
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@each_impl
def test_small_alpha_comes_close(impl):
    query, key, value = iid_inputs(1, 2, 70, 16, dtype=torch.float64)
    softmax = entmax_attention(query, key, value, alpha=1.0, impl=impl)
    errors = [
        (entmax_attention(query, key, value, alpha=alpha, impl=impl) - softmax).abs().max().item()
        for alpha in (1.1, 1.01, 1.001, 1.0001)
    ]
    ratios = [larger / smaller for larger, smaller in pairwise(errors)]
    assert ratios == pytest.approx([10] * 3, rel=0.2)  # the error is of first order in alpha - 1
    assert errors[-1] < 1e-3
