"""Modules that work along rows: the activation and the loss."""

from torch import Tensor, nn

from ..activations import entmax
from ..backends import Impl, check_impl
from ..core.checks import check_flag, said
from ..losses import check_options, entmax_loss
from .alpha import AlphaParameter, WithAlpha


class Entmax(WithAlpha):
    """:func:`flash_entmax.entmax` along a dimension, with a fixed or a learned alpha.

    Args:
        alpha: from 1 to 2. A learned alpha starts there, strictly between 1.01 and 2.
        dim: the dimension that sums to 1.
        learn_alpha: alpha is learned, as 1.01 + 0.99 sigmoid(parameter) (Correia et al. 2019, arXiv 1909.00015).

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    def __init__(self, alpha: float = 1.5, dim: int = -1, learn_alpha: bool = False) -> None:
        super().__init__()
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"dim must be an integer, got {said(dim)}")
        check_flag("learn_alpha", learn_alpha)
        self.dim = dim
        self.alpha_parameter = AlphaParameter(alpha, () if learn_alpha else None)

    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None) -> Tensor:
        """``alpha`` replaces the alpha of the module for this call, for instance while it is annealed."""
        return entmax(x, self.alpha if alpha is None else alpha, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class EntmaxLoss(nn.Module):
    """:func:`flash_entmax.entmax_loss` as a module, in place of ``torch.nn.CrossEntropyLoss``.

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
