"""Entmax in place of softmax: along any dimension of any tensor."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import Impl, choose
from .core.call import ALPHAS
from .core.checks import DTYPES, refuse_nested, typed
from .core.modes import as_given
from .core.tensors import clamped, is_jagged, row_dtype
from .operators import rows as row_ops

if TYPE_CHECKING:
    from torch.nested._internal.nested_tensor import NestedTensor


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, impl: Impl = "auto") -> Tensor:
    """Probabilities along a dimension, most of them exactly zero: alpha-entmax (Peters et al. 2019, arXiv 1905.05702).

    ::

        p_j = [(alpha - 1) x_j - tau]_+ ^ (1 / (alpha - 1)),   with tau such that sum_j p_j = 1

    On a GPU one kernel reads each row whole once. Then it reads only those parts of the row that can hold support.

    Args:
        x: scores of any shape; float16, bfloat16, float32 or float64; or a jagged nested tensor (batch, ragged, ...),
            along a dimension after the ragged one. -inf masks an entry: its probability and gradient are 0. Where all
            entries are masked, all probabilities are 0. NaN and +inf make their row NaN.
        alpha: from 1 to 2. Larger is sparser; 2 is sparsemax, and exactly 1 is softmax. A tensor gets its exact
            gradient. It must broadcast to the shape of ``x`` with size 1 at ``dim``: scalar, or (heads, 1, 1) for
            scores (batch, heads, queries, keys). It is clamped to [1.01, 2], with gradient 0 outside. (A CPU takes the
            rows of one alpha at a time: thousands of different alphas take long.) In float32 the relative rounding of
            a probability is about 2^-24 / (alpha - 1), so a number below 1.01 loses digits.
        dim: the dimension that sums to 1. Any but the last of a contiguous tensor is copied to rows first.
        impl: ``"triton"`` (CUDA; CPU tensors under Triton's interpreter), ``"torch"`` (any device, any dtype) or
            ``"auto"``: Triton where it can run, else torch. An explicit choice never falls back.

    Returns:
        Probabilities in the shape and dtype of ``x``. Arithmetic is in float32 (float64 for float64). Second
        derivatives are refused. In float16, probabilities below 6e-8 are lost. Above alpha 1.5 that loses a gradient.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``alpha`` neither a number nor a floating-point tensor.
        ValueError: ``alpha``, ``dim`` or ``impl`` out of range, or shapes and devices that do not fit.
    """
    if is_jagged(x):
        return entmax_of_jagged(x, alpha, dim, impl)
    check_scores(x, dim)
    check_alpha(alpha, x, dim)
    backend = choose(x.dtype, x.device, impl)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        with as_given(x):
            return softmax(x, dim)
    if x.numel() == 0:
        return x.clone()
    rows = x.movedim(dim, -1)
    alphas, number = None, 1.5
    if isinstance(alpha, Tensor):
        alphas = clamped(alpha.to(row_dtype(x)), ALPHAS).expand(reduced_shape(x, dim)).movedim(dim, -1).reshape(-1)
        alphas = alphas.contiguous()
    else:
        number = float(alpha)
    p = row_ops.entmax(rows.reshape(-1, rows.shape[-1]).contiguous(), alphas, number, backend)
    return p.view(rows.shape).movedim(-1, dim)


def entmax_of_jagged(x: "NestedTensor", alpha: float | Tensor, dim: int, impl: Impl) -> Tensor:
    """Entmax of a nested tensor (batch, ragged, ...), along a dimension after the ragged one."""
    check_dim(dim, x.dim())
    if dim % x.dim() < 2:
        raise ValueError(f"dim of a nested tensor must be after the ragged one, from 2 to {x.dim() - 1}, got {dim}")
    p = entmax(x.values(), alpha, dim % x.dim() - 1, impl=impl)
    return torch.nested.nested_tensor_from_jagged(p, x.offsets())


def sparsemax(x: Tensor, dim: int = -1, *, impl: Impl = "auto") -> Tensor:
    """:func:`entmax` with alpha 2 (Martins and Astudillo 2016, arXiv 1602.02068): the nearest point of the simplex."""
    return entmax(x, 2.0, dim, impl=impl)


def entmax15(x: Tensor, dim: int = -1, *, impl: Impl = "auto") -> Tensor:
    """:func:`entmax` with alpha 1.5."""
    return entmax(x, 1.5, dim, impl=impl)


def softmax(x: Tensor, dim: int) -> Tensor:
    """The limit alpha = 1. A masked entry has gradient 0; where every entry is masked, all probabilities are 0."""
    masked = x == -torch.inf
    all_masked = masked.all(dim, keepdim=True)
    return x.masked_fill(masked, -torch.inf).masked_fill(all_masked, 0.0).softmax(dim).masked_fill(all_masked, 0.0)


def check_scores(x: Tensor, dim: int, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    refuse_nested(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    check_dim(dim, x.dim(), f" for shape {tuple(x.shape)}")


def check_dim(dim: int, count: int, suffix: str = "") -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -count <= dim < count:
        raise ValueError(f"dim must be from {-count} to {count - 1}{suffix}, got {dim}")


def check_alpha(alpha: float | Tensor, x: Tensor, dim: int) -> None:
    if not isinstance(alpha, Tensor):
        check_alpha_number(alpha, accepted="a number or a tensor")
        return
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must be a floating-point tensor, got {alpha.dtype}")
    if alpha.device != x.device:
        raise ValueError(f"alpha must be on the device of x, {x.device}, got {alpha.device}")
    shape = reduced_shape(x, dim)
    try:
        fits = torch.broadcast_shapes(tuple(alpha.shape), shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"alpha must broadcast to {tuple(shape)}, x with 1 at dim {dim}, got {tuple(alpha.shape)}")


def check_alpha_number(alpha: float, accepted: str = "a number") -> None:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be {accepted}, got {typed(alpha)}")
    if not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must be in [1, 2], got {alpha}")


def reduced_shape(x: Tensor, dim: int) -> torch.Size:
    """The shape of x with size 1 at dim."""
    shape = list(x.shape)
    shape[dim] = 1
    return torch.Size(shape)
