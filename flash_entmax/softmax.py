"""The limit alpha = 1: PyTorch's softmax attention, with this library's masks.

Imported by the first call that needs it, as torch.compiler loads Triton.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .problem import Problem
from .sight import Sight


def softmax_attention(problem: Problem, query, key, value, scale, slopes, sight: Sight) -> Tensor:
    """The output; zeros for a query without a visible key."""
    if problem.softcap:
        raise ValueError("softcap with alpha=1 (softmax) is not computed here: use FlexAttention, or alpha above 1")
    if isinstance(scale, Tensor):
        query, scale = query * scale.to(query.dtype).view(-1, 1, 1), 1.0
    groups = problem.heads // problem.key_heads
    masks = (sight.key_mask, sight.block_mask, slopes)
    square = sight.window[1] != 0 or problem.diagonal == 0
    if sight.is_plain and square and all(mask is None for mask in masks):
        is_causal = sight.window[1] == 0
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=groups > 1)
    if groups > 1:  # which PyTorch's fused kernel for masks does not take
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    visible, distance = reference.visible_mask(problem, sight, query.device)
    blind = ~visible.any(-1, keepdim=True)
    bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible & ~blind, -torch.inf)
    if slopes is not None:
        slopes = slopes[:1] if slopes.stride(0) == 0 else slopes  # given by head: one bias for the whole batch
        bias = bias - reference.alibi(slopes, distance).to(query.dtype)
    with sdpa_kernel(backends_for_masks()) if query.is_cuda else nullcontext():
        output = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return output.masked_fill(blind, 0.0)


@torch.compiler.assume_constant_result
def backends_for_masks() -> list[SDPBackend]:
    """PyTorch's backends as they are enabled, without cuDNN unless it is the only one.

    With a mask, 64 keys modulo 128 and scores below -88, cuDNN's gradient of the query is NaN (pytorch/pytorch#196678).
    """
    enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return [backend for backend, is_enabled in enabled.items() if is_enabled] or [SDPBackend.CUDNN_ATTENTION]
