"""Alpha of a module: a fixed number, or a learned parameter."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.call import ALPHAS
from ..core.checks import check_number_alpha, is_number, typed


class AlphaParameter(nn.Module):
    """Alpha as a number, or learned: 1.01 + 0.99 sigmoid(logit), which no optimizer step takes out of range.

    The logit is float32, or float64 in a float64 module. It stays so where ``model.to(torch.bfloat16)`` or ``half()``
    casts the weights around it: in 16 bits, the small steps of an optimizer would be rounded away.

    Args:
        alpha: the number; where alpha is learned, its start.
        shape: of a learned alpha; None for a fixed number.
        takes_any: any number above 0 is a fixed alpha, and not only those that attention takes.
        device, dtype: of the logit.
    """

    def __init__(
        self,
        alpha: float,
        shape: tuple[int, ...] | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        takes_any: bool = False,
    ) -> None:
        super().__init__()
        check_number(alpha, takes_any)
        self.number, self.logit = float(alpha), None
        if shape is not None:
            lowest, highest = ALPHAS
            if not lowest < alpha < highest:
                raise ValueError(f"a learned alpha must start between {lowest} and {highest}, got {alpha}")
            dtype = torch.get_default_dtype() if dtype is None else dtype
            dtype = torch.float32 if dtype.itemsize < 4 else dtype
            self.logit = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learned alpha to its start."""
        if self.logit is not None:
            lowest, highest = ALPHAS
            share = (self.number - lowest) / (highest - lowest)
            nn.init.constant_(self.logit, math.log(share / (1.0 - share)))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "AlphaParameter":
        return super()._apply(lambda tensor: not_narrowed(tensor, function(tensor)), recurse)

    def forward(self) -> float | Tensor:
        if self.logit is None:
            return self.number
        lowest, highest = ALPHAS
        logit = self.logit.float() if self.logit.dtype.itemsize < 4 else self.logit
        return lowest + (highest - lowest) * logit.sigmoid()

    def extra_repr(self) -> str:
        return f"alpha={self.number}" if self.logit is None else f"learned, shape={tuple(self.logit.shape)}"


def not_narrowed(tensor: Tensor, changed: Tensor) -> Tensor:
    """What a tensor was changed to, but for its dtype if that has become one of 16 bits."""
    return changed if changed.dtype in (torch.float32, torch.float64) else tensor.to(changed.device)


def check_number(alpha: object, takes_any: bool) -> None:
    if not is_number(alpha):
        raise TypeError(f"alpha must be a number, got {typed(alpha)}")
    if takes_any and not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    if not takes_any:
        check_number_alpha("alpha", alpha)


class WithAlpha(nn.Module):
    """A module that holds an `AlphaParameter`.

    A number is an option of the module, as its sizes are: copies have it, and ``state_dict`` does not. A learned alpha
    is the parameter ``alpha_parameter.logit``. A tensor that moves is neither: it is passed to each call.
    """

    alpha_parameter: AlphaParameter
    takes_any_alpha = False  # or only the numbers that attention takes

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_rename_power)

    @property
    def alpha(self) -> float | Tensor:
        """A number; where alpha is learned, a tensor, (heads,) in an attention layer.

        A number can be assigned. A tensor is refused: a copy of the module, or the same module on another device, would
        hold a copy of the tensor, which nothing moves.
        """
        return self.alpha_parameter()

    @alpha.setter
    def alpha(self, number: float) -> None:
        self.alpha_parameter = AlphaParameter(number, None, takes_any=self.takes_any_alpha)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "alpha" and isinstance(value, Tensor):
            raise TypeError(
                f"alpha must be a number, got {typed(value)}: pass a tensor to each call, as in "
                "module(x, alpha=annealing.alpha), or learn it with learn_alpha=True"
            )
        super().__setattr__(name, value)


def _rename_power(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Accept the key ``power.logit`` of older checkpoints."""
    old, new = f"{prefix}power.logit", f"{prefix}alpha_parameter.logit"
    if old in state and new not in state:
        state[new] = state.pop(old)
