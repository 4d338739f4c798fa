"""Entmax in place of softmax: along any dimension of any tensor."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .backends import Impl, choose
from .core.alphas import within_range
from .core.call import ALPHAS
from .core.checks import DTYPES, check_flag, is_number, require_dense, typed
from .core.modes import as_given
from .core.tensors import is_jagged, jagged_like, row_dtype
from .operators import rows as row_ops

if TYPE_CHECKING:
    from torch.nested._internal.nested_tensor import NestedTensor


@overload
def entmax(
    x: Tensor, alpha: float | Tensor = ..., dim: int = ..., *, alpha_range: tuple[float, float] | None = ...,
    impl: Impl = ...,
    return_support_size: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def entmax(
    x: Tensor, alpha: float | Tensor = ..., dim: int = ..., *, alpha_range: tuple[float, float] | None = ...,
    impl: Impl = ...,
    return_support_size: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def entmax(
    x: Tensor, alpha: float | Tensor = ..., dim: int = ..., *, alpha_range: tuple[float, float] | None = ...,
    impl: Impl = ...,
    return_support_size: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def entmax(
    x: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    *,
    alpha_range: tuple[float, float] | None = None,
    impl: Impl = "auto",
    return_support_size: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Probabilities along a dimension, most of them exactly zero: alpha-entmax (Peters et al. 2019, arXiv 1905.05702).

    ::

        p_j = [(alpha - 1) x_j - tau]_+ ^ (1 / (alpha - 1)),   with tau such that sum_j p_j = 1

    On a GPU one kernel reads each row whole once. Then it reads only those parts of the row that can hold support.

    Args:
        x: scores of any shape; float16, bfloat16, float32 or float64; or a jagged nested tensor (batch, ragged, ...),
            along a dimension after the ragged one. -inf masks an entry: its probability and gradient are 0. Where all
            entries are masked, all probabilities are 0. NaN and +inf make their row NaN.
        alpha: any number above 0. Larger is sparser; 2 is sparsemax, exactly 1 is softmax, and below 1 no probability
            is 0. A tensor gets its exact gradient. It must broadcast to the shape of ``x`` with size 1 at ``dim``:
            scalar, or (heads, 1, 1) for scores (batch, heads, queries, keys); for a nested ``x`` it is a scalar.
            docs/entmax.md says which backend takes which alpha. Above 4 an entry next to the threshold is
            ill-conditioned.
        dim: the dimension that sums to 1. Any but the last of a contiguous tensor is copied to rows first.
        alpha_range: (lowest, highest), to which alpha is clamped, with gradient 0 outside. None clamps nothing.
        impl: ``"triton"`` (CUDA; CPU tensors under Triton's interpreter), for 1 and for numbers and tensors in
            [1.01, 2]; ``"torch"`` (any device, any dtype, any alpha); or ``"auto"``: Triton where it can run, but torch
            for any other number. An explicit choice never falls back.
        return_support_size: also return how many entries have a positive probability.

    Returns:
        Probabilities in the shape and dtype of ``x``. Arithmetic is in float32 (float64 for float64). Second
        derivatives are refused. In float16, probabilities below 6e-8 are lost, and their gradients with them. These
        count above alpha 1.5, and in rows where tens of thousands of entries share the probability. With
        ``return_support_size``, a pair of them and the sizes, int64, of the shape of ``x`` with size 1 at ``dim``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``alpha`` neither a number nor a floating-point tensor.
        ValueError: ``alpha``, ``dim`` or ``impl`` out of range, or shapes and devices that do not fit. With the kernels
            on CUDA, where reading a tensor alpha would wait for the device, that is a device-side assertion.
    """
    check_flag("return_support_size", return_support_size)
    if is_jagged(x):
        return entmax_of_jagged(x, alpha, dim, alpha_range, impl, return_support_size)
    check_scores(x, dim)
    alpha = alpha if alpha_range is None else within_range(alpha, alpha_range)
    check_alpha(alpha, x, dim)
    p = probabilities(x, alpha, dim, choose_for(alpha, x, impl))
    return (p, support_size(p, dim)) if return_support_size else p


def probabilities(x: Tensor, alpha: float | Tensor, dim: int, backend: str) -> Tensor:
    """What `entmax` returns, of a call that is checked."""
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        with as_given(x):
            return softmax(x, dim)
    if x.numel() == 0:
        return x.clone()
    rows = x.movedim(dim, -1)
    alphas, number = None, 1.5
    if isinstance(alpha, Tensor):
        alphas = by_row(alpha, x, dim)
    else:
        number = float(alpha)
    p = row_ops.entmax(rows.reshape(-1, rows.shape[-1]).contiguous(), alphas, number, backend)
    return p.view(rows.shape).movedim(-1, dim)


