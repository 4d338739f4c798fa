"""Plain calls, whose options are numbers: checked and lowered once for all calls like them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import choose
from ..core.call import ScoreOptions
from ..core.checks import check_call
from ..core.visibility import Visibility
from . import attention as operators
from .attention import OptionTensors
from .eager import call_directly, is_eager

NUMBERS = {bool, int, float, type(None)}
NO_TENSORS = OptionTensors(None, None, None, None, None, None)
MOST_KEPT = 4096
_kept: dict[tuple, tuple | None] = {}  # by all that checks and lowering look at


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: float, scale: float | None, softcap: float, is_causal: bool,
    window_size: tuple[int, int], impl: str,
) -> Tensor | None:  # fmt: skip
    """The output of a plain call; None if the call is of another kind."""
    tensors, options = (query, key, value), (alpha, scale, softcap, is_causal, window_size)
    signature = signature_of(tensors, options)
    if signature is None:
        return None
    numbers = _kept.get(signature, False)
    if numbers is False:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        numbers = _kept[signature] = checked_numbers(*tensors, *options)
    backend = choose(query, impl, others=("reference",))
    if numbers is None or backend == "reference":
        return None
    needs_backward = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    arguments = *tensors, needs_backward, *NO_TENSORS, *numbers, backend
    return call_directly(operators.attention, operators.Attention, needs_backward, *arguments)[0]


def signature_of(tensors: Sequence[Tensor], options: tuple) -> tuple | None:
    """Shapes, dtypes, devices and options, with the types of these: True is no 1. None if there is more to look at."""
    *options, window_size = options
    if not is_eager(tensors) or type(window_size) is not tuple:
        return None
    options = *options, *window_size
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
    window_size: tuple[int, int],
) -> tuple | None:  # fmt: skip
    """OptionNumbers but for the backend. None where there are tensors beside them, or where the call is softmax."""
    score, visibility = ScoreOptions(alpha, scale, softcap), Visibility(is_causal, window_size)
    check_call(query, key, value, score, visibility)
    score = score.lowered(query)
    if not visibility.is_plain or score.alpha == 1.0:
        return None
    key_length = key.shape[2]
    return score.alpha, score.scale, score.softcap, visibility.window[1] == 0, visibility.max_span(key_length)
