"""The limit alpha = 1: PyTorch's softmax attention, with this library's masks.

Imported by the first call that needs it: the decorator below loads torch._dynamo, and that Triton.
"""

from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .problem import Problem
from .sight import Sight

BACKENDS_CHANGE = Lock()  # they are the process's, not a thread's


def softmax_attention(problem: Problem, query, key, value, scale, slopes, sight: Sight) -> Tensor:
    """The output; zeros for a query without a visible key."""
    if problem.softcap:
        raise ValueError("softcap with alpha=1 (softmax) is not computed here: use FlexAttention, or alpha above 1")
    if isinstance(scale, Tensor):
        query, scale = (query * scale.view(-1, 1, 1)).to(query.dtype), 1.0
    if problem.is_empty:
        return nothing(problem, query, key, value)
    shared = problem.group > 1
    masks = (sight.key_mask, sight.block_mask, slopes)
    square = sight.window[1] != 0 or problem.diagonal == 0
    if sight.is_plain and square and all(mask is None for mask in masks):
        is_causal = sight.window[1] == 0
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=shared)
    if shared and query.is_cuda:  # where PyTorch's fused kernel for masks takes no shared heads
        key, value = (tensor.repeat_interleave(problem.group, 1) for tensor in (key, value))
        shared = False
    visible, distance = reference.visible_mask(problem, sight, query.device)
    blind = ~visible.any(-1, keepdim=True)
    bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible & ~blind, -torch.inf)
    if slopes is not None:
        slopes = slopes[:1] if slopes.stride(0) == 0 else slopes  # given by head: one bias for the whole batch
        bias = bias - reference.alibi(slopes, distance).to(query.dtype)
    attend = partial(scaled_dot_product_attention, query, key, value, attn_mask=bias, scale=scale, enable_gqa=shared)
    output = without_cudnn(attend) if query.is_cuda and query.requires_grad else attend()
    return output.masked_fill(blind, 0.0)


def nothing(problem: Problem, query, key, value) -> Tensor:
    """Zeros, with gradients of zero: PyTorch 2.11 on a CPU divides by the number of heads, be it 0."""
    anything = query.sum(-1, keepdim=True) + key.sum() + value.sum()
    zeros = anything.masked_fill(torch.ones_like(anything, dtype=torch.bool), 0.0)
    return zeros.expand(*query.shape[:-1], problem.value_size).contiguous()


def without_cudnn(attend: Callable[[], Tensor]) -> Tensor:
    """With a mask, 64 keys modulo 128 and scores below -88 its gradient of the query is NaN (pytorch/pytorch#196678).

    An exported graph has no trace of this, as which kernel it takes is decided where it runs.
    """
    if torch.compiler.is_compiling():
        with sdpa_kernel(other_backends()):
            return attend()
    with BACKENDS_CHANGE, sdpa_kernel(other_backends()):
        return attend()


@torch.compiler.assume_constant_result
def other_backends() -> list[SDPBackend]:
    """PyTorch's backends but cuDNN, or cuDNN alone, as they are enabled: now, or when the call is compiled."""
    flags = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: flags.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: flags.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: flags.math_sdp_enabled(),
    }
    if not any(enabled.values()):
        enabled = {SDPBackend.CUDNN_ATTENTION: flags.cudnn_sdp_enabled()}
    return [backend for backend, is_enabled in enabled.items() if is_enabled]
