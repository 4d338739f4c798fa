"""From the public call to what computes it: choose the backend, lower the options, call."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS, choose, reference
from ..core.alphas import ADVICE, check_alphas
from ..core.call import KeySummary, OwnOptions, Problem, RoundedKeys, ScoreOptions, Support
from ..core.intervals import intervals as interval_operator
from ..core.modes import as_given, is_recorded, is_transformed
from ..core.registration import function_of
from ..core.summary_checks import check_decoded, check_key_summary
from ..core.tensors import row_dtype
from ..core.visibility import Visibility
from . import attention as attention_operators
from .attention import Attention, OptionNumbers, OptionTensors, flattened, tile_of, unpack_arguments
from .eager import PLAIN, is_eager, recorded
from .steps import attend_by


class Lowered(NamedTuple):
    """The options of a call as the operator takes them."""

    tensors: OptionTensors
    numbers: OptionNumbers

    def with_own(self, own: OwnOptions) -> "Lowered":
        return Lowered(self.tensors._replace(**own._asdict()), self.numbers)


class KeptCall:
    """What a call was lowered to, but for its own options. For the first call like it, its backend prepares more:

    `compute` is for calls that nothing differentiates, and `record` for those that autograd does, but for their
    options. Both return None where the operator has to compute a call. `was_used`: a call like it has come since it was
    kept, or spared.
    """

    __slots__ = "compute", "has_intervals", "has_score_tensors", "lowered", "record", "was_used"

    def __init__(self, lowered: Lowered) -> None:
        tensors = lowered.tensors
        self.has_intervals = tensors.intervals is not None
        self.has_score_tensors = tensors.alpha is not None or tensors.alibi_slopes is not None
        self.lowered = lowered.with_own(OwnOptions())
        self.compute: Compute | None = self.prepare
        self.record: Compute | None = self.prepare_step
        self.was_used = False

    def prepare(self, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions) -> None:
        """From now on, what `compute` is comes from the backend, see backends.Backend."""
        problem, backend = unpack_arguments(query, value, *self.lowered.with_own(own))
        self.compute = BACKENDS[backend].prepare(problem, query, key, value)

    def prepare_step(self, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions) -> None:
        """Likewise `record`."""
        problem, backend = unpack_arguments(query, value, *self.lowered.with_own(own))
        step = BACKENDS[backend].prepare_step(problem, query, key, value)
        self.record = None if step is None else partial(attend_by, step, self.lowered.numbers)


Compute = Callable[[Tensor, Tensor, Tensor, OwnOptions], Tensor | None]
MOST_KEPT = 256
NOTHING = OwnOptions()
kept: OrderedDict[tuple, KeptCall] = OrderedDict()


def keep(like: tuple, lowered: Lowered) -> None:
    """Keep what a call was lowered to. The oldest one that was not used goes, and used ones before it are spared once.

    Tensors may be of a mode, or of a graph, that ends.
    """
    call = KeptCall(lowered)
    if any(tensor is not None for tensor in call.lowered.tensors):
        return
    while len(kept) >= MOST_KEPT:
        with suppress(KeyError):  # other threads have taken all
            oldest, old_call = kept.popitem(last=False)
            if old_call.was_used:
                old_call.was_used = False
                kept[oldest] = old_call
    kept[like] = call


def attend(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, impl: str,
    return_support: bool, summary: KeySummary | None, rounded_keys: RoundedKeys | None, like: tuple | None,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """A call that is checked. What it is lowered to is kept for calls that are `like` it."""
    backend = choose(query.dtype, query.device, impl, others=("reference",))
    score = score.lowered(query.shape, row_dtype(query), query.device)
    has_tiles = backend in BACKENDS and not score.is_softmax()
    tile = tile_of(backend, query, value) if has_tiles else None
    if rounded_keys is not None:
        check_decoded(query, return_support or is_recorded((query, key, value, *score)))
    if summary is not None:
        check_key_summary(summary, key, tile)
        summary = KeySummary(*(tensor.detach() for tensor in summary))
    if not has_tiles:
        return attend_without_tiles(query, key, value, score, visibility, backend, return_support)
    visible = visibility.lowered(query, key.shape[2], tile)
    lowered = Lowered(*flattened(score, visible, summary, rounded_keys, backend))
    if like is not None:
        keep(like, lowered)
    return attend_lowered(query, key, value, lowered, return_support)


def attend_again(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, call: KeptCall
) -> Tensor | tuple[Tensor, Support]:
    """A call like one that is kept."""
    call.was_used = True
    inputs, own, is_learned = (query, key, value), NOTHING, False
    given = (*visibility.limits, *score) if call.has_score_tensors else visibility.limits
    is_direct = is_eager((*inputs, *(option for option in given if isinstance(option, Tensor))))
    if call.has_score_tensors:
        own = score.lowered(query.shape, row_dtype(query), query.device).tensors
        is_learned = is_recorded(own)
    if call.has_intervals:
        compute_intervals = function_of(interval_operator) if is_direct else None
        own = own._replace(intervals=visibility.intervals(query, key.shape[2], compute_intervals))
    if is_direct and not is_learned:
        is_differentiated = query.requires_grad or key.requires_grad or value.requires_grad
        compute = call.record if is_differentiated and torch.is_grad_enabled() else call.compute
        if compute is not None:
            if own.alpha is not None:
                check_alphas(own.alpha, ADVICE)
            if (output := compute(*inputs, own)) is not None:
                return output
    lowered = call.lowered if own is NOTHING else call.lowered.with_own(own)
    return attend_lowered(query, key, value, lowered, False)


def attend_lowered(
    query: Tensor, key: Tensor, value: Tensor, lowered: Lowered, return_support: bool
) -> Tensor | tuple[Tensor, Support]:
    """Call the operator."""
    tensors, numbers = lowered
    learned = tensors.alpha, tensors.scale, tensors.alibi_slopes
    needs_backward = return_support or is_recorded((query, key, value, *learned))
    call = recorded(attention_operators.attention, Attention, (query, key, value, *tensors))
    output, _, *state = call(query, key, value, needs_backward, *tensors, *numbers)
    if not return_support:
        return output
    detached = (None if tensor is None else tensor.detach() for tensor in (query, key, value, *tensors))
    maximum, size, marks, keys = attention_operators.attention_support(*detached, *state, *numbers)
    tile = tile_of(numbers.backend, query, value)
    return output, Support(maximum, state[1], size, marks, (tile, tile), keys)


def attend_without_tiles(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, backend: str,
    return_support: bool,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """The specification, or softmax: in PyTorch's own autograd, with the masks as the caller gave them."""
    problem = Problem.of(query.shape, value.shape, score, visibility.lowered(query, key.shape[2], None))
    alpha, is_read = score.alpha, not (torch.compiler.is_compiling() or is_transformed())
    if isinstance(alpha, Tensor) and type(alpha) in PLAIN and is_read:
        check_alphas(alpha, ADVICE)  # elsewhere it cannot be read, and the specification takes it as it is
    if backend == "reference":
        with as_given(query):
            result = reference.attention(problem, query, key, value, visibility)
        return result if return_support else result[0]
    if return_support:
        raise ValueError("alpha=1 is softmax, which attends to every key: it has no support to return")
    from ..backends.softmax import softmax_attention

    with as_given(query):
        return softmax_attention(problem, query, key, value, visibility)
