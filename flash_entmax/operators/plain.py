"""Plain calls, whose options are numbers: checked and lowered once for all calls like them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.call import ScoreOptions
from ..core.checks import check_call
from ..core.visibility import Visibility
from .attention import Attention, OptionNumbers, OptionTensors, attention, packed_arguments
from .eager import call_directly, is_eager
from .lowering import lowered

NUMBERS = {bool, int, float, str, type(None)}
NO_TENSORS = OptionTensors(None, None, None, None, None, None)
MOST_KEPT = 4096
_kept: dict[tuple, OptionNumbers | None] = {}  # by all that checks and lowering look at


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: float, scale: float | None, softcap: float, is_causal: bool,
    window_size: tuple[int, int], impl: str,
) -> Tensor | None:  # fmt: skip
    """The output of a plain call; None if the call is of another kind."""
    tensors, options = (query, key, value), (alpha, scale, softcap, is_causal, window_size, impl)
    signature = signature_of(tensors, options)
    if signature is None:
        return None
    numbers = _kept.get(signature, False)
    if numbers is False:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        numbers = _kept[signature] = checked_numbers(*tensors, *options)
    if numbers is None:
        return None
    needs_backward = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return call_directly(attention, Attention, needs_backward, *tensors, needs_backward, *NO_TENSORS, *numbers)[0]


def signature_of(tensors: Sequence[Tensor], options: tuple) -> tuple | None:
    """Shapes, dtypes, devices and options, with the types of these: True is no 1. None if there is more to look at."""
    *options, window_size, impl = options
    if not is_eager(tensors) or type(window_size) is not tuple:
        return None
    options = *options, *window_size, impl
    kinds = tuple(map(type, options))
    if not NUMBERS.issuperset(kinds):
        return None
    query, key, value = tensors
    if query.is_nested or key.is_nested or value.is_nested or torch.is_autocast_enabled(query.device.type):
        return None
    return (
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device, key.device,
        value.device, options, kinds,
    )  # fmt: skip


def checked_numbers(
    query: Tensor, key: Tensor, value: Tensor, alpha: float, scale: float | None, softcap: float, is_causal: bool,
    window_size: tuple[int, int], impl: str,
) -> OptionNumbers | None:  # fmt: skip
    """The operator's numbers for a call. None where it takes tensors beside them, or no operator computes the call."""
    score, visibility = ScoreOptions(alpha, scale, softcap), Visibility(is_causal, window_size)
    check_call(query, key, value, score, visibility)
    if not visibility.is_plain:
        return None
    call = lowered(query, key, value, score, visibility, impl)
    return packed_arguments(call)[1] if call.tile else None
