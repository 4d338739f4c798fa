"""The public calls: check, choose an implementation, call."""

import math
import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import ops, reference
from .problem import Impl, Problem, Support, check_inputs, check_slope

TRITON_IS_INSTALLED = find_spec("triton") is not None


def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
    return_support: bool = False,
) -> Tensor | tuple[Tensor, Support]:
    """Attention whose weights are alpha-entmax instead of softmax: most keys get a probability of exactly zero.

    For each query, with scores s_j = scale * query . key_j over the visible keys::

        p_j = [(alpha - 1) s_j - tau]_+ ^ (1 / (alpha - 1)),   sum_j p_j = 1,   output = sum_j p_j value_j

    Tiles of keys that provably get probability zero are skipped, in the forward pass and in the gradient; the result
    is exact. Peters et al. (2019, arXiv 1905.05702) define alpha-entmax, AdaSplash-2 (arXiv 2604.15180) the algorithm
    that this one builds on.

    Args:
        query: (batch, heads, query length, head size); float16, bfloat16, float32 or float64, any strides. The kernels
            read views in place if their rows are contiguous and start at multiples of 16 elements, as (batch, length,
            heads, dim) views of common head sizes do; they copy other tensors first.
        key: (batch, key heads, key length, head size). ``heads`` must be a multiple of ``key heads``; consecutive query
            heads share a key head (grouped-query attention).
        value: (batch, key heads, key length, value size). Head sizes are from 1 to 256.
        alpha: from 1 to 2. Larger is sparser; 2 is sparsemax, and exactly 1 is softmax, computed by
            ``scaled_dot_product_attention``. In float32 the relative rounding of a probability is about
            2^-24 / (alpha - 1), so alpha below 1.01 loses digits.
        is_causal: query i sees keys 0 .. i + (key length - query length): the mask is aligned to the lower right, so
            that the last query sees every key. PyTorch's ``is_causal`` aligns to the upper left; at equal lengths the
            two agree.
        scale: positive; default ``1 / sqrt(head size)``.
        impl: ``"triton"`` (CUDA; CPU tensors under Triton's interpreter), ``"torch"`` (the same stages in PyTorch, any
            device, any dtype), ``"reference"`` (dense, autograd) or ``"auto"``: Triton where it can run, else torch.
            An explicit choice never falls back.
        return_support: also return a :class:`Support`: the threshold and support size of each row, the live tiles.

    Returns:
        The output, (batch, heads, query length, value size) in the dtype of the inputs, contiguous; with
        ``return_support`` a pair of it and the ``Support``, which carries no gradient. A query without a visible key
        gets output 0 and gradient 0. A NaN or inf in a row's scores, or in a value that it attends to, makes it NaN.

    Raises:
        TypeError: an input that is not a floating-point tensor, mixed dtypes, or a scalar of the wrong type.
        ValueError: shapes, devices, alpha, scale or impl that do not fit.
    """
    check_inputs(query, key, value, alpha, scale, impl)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    check_slope(problem)
    impl = choose_impl(query, impl)

    if impl == "reference":
        with ops.as_given(query):
            output, support = reference.attention(problem, query, key, value)
        return (output, support) if return_support else output
    if alpha == 1.0:
        if return_support:
            raise ValueError("alpha=1 is softmax, which attends to every key: it has no support to return")
        return softmax_attention(problem, query, key, value)

    output, _, maximum, offset, live = ops.attention(query, key, value, float(alpha), is_causal, float(scale), impl)
    if not return_support:
        return output
    maximum, size, tiles = ops.attention_support(
        query.detach(), key.detach(), value.detach(), maximum, offset, live, float(alpha), is_causal, float(scale), impl
    )
    extent = ops.tile(impl, query)
    return output, Support(maximum, offset, size, tiles, (extent, extent))


def softmax_attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The limit alpha = 1, with this library's causal alignment and zeros for a query without a visible key."""
    shared = problem.heads != problem.key_heads
    if not problem.is_causal or problem.diagonal == 0:
        return scaled_dot_product_attention(
            query, key, value, is_causal=problem.is_causal, scale=problem.scale, enable_gqa=shared
        )
    visible = reference.visible_mask(problem, query.device)
    blind = max(0, -problem.diagonal)
    output = scaled_dot_product_attention(
        query[:, :, blind:], key, value, attn_mask=visible[blind:], scale=problem.scale, enable_gqa=shared
    )
    return torch.nn.functional.pad(output, (0, 0, blind, 0))


def choose_impl(query: Tensor, impl: Impl) -> Impl:
    """Resolve ``"auto"``, and refuse an explicit ``"triton"`` that cannot run here."""
    obstacle = why_not_triton(query)
    if impl == "auto":
        return "torch" if obstacle or query.device.type == "cpu" else "triton"
    if impl == "triton" and obstacle:
        raise ValueError(f"impl='triton' cannot run here: {obstacle}")
    return impl


def why_not_triton(query: Tensor) -> str:
    """The reason why the kernels cannot take this tensor, or an empty string."""
    if query.dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, got float64"
    if query.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
        if query.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16"
    elif query.device.type != "cuda":
        return f"the kernels run on CUDA devices, got {query.device}"
    elif not torch.version.hip and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(query.device)} has less"
    if not TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    return ""
