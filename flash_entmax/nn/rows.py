"""Modules that work along rows: activations and losses."""

from torch import Tensor, nn

from ..activations import entmax
from ..backends import Impl, check_impl
from ..budget import budget_sparsemax
from ..core.checks import check_flag, is_number, said, typed
from ..losses import check_loss_options, check_options, entmax_loss
from ..normmax import check_order_number, normmax, normmax_loss
from .alpha import AlphaParameter, WithAlpha


class Entmax(WithAlpha):
    """:func:`flash_entmax.entmax` along a dimension, with a fixed or a learned alpha.

    Args:
        alpha: any number above 0. A learned alpha starts there, strictly between 1.01 and 2.
        dim: the dimension that sums to 1.
        learn_alpha: alpha is learned, as 1.01 + 0.99 sigmoid(parameter) (Correia et al. 2019, arXiv 1909.00015).

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    takes_any_alpha = True

    def __init__(self, alpha: float = 1.5, dim: int = -1, learn_alpha: bool = False) -> None:
        super().__init__()
        check_integer("dim", dim)
        check_flag("learn_alpha", learn_alpha)
        self.dim = dim
        self.alpha_parameter = AlphaParameter(alpha, () if learn_alpha else None, takes_any=True)

    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None) -> Tensor:
        """``alpha`` replaces the alpha of the module for this call, for instance while it is annealed."""
        return entmax(x, self.alpha if alpha is None else alpha, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class EntmaxLoss(nn.Module):
    """:func:`flash_entmax.entmax_loss` as a module, in place of ``torch.nn.CrossEntropyLoss``.

    Its options are those of the function. It is called with the scores and the target. Predict with :class:`Entmax` of
    the same alpha.

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_options(alpha, ignore_index, reduction, label_smoothing)
        check_impl(impl)
        self.alpha, self.impl = alpha, impl
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = {name: getattr(self, name) for name in ("ignore_index", "reduction", "label_smoothing", "impl")}
        return entmax_loss(input, target, self.alpha, **options)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class Normmax(nn.Module):
    """:func:`flash_entmax.normmax` along a dimension.

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    def __init__(self, alpha: float = 2.0, dim: int = -1) -> None:
        super().__init__()
        check_order_number(alpha)
        check_integer("dim", dim)
        self.alpha, self.dim = alpha, dim

    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None) -> Tensor:
        """``alpha`` replaces the alpha of the module for this call."""
        return normmax(x, self.alpha if alpha is None else alpha, self.dim)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, dim={self.dim}"


class NormmaxLoss(nn.Module):
    """:func:`flash_entmax.normmax_loss` as a module, in place of ``torch.nn.CrossEntropyLoss``.

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    def __init__(
        self, alpha: float = 2.0, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        check_order_number(alpha)
        check_loss_options(ignore_index, reduction, label_smoothing)
        self.alpha = alpha
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = {name: getattr(self, name) for name in ("ignore_index", "reduction", "label_smoothing")}
        return normmax_loss(input, target, self.alpha, **options)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class BudgetSparsemax(nn.Module):
    """:func:`flash_entmax.budget_sparsemax` along a dimension.

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    def __init__(self, budget: float = 2.0, dim: int = -1) -> None:
        super().__init__()
        if not is_number(budget):
            raise TypeError(f"budget must be a number, got {typed(budget)}")
        if not budget >= 0.0:
            raise ValueError(f"budget must be 0 or more, got {budget}")
        check_integer("dim", dim)
        self.budget, self.dim = budget, dim

    def forward(self, x: Tensor, *, budget: float | Tensor | None = None) -> Tensor:
        """``budget`` replaces the budget of the module for this call."""
        return budget_sparsemax(x, self.budget if budget is None else budget, self.dim)

    def extra_repr(self) -> str:
        return f"budget={self.budget}, dim={self.dim}"


def check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {said(value)}")
