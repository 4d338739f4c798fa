"""How an operator of PyTorch is defined: its schema, what tracing sees of it, autograd, torch.vmap, autocast."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.autograd.function import _SingleLevelFunction

from .modes import is_recorded, is_transformed

# The decorator custom_op takes fewer lines, and 0.3 ms more of a step's Python: see docs/design.md.
_library = torch.library.Library("flash_entmax", "DEF")
_functions: dict[object, Callable] = {}  # an operator takes and returns what its schema says


def operator(arguments: str, results: int) -> Callable[[Callable], OpOverload]:
    """Define an operator of the decorated function's name, computed by it on any device."""

    def define(function: Callable) -> OpOverload:
        schema = f"{function.__name__}({arguments}) -> ({', '.join(['Tensor'] * results)})"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(function.__name__, function, "CompositeExplicitAutograd")
        defined = getattr(torch.ops.flash_entmax, function.__name__).default
        _functions[defined] = function
        return defined

    return define


def function_of(operator: Callable) -> Callable:
    """The function that computes an operator, without derivatives. What is no operator of these is its own."""
    return _functions.get(operator, operator)


def fake(name: str) -> Callable:
    """The decorated function gives shapes, dtypes and strides of the operator's results for tracing."""
    return torch.library.register_fake(f"flash_entmax::{name}", lib=_library)


# Autograd


def differentiate(operator: OpOverload, function: type[torch.autograd.Function]) -> None:
    """Let autograd take `function` for the operator where it records anything, in reverse or in forward mode.

    torch.func puts levels of autograd over one another. Each comes here by itself, as it does for an operator of
    PyTorch: the function then is of a single level, and what it calls below autograd belongs to the next.
    """

    def call(*arguments: Any) -> Any:
        if is_transformed():
            with enable_single_level_autograd_function():
                return at_one_level(function).apply(*arguments)
        if is_recorded(arguments):
            return function.apply(*arguments)
        with below_autograd():
            return operator(*arguments)

    _library.impl(name_of(operator), call, "Autograd")


def at_one_level(function: type[torch.autograd.Function]) -> Any:
    """The function, of one level of torch.func: inside, derivatives are on or off as they are now.

    PyTorch turns them off there, and what its forward and jvp call would not see the tangents of the level below.
    """
    backward_mode, forward_mode = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch.set_grad_enabled(backward_mode), _set_fwd_grad_enabled(forward_mode):
            return function.forward(ctx, *arguments)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with torch.set_grad_enabled(backward_mode), _set_fwd_grad_enabled(forward_mode):
            saved = tuple(map(primal_of, ctx.saved_tensors))
            own = SimpleNamespace(saved_tensors=saved, scalars=getattr(ctx, "scalars", ()))
            return function.jvp(own, *map(primal_of, tangents))

    members = {"forward": forward, "backward": function.backward, "jvp": jvp}
    members = {name: staticmethod(member) for name, member in members.items()}
    return type(function.__name__, (_SingleLevelFunction,), members)


def primal_of(value: object) -> object:
    """A tensor without the tangent that it has at this level."""
    return unpack_dual(value).primal if isinstance(value, Tensor) else value


def below_autograd() -> AbstractContextManager:
    """Inside, an operator is what computes it."""
    return torch._C._AutoDispatchBelowAutograd()


def refuse_second_derivative(operator: OpOverload, instead: str = "") -> None:
    """The derivative has none of its own: a second derivative is refused, not left out. ``instead`` has one."""
    advice = f": {instead} has one" if instead else ""
    message = f"{operator.name().rpartition('_')[0]} has no second derivative{advice}"

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with below_autograd():
                return operator(*arguments)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(message)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(message)

    differentiate(operator, Derivative)


def name_of(operator: OpOverload) -> str:
    """Without the namespace and the overload."""
    return operator.name().partition("::")[2].partition(".")[0]


# torch.vmap


def batch_into(operator: OpOverload, arguments: Sequence[int | None], results: Sequence[int]) -> None:
    """Let torch.vmap put its dimension into one that the operator's tensors have, so that one call serves all samples.

    `arguments` names that dimension of each of the first arguments, and `results` that of each result. Where an
    argument that has none (None) differs from sample to sample, the samples are computed one by one.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple:
        if info.batch_size == 0:
            raise ValueError("torch.vmap must have at least one sample, got a dimension of size 0")
        batched = [index for index, dim in enumerate(in_dims) if dim is not None]
        if any(index >= len(arguments) or arguments[index] is None for index in batched):
            return one_by_one(operator, info.batch_size, in_dims, values)
        first = values[0] if in_dims[0] is None else values[0].select(in_dims[0], 0)
        size = first.shape[arguments[0]]
        folded = list(values)
        for index, dim in enumerate(arguments):
            if dim is not None and isinstance(values[index], Tensor):
                folded[index] = fold(values[index], in_dims[index], dim, info.batch_size, size)
        outputs = operator(*folded)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        unfolded = tuple(
            output.unflatten(dim, (info.batch_size, output.shape[dim] // info.batch_size))
            for output, dim in zip(outputs, results, strict=True)
        )
        return (unfolded, tuple(results)) if len(unfolded) > 1 else (unfolded[0], results[0])

    torch.library.register_vmap(f"flash_entmax::{name_of(operator)}", rule, lib=_library)


def fold(tensor: Tensor, in_dim: int | None, dim: int, samples: int, size: int) -> Tensor:
    """One sample after the other along dim, each with `size` entries; a single one is repeated.

    Contiguous, since kernels count the numbers of rows through.
    """
    tensor = tensor.unsqueeze(dim) if in_dim is None else tensor.movedim(in_dim, dim)
    shape = list(tensor.shape)
    shape[dim], shape[dim + 1] = samples, size
    return tensor.expand(shape).flatten(dim, dim + 1).contiguous()


def one_by_one(operator: OpOverload, samples: int, in_dims: Sequence[int | None], values: Sequence) -> tuple:
    """The operator of each sample, and what torch.vmap wants to know: the samples are the first dimension."""
    outputs = []
    for sample in range(samples):
        own = (value if dim is None else value.select(dim, sample) for value, dim in zip(values, in_dims, strict=True))
        outputs.append(operator(*own))
    if isinstance(outputs[0], tuple):
        return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])
    return torch.stack(outputs), 0


def call_one_by_one(operator: OpOverload) -> None:
    """Let torch.vmap call the operator for each sample."""
    batch_into(operator, (), ())
