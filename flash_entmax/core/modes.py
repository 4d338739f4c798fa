"""The modes of PyTorch that a call is made in: torch.func, forward-mode derivatives, autocast."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """The call is inside of torch.func: grad, vmap, jvp and their kin."""
    return torch._C._are_functorch_transforms_active()


def has_tangent(arguments: Sequence) -> bool:
    """Forward-mode derivatives go on where gradients are off, in ``no_grad`` and ``inference_mode``."""
    if forward_ad._current_level < 0:  # no dual_level is open
        return False
    return any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in arguments)


def is_recorded(arguments: Sequence) -> bool:
    """A derivative of what is computed from these arguments may be asked for, in whatever mode."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
        return True
    return not torch.compiler.is_compiling() and (is_transformed() or has_tangent(arguments))


def as_given(tensor: Tensor) -> AbstractContextManager:
    """Autocast must not cast inside an operator."""
    device = tensor.device.type
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, inputs in its dtype, as scaled_dot_product_attention takes them; float64 stays."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
