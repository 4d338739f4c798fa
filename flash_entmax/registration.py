"""How an operator of PyTorch is defined here: its schema, what tracing sees of it, its autograd, its arithmetic."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# The decorator custom_op takes fewer lines, and 0.3 ms more of a step's Python: see docs/design.md.
_library = torch.library.Library("flash_entmax", "DEF")


def operator(arguments: str, results: int) -> Callable:
    """Define an operator of the decorated function's name, computed by it on any device."""

    def define(function):
        schema = f"{function.__name__}({arguments}) -> ({', '.join(['Tensor'] * results)})"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(function.__name__, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.flash_entmax, function.__name__).default

    return define


def fake(name: str) -> Callable:
    """The decorated function gives shapes, dtypes and strides of the operator's results for tracing."""
    return torch.library.register_fake(f"flash_entmax::{name}", lib=_library)


def differentiate(operator, function: type[torch.autograd.Function]) -> None:
    """Let autograd take `function` for the operator, where it records anything."""

    def call(*arguments):
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        with below_autograd():
            return operator(*arguments)

    _library.impl(operator.name().partition("::")[2], call, "Autograd")


def below_autograd() -> AbstractContextManager:
    """Inside, an operator is what computes it."""
    return torch._C._AutoDispatchBelowAutograd()


def refuse_second_derivative(operator) -> None:
    """The gradient has none of its own: a second derivative is refused, not left out."""
    name = operator.name().removesuffix("_backward")

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with below_autograd():
                return operator(*arguments)

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(f"{name} has no second derivative")

    differentiate(operator, Gradient)


def as_given(tensor: Tensor) -> AbstractContextManager:
    """Autocast must not cast inside an operator."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
