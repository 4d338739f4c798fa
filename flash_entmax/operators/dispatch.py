"""From the public call to what computes it: choose the backend, lower the options, call."""

from torch import Tensor

from ..backends import BACKENDS, choose, reference
from ..core.call import KeySummary, Problem, RoundedKeys, ScoreOptions, Support
from ..core.checks import check_decoded, check_key_summary
from ..core.modes import as_given, is_recorded
from ..core.tensors import row_dtype
from ..core.visibility import Visibility
from . import attention as attention_operators
from .eager import recorded


def attend(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, impl: str,
    return_support: bool, summary: KeySummary | None = None, rounded_keys: RoundedKeys | None = None,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """A call that is checked."""
    backend = choose(query.dtype, query.device, impl, others=("reference",))
    score = score.lowered(query.shape, row_dtype(query), query.device)
    needs_backward = return_support or is_recorded((query, key, value, score.alpha, score.scale, score.alibi_slopes))
    has_tiles = backend in BACKENDS and not score.is_softmax()
    tile = attention_operators.tile_of(backend, query, value) if has_tiles else None
    if rounded_keys is not None:
        check_decoded(query, needs_backward)
    if summary is not None:
        check_key_summary(summary, key, tile)
        summary = KeySummary(*(tensor.detach() for tensor in summary))
    if not has_tiles:
        return attend_without_tiles(query, key, value, score, visibility, backend, return_support)
    tensors, numbers = attention_operators.flattened(
        score, visibility.lowered(query, key.shape[2], tile), summary, rounded_keys, backend
    )
    call = recorded(attention_operators.attention, attention_operators.Attention, (query, key, value, *tensors))
    output, _, *state = call(query, key, value, needs_backward, *tensors, *numbers)
    if not return_support:
        return output
    detached = (None if tensor is None else tensor.detach() for tensor in (query, key, value, *tensors))
    maximum, size, marks, keys = attention_operators.attention_support(*detached, *state, *numbers)
    return output, Support(maximum, state[1], size, marks, (tile, tile), keys)


def attend_without_tiles(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, backend: str,
    return_support: bool,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """The specification, or softmax: in PyTorch's own autograd, with the masks as the caller gave them."""
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
