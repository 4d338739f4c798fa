"""From the public call to what computes it: choose the backend, lower the options, call."""

from torch import Tensor

from ..backends import BACKENDS, Impl, choose, reference
from ..core.call import MAX_HEAD_SIZE, KeySummary, Problem, ScoreOptions, Support
from ..core.checks import check_inputs, check_key_summary, typed
from ..core.modes import as_given, is_recorded
from ..core.tensors import row_dtype
from ..core.visibility import Visibility
from . import attention as operators
from .eager import recorded


def attend(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, impl: str,
    return_support: bool, summary: KeySummary | None = None,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """A call that is checked."""
    backend = choose(query.dtype, query.device, impl, others=("reference",))
    score = score.lowered(query.shape, row_dtype(query), query.device)
    if backend == "reference" or score.is_softmax:
        return attend_by_definition(query, key, value, score, visibility, backend, return_support)
    tile = BACKENDS[backend].tile_size(query.dtype, max(query.shape[-1], value.shape[-1]))
    if summary is not None:
        check_key_summary(summary, key, tile)
    tensors, numbers = operators.flattened(score, visibility.lowered(query, key.shape[2], tile), summary, backend)
    needs_backward = return_support or is_recorded((query, key, value, *tensors[:3]))
    call = recorded(operators.attention, operators.Attention, (query, key, value, *tensors))
    output, _, maximum, offset, live = call(query, key, value, needs_backward, *tensors, *numbers)
    if not return_support:
        return output
    detached = (None if tensor is None else tensor.detach() for tensor in (query, key, value, *tensors))
    maximum, size, marks = operators.attention_support(*detached, maximum, offset, live, *numbers)
    return output, Support(maximum, offset, size, marks, (tile, tile))


def attend_by_definition(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, backend: str,
    return_support: bool,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """The specification, and softmax: in PyTorch's own autograd, with the masks as the caller gave them."""
    problem = Problem.of(query.shape, value.shape, score, visibility.lowered(query, key.shape[2], None))
    if backend == "reference":
        with as_given(query):
            result = reference.attention(problem, query, key, value, visibility)
        return result if return_support else result[0]
    if return_support:
        raise ValueError("alpha=1 is softmax, which attends to every key: it has no support to return")
    from ..backends.softmax import softmax_attention

    with as_given(query):
        return softmax_attention(problem, query, key, value, visibility)


def summarise_keys(key: Tensor, *, value_size: int | None = None, impl: Impl = "auto") -> KeySummary:
    """The summary of blocks of keys that ``entmax_attention(key_summary=...)`` takes.

    Many calls that attend to the same keys, as in generation, need to read all of them for their summary only once.

    Args:
        key: (batch, key heads, key length, head size); float16, bfloat16, float32 or float64.
        value_size: head size of the values of those calls; default that of the keys.
        impl: as for :func:`flash_entmax.entmax_attention`, and the same as that of those calls.

    Returns:
        A :class:`KeySummary`. It is right for these keys as they are now: where they change, make another one.

    Raises:
        TypeError, ValueError: a key of another kind, and sizes or ``impl`` out of range.
    """
    check_inputs(key, key, key)
    value_size = key.shape[-1] if value_size is None else value_size
    if not isinstance(value_size, int) or isinstance(value_size, bool):
        raise TypeError(f"value_size must be an integer or None, got {typed(value_size)}")
    if not 1 <= value_size <= MAX_HEAD_SIZE:
        raise ValueError(f"value_size must be from 1 to {MAX_HEAD_SIZE}, got {value_size}")
    backend = choose(key.dtype, key.device, impl)
    return BACKENDS[backend].summarise(key.detach(), value_size)