def entmax_of_jagged(
    x: "NestedTensor", alpha: float | Tensor, dim: int, alpha_range: tuple[float, float] | None, impl: Impl,
    return_support_size: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Entmax of a nested tensor (batch, ragged, ...), along a dimension after the ragged one."""
    check_dim(dim, x.dim())
    if dim % x.dim() < 2:
        raise ValueError(f"dim of a nested tensor must be after the ragged one, from 2 to {x.dim() - 1}, got {dim}")
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise ValueError(f"alpha of a nested tensor must be a number or a tensor of one, got {tuple(alpha.shape)}")
    alpha = alpha.reshape(()) if isinstance(alpha, Tensor) else alpha
    p = entmax(x.values(), alpha, dim % x.dim() - 1, alpha_range=alpha_range, impl=impl)
    nested = jagged_like(x, p)
    return (nested, jagged_like(x, support_size(p, dim % x.dim() - 1))) if return_support_size else nested


@overload
def sparsemax(
    x: Tensor, dim: int = ..., *, impl: Impl = ..., return_support_size: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def sparsemax(
    x: Tensor, dim: int = ..., *, impl: Impl = ..., return_support_size: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def sparsemax(
    x: Tensor, dim: int = ..., *, impl: Impl = ..., return_support_size: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def sparsemax(
    x: Tensor, dim: int = -1, *, impl: Impl = "auto", return_support_size: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`entmax` with alpha 2 (Martins and Astudillo 2016, arXiv 1602.02068): the nearest point of the simplex."""
    return entmax(x, 2.0, dim, impl=impl, return_support_size=return_support_size)


@overload
def entmax15(
    x: Tensor, dim: int = ..., *, impl: Impl = ..., return_support_size: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def entmax15(
    x: Tensor, dim: int = ..., *, impl: Impl = ..., return_support_size: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def entmax15(
    x: Tensor, dim: int = ..., *, impl: Impl = ..., return_support_size: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def entmax15(
    x: Tensor, dim: int = -1, *, impl: Impl = "auto", return_support_size: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`entmax` with alpha 1.5."""
    return entmax(x, 1.5, dim, impl=impl, return_support_size=return_support_size)


def support_size(p: Tensor, dim: int) -> Tensor:
    """How many entries are positive, with size 1 at dim."""
    return (p.detach() > 0).sum(dim, keepdim=True)


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
    require_dense(name, x)
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
    check_by_row("alpha", alpha, x, dim)


def check_by_row(name: str, numbers: Tensor, x: Tensor, dim: int) -> None:
    """A tensor that broadcasts to one number for each row."""
    if not numbers.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {numbers.dtype}")
    if numbers.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {numbers.device}")
    shape = reduced_shape(x, dim)
    try:
        fits = torch.broadcast_shapes(tuple(numbers.shape), shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        got = tuple(numbers.shape)
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, x with 1 at dim {dim}, got {got}")


def check_alpha_number(alpha: float, accepted: str = "a number") -> None:
    if not is_number(alpha):
        raise TypeError(f"alpha must be {accepted}, got {typed(alpha)}")
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")


def choose_for(alpha: float | Tensor, x: Tensor, impl: str) -> str:
    """The name of the backend for rows of this alpha: the kernels have formulas for some numbers only."""
    backend = choose(x.dtype, x.device, impl)
    lowest, highest = ALPHAS
    if backend != "triton" or isinstance(alpha, Tensor) or alpha == 1.0 or lowest <= alpha <= highest:
        return backend
    if impl == "triton":
        raise ValueError(
            f"impl='triton' takes alpha 1, or from {lowest} to {highest:g}, got {alpha}: impl='torch' takes any above 0"
        )
    return "torch"


def by_row(numbers: Tensor, x: Tensor, dim: int) -> Tensor:
    """(rows,), of the dtype of rows; a copy: its holder may change the tensor in place before the backward pass."""
    wide = numbers.to(row_dtype(x)).expand(reduced_shape(x, dim)).movedim(dim, -1)
    return wide.clone(memory_format=torch.contiguous_format).view(-1)


def by_last(numbers: float | Tensor, x: Tensor, dim: int) -> Tensor:
    """A number for each row, in the dtype of rows, with size 1 in place of dim, which is last."""
    if not isinstance(numbers, Tensor):
        return torch.full((1,) * x.dim(), float(numbers), dtype=row_dtype(x), device=x.device)
    return numbers.to(row_dtype(x)).expand(reduced_shape(x, dim)).movedim(dim, -1)


def reduced_shape(x: Tensor, dim: int) -> torch.Size:
    """The shape of x with size 1 at dim."""
    shape = list(x.shape)
    shape[dim] = 1
    return torch.Size(shape)
