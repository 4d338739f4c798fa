"""The limit alpha = 1: PyTorch's softmax attention, with this library's masks.

Imported by the first call that needs it: the decorator below loads torch._dynamo, and that Triton.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..core.call import Problem
from ..core.modes import has_tangent, is_transformed
from ..core.visibility import Visibility
from . import reference

BACKENDS_CHANGE = Lock()  # they are the process's, not a thread's


def softmax_attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor, options: Visibility) -> Tensor:
    """The output; zeros for a query without a visible key."""
    _, scale, softcap, slopes = problem.score
    if softcap:
        raise ValueError("softcap with alpha=1 (softmax) is not computed here: use FlexAttention, or alpha above 1")
    if isinstance(scale, Tensor):  # queries times their scale do not fit 16 bits
        dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
        query, key, value = query.to(wide) * scale.view(-1, 1, 1), key.to(wide), value.to(wide)
        score = problem.score._replace(scale=1.0)
        return softmax_attention(replace(problem, score=score), query, key, value, options).to(dtype)
    if problem.is_empty:
        return nothing(problem, query, key, value)
    attend: Callable[..., Tensor] = partial(scaled_dot_product_attention, scale=scale)
    # Fused kernels have no forward-mode derivatives, and not every level of torch.func lets its tangents be seen.
    is_forward = is_transformed() or has_tangent((query, key, value, slopes))
    if is_forward:
        attend = partial(with_backends, [SDPBackend.MATH], attend)
    shared = {"enable_gqa": True} if problem.group > 1 else {}
    masks = (options.key_mask, options.block_mask, slopes)
    square = options.window[1] != 0 or problem.diagonal == 0
    if options.is_plain and square and all(mask is None for mask in masks):
        return attend(query, key, value, is_causal=options.window[1] == 0, **shared)
    if shared and query.is_cuda:  # where PyTorch's fused kernel for masks takes no shared heads
        key, value = (tensor.repeat_interleave(problem.group, 1) for tensor in (key, value))
        shared = {}
    visible, distance = reference.visible_mask(problem, options, query.device)
    if slopes is not None:
        slopes = slopes[:1] if slopes.stride(0) == 0 else slopes  # given by head: one bias for the whole batch
        # The softmax of a row stays what it is if its nearest key loses nothing. So what is near keeps its digits.
        nearest = distance.masked_fill(~visible, torch.iinfo(distance.dtype).max).amin(-1, keepdim=True)
        visible = visible & ~((slopes == torch.inf)[:, :, None, None] & (distance > 0))
    blind = ~visible.any(-1, keepdim=True)
    # On a GPU, PyTorch's kernels take a mask in the query's dtype.
    dtype = query.dtype if query.is_cuda else torch.promote_types(query.dtype, torch.float32)
    bias = torch.zeros_like(visible, dtype=dtype)
    if slopes is not None:
        bias = bias - torch.where(visible, reference.alibi(slopes, distance - nearest), 0.0).to(dtype)
    bias = bias.masked_fill(~visible & ~blind, -torch.inf)
    if query.is_cuda and query.requires_grad and not is_forward:
        # With a mask, 64 keys modulo 128 and scores below -88 cuDNN's gradient of the query is NaN
        # (pytorch/pytorch#196678). An exported graph has no trace of this: it takes what is there where it runs.
        attend = partial(with_backends, other_backends(), attend)
    return attend(query, key, value, attn_mask=bias, **shared).masked_fill(blind, 0.0)


def nothing(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Zeros, with gradients of zero: PyTorch 2.11 on a CPU divides by the number of heads, be it 0."""
    anything = query.sum(-1, keepdim=True) + key.sum() + value.sum()
    zeros = anything.masked_fill(torch.ones_like(anything, dtype=torch.bool), 0.0)
    return zeros.expand(*query.shape[:-1], problem.value_size).contiguous()


def with_backends(
    backends: list[SDPBackend], attend: Callable[..., Tensor], *tensors: Tensor, **options: Any
) -> Tensor:
    """The call with only some of PyTorch's backends enabled."""
    if torch.compiler.is_compiling():
        with sdpa_kernel(backends):
            return attend(*tensors, **options)
    with BACKENDS_CHANGE, sdpa_kernel(backends):
        return attend(*tensors, **options)


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
