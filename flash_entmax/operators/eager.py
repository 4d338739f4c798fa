"""Calls that need no dispatcher: what computes an operator is called directly.

PyTorch's dispatcher finds out who has a say in a call: autograd, torch.func, a compiler, a mode. As a rule only
autograd has one, and finding this out takes longer than a short call itself.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.registration import function_of

PLAIN = Tensor, torch.nn.Parameter
_is_zerotensor, _is_functional_tensor = torch._is_zerotensor, torch._is_functional_tensor
_is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor


def is_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Nobody but autograd has a say in a call with these tensors.

    That is: no compiler, tracer, transform of torch.func, dispatch or function mode, level of forward-mode derivatives
    or profiler is active; and the data of every tensor can be read as it lies: no subclass, no meta tensor, no negated
    view, no zero without storage, no tensor that autograd batches or that a compiler wraps.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or tensor.is_meta or tensor.is_neg() or _is_zerotensor(tensor):
            return False
        if _is_legacy_batchedtensor(tensor) or _is_functional_tensor(tensor):
            return False
    return True


def recorded(
    operator: Callable, derivatives: type[torch.autograd.Function] | None, tensors: Sequence[Tensor | None]
) -> Callable:
    """What to call for an operator with these derivatives. `tensors` are those of its arguments, or None."""
    if not is_eager(tensors):
        return operator
    if derivatives is None or not torch.is_grad_enabled():
        return function_of(operator)
    is_needed = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return derivatives.apply if is_needed else function_of(operator)


def unrecorded(operator: Callable, tensors: Sequence[Tensor | None]) -> Callable:
    """What to call for an operator whose derivatives are not asked for. A second derivative finds the operator."""
    return operator if torch.is_grad_enabled() or not is_eager(tensors) else function_of(operator)
