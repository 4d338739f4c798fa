"""The guide's calls: what its two sides have in common is the same, and what differs differs as it says."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.nn import EntmaxAttention
from flash_entmax.testing import iid_inputs


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_scaled_dot_product_attention():
    """At alpha 1 the same call; grouped heads need no flag; a row without a key is 0; a boolean mask is a BlockMask."""
    query, key, value = iid_inputs(2, 4, 50, 16, key_heads=2)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.1, enable_gqa=True)
    close(entmax_attention(query, key, value, is_causal=True, scale=0.1, alpha=1.0), theirs)
    visible = torch.arange(50) < 30
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=visible[None, None, None], enable_gqa=True)
    close(entmax_attention(query, key, value, alpha=1.0, key_mask=visible.expand(2, -1)), theirs)
    close(entmax_attention(query, key, value, alpha=1.0, key_lengths=torch.tensor([30, 30])), theirs)
    nothing = torch.zeros(2, 50, dtype=torch.bool)
    assert (entmax_attention(query, key, value, key_mask=nothing) == 0).all()
    attn_mask = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=True)
    block_mask = create_block_mask(lambda b, h, q, k: attn_mask[b, 0, q, k], 2, None, 50, 50, device="cpu")
    close(entmax_attention(query, key, value, alpha=1.0, block_mask=block_mask), theirs)


def test_the_layout_of_flash_attn():
    """(batch, length, heads, dim) by transposing, without a copy, and an output that is contiguous again."""
    q, k, v = (torch.randn(2, 40, 4, 16) for _ in range(3))
    output = entmax_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
    assert output.is_contiguous()
    packed = (t.flatten(0, 1) for t in (q, k, v))
    cu_seqlens = torch.tensor([0, 40, 80], dtype=torch.int32)
    close(entmax_attention_varlen(*packed, cu_seqlens, cu_seqlens, 40, 40, is_causal=True), output.flatten(0, 1))


def test_the_lengths_of_adasplash():
    """Its varlen is key_lengths and zeros at the padding: each sequence alone, and no gradient from what is padded."""
    q, k, v = (tensor.requires_grad_() for tensor in iid_inputs(2, 2, 50, 16))
    varlen = torch.tensor([20, 50])
    output = entmax_attention(q, k, v, key_lengths=varlen)
    padded = torch.arange(q.shape[2], device=q.device) >= varlen[:, None]
    assert (output[0, :, 20:] != 0).any()
    output = output.masked_fill(padded[:, None, :, None], 0.0)
    close(output[:1, :, :20], entmax_attention(*(tensor[:1, :, :20] for tensor in (q, k, v))))
    assert (output[0, :, 20:] == 0).all()
    assert all((g[0, :, 20:] == 0).all() for g in torch.autograd.grad(output.square().sum(), (q, k, v)))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_the_mask_of_flex_attention(alpha):
    query, key, value = iid_inputs(1, 2, 100, 16)
    document = torch.arange(100) // 30
    mask = create_block_mask(
        lambda b, h, q, k: (q >= k) & (document[q] == document[k]), None, None, 100, 100, device="cpu"
    )
    ours = entmax_attention(query, key, value, block_mask=mask, scale=0.1, alpha=alpha)
    if alpha == 1.0:
        close(ours, flex_attention(query, key, value, block_mask=mask, scale=0.1))
    boundaries = torch.tensor([0, 30, 60, 90, 100], dtype=torch.int32)
    tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    packed = entmax_attention_varlen(*tokens, boundaries, None, 30, 30, is_causal=True, scale=0.1, alpha=alpha)
    close(packed.transpose(0, 1)[None], ours)


def test_multihead_attention():
    """At alpha 1 the same layer, with the same weights."""
    theirs = torch.nn.MultiheadAttention(64, 8, batch_first=True)
    layer = EntmaxAttention(64, 8, bias=True, position="none", is_causal=False, alpha=1.0)
    with torch.no_grad():
        torch.nn.init.normal_(theirs.in_proj_bias)
        projections = layer.query, layer.key, layer.value
        parts = zip(projections, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
        for projection, weight, bias in parts:
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
    layer.out.load_state_dict(theirs.out_proj.state_dict())
    x, hidden = torch.randn(2, 10, 64), torch.arange(10) >= torch.tensor([[10], [7]])
    close(layer(x, key_mask=~hidden), theirs(x, x, x, key_padding_mask=hidden)[0])
