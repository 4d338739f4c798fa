"""alpha = 1 is softmax: PyTorch's own attention, with this library's causal alignment."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention, entmax_attention_varlen
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


def masks(queries, keys):
    """Options beside the dense mask and the distances that they stand for."""
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    lengths, padding = torch.tensor([20, keys]), torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    padding[0] = False
    apart = (place - key).abs()
    shuffled = torch.arange(queries).flip(0)
    return {
        "window": ({"window_size": (9, 4)}, (key >= place - 9) & (key <= place + 4), apart),
        "causal window": ({"window_size": (9, -1), "is_causal": True}, (key >= place - 9) & (key <= place), apart),
        "lengths": ({"key_lengths": lengths}, (key < lengths[:, None])[:, None, None], apart),
        "key mask": ({"key_mask": padding}, padding[:, None, None], apart),
        "positions": (
            {"query_positions": shuffled, "is_causal": True}, key <= shuffled[:, None], (shuffled[:, None] - key).abs(),
        ),
        "block mask": (
            {"block_mask": create_block_mask(lambda b, h, q, k: (q + k) % 3 > 0, None, None, queries, keys, "cpu")},
            (torch.arange(queries)[:, None] + key) % 3 > 0, apart,
        ),
    }  # fmt: skip


@each_impl
@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize("slopes", [None, [0.5, 0.1], [[0.5, 0.1], [0.0, 0.2]]], ids=["none", "by head", "by row"])
def test_masks_and_slopes_equal_a_dense_mask(impl, name, slopes):
    """Every option means the same as above alpha = 1; a query that sees no key gets output 0 and gradient 0."""
    query, key, value = leaves = [t.requires_grad_() for t in iid_inputs(2, 2, 50, 8, key_length=60)]
    options, visible, apart = masks(50, 60)[name]
    if slopes is not None:
        slopes = torch.tensor(slopes, requires_grad=True)
        options, leaves = options | {"alibi_slopes": slopes}, [*leaves, slopes]
    output = entmax_attention(query, key, value, alpha=1.0, impl=impl, **options)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    scores = wide[0] @ wide[1].mT / 8**0.5
    if slopes is not None:
        scores = scores - wide[3].view(-1, 2, 1, 1) * apart
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    expected = weights @ wide[2]
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_softcap_is_refused(impl):
    with pytest.raises(ValueError, match=r"softcap with alpha=1 .*FlexAttention"):
        entmax_attention(*iid_inputs(1, 1, 5, 8), alpha=1.0, softcap=1.0, impl=impl)


@each_impl
def test_packed_sequences_are_alone(impl):
    query, key, value = (t[0].transpose(0, 1) for t in iid_inputs(1, 2, 40, 8))
    cu_seq = torch.tensor([0, 7, 7, 30])
    output = entmax_attention_varlen(query, key, value, cu_seq, None, 23, 23, alpha=1.0, is_causal=True, impl=impl)
    assert (output[30:] == 0).all()
    for rows in (slice(0, 7), slice(7, 30)):
        alone = (tensor[rows].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        expected = scaled_dot_product_attention(*alone, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(output[rows], expected, rtol=1e-5, atol=1e-6)


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


def test_a_causal_window_is_aligned_to_the_lower_right():
    query, key, value = iid_inputs(1, 1, 3, 8, key_length=7)
    windowed = entmax_attention(query, key, value, alpha=1.0, window_size=(-1, 0))
    torch.testing.assert_close(windowed, entmax_attention(query, key, value, alpha=1.0, is_causal=True))
