"""The range of alpha: what a path takes is checked, and only the option ``alpha_range`` clamps."""

import torch
from torch import Tensor

from .call import ALPHAS
from .checks import is_number, typed
from .tensors import clamped

ROUNDING = 0.0022  # 1.01 in bfloat16 is 1.0078
ADVICE = "; alpha_range=(1.01, 2) clamps it"


def check_alpha_range(alpha_range: object) -> None:
    """A pair of numbers, lowest first, both above 0."""
    if not isinstance(alpha_range, (tuple, list)) or len(alpha_range) != 2 or not all(map(is_number, alpha_range)):
        raise TypeError(f"alpha_range must be a pair of numbers, or None, got {alpha_range!r}")
    lowest, highest = alpha_range
    if not 0.0 < lowest <= highest < float("inf"):
        raise ValueError(f"alpha_range must be (lowest, highest), finite and above 0, got {tuple(alpha_range)}")


def within_range(alpha: float | Tensor, alpha_range: tuple[float, float]) -> float | Tensor:
    """Alpha clamped to the range, with gradient 0 outside; NaN stays NaN."""
    check_alpha_range(alpha_range)
    lowest, highest = alpha_range
    if isinstance(alpha, Tensor):
        return clamped(alpha, (lowest, highest)) if alpha.is_floating_point() else alpha  # refused by the call
    if not is_number(alpha):
        raise TypeError(f"alpha must be a number or a tensor, got {typed(alpha)}")
    return min(max(alpha, lowest), highest)


def check_alphas(alphas: Tensor, advice: str = "") -> None:
    """Refuse a tensor alpha outside of ALPHAS. On a GPU, where reading it would wait, it is asserted. NaN passes."""
    lowest, highest = ALPHAS
    if alphas.is_meta:
        return
    outside = (alphas < lowest - ROUNDING) | (alphas > highest)
    words = f"a tensor alpha must be in [{lowest:g}, {highest:g}]"
    if alphas.is_cuda:
        torch._assert_async(~outside.any(), words + advice)
    else:
        refuse_where(outside, alphas, words, advice)


def check_positive(alphas: Tensor) -> None:
    """Refuse a tensor alpha of rows in plain PyTorch, which reads it on any device, that is not above 0. NaN passes."""
    refuse_where((alphas <= 0) | (alphas == torch.inf), alphas, "a tensor alpha must be finite and above 0")


def refuse_where(outside: Tensor, alphas: Tensor, words: str, advice: str = "") -> None:
    if outside.any():
        raise ValueError(f"{words}, got {alphas[outside].flatten()[0].item():g}{advice}")
