"""The way of a call: check, lower, call. A call like one before is neither checked nor lowered again.

To check and to lower a call takes the host as long as to launch a short one. Calls with tensors of the same shapes,
strides, dtypes and devices pass the same checks and are lowered to the same, where their options are equal numbers, or
tensors of the same kind: each call has its own alpha, scale, slopes, and intervals of keys. These are given, or made of
`key_lengths` or of the boundaries of packed sequences. A backend may prepare more for calls that are alike.
"""

import torch
from torch import Tensor

from ..backends import choose
from ..core.call import KeySummary, RoundedKeys, ScoreOptions, Support
from ..core.checks import check_flag, checked_inputs
from ..core.modes import as_autocast
from ..core.summary_checks import SummarySizes, check_summaries
from ..core.visibility import Visibility
from . import dispatch
from .eager import PLAIN

NUMBERS = frozenset((float, int, bool, str, type(None)))
NUMBERS_AND_TENSORS = NUMBERS | frozenset(PLAIN)


def attend(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, impl: str,
    return_support: bool, summary: KeySummary | None = None, rounded: tuple[SummarySizes, RoundedKeys] | None = None,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """Inputs (batch, heads, length, dim); packed sequences are one batch row."""
    query, key, value = as_autocast(query, key, value)
    like = likeness((query, key, value), score, visibility, impl, return_support, rounded or summary)
    if like is not None and (call := dispatch.kept.get(like)) is not None:
        return dispatch.attend_again(query, key, value, score, visibility, call)
    inputs = checked_inputs(query, key, value, score, visibility)
    check_flag("return_support", return_support)
    rounded_keys = None
    if rounded is not None:
        sizes, rounded_keys = rounded
        check_summaries(sizes, inputs[1])
    return dispatch.attend(*inputs, score, visibility, impl, return_support, summary, rounded_keys, like)


def likeness(
    tensors: tuple[Tensor, ...], score: ScoreOptions, visibility: Visibility, impl: str, return_support: bool,
    summary: tuple | None,
) -> tuple | None:  # fmt: skip
    """What is equal in calls that are checked and lowered alike; None where more than this decides.

    The tensors are as autocast wants them. An option of another type is another option: 1 is a window, True is none.
    """
    v, (alpha, scale, softcap, slopes) = visibility, score
    lengths, known, positions, given = v.key_lengths, v.known_intervals, v.query_positions, None
    if v.key_mask is not None or v.block_mask is not None or summary is not None:
        return None
    if return_support is not False or type(v.window_size) is not tuple or torch.compiler.is_compiling():
        return None
    if known is not None:
        if not known.is_contiguous():
            return None
        if isinstance(positions, Tensor):  # where queries stand, the intervals say
            given, positions = (type(positions), positions.shape, positions.dtype, positions.device), None
    packing = packing_of(v)
    if v.cu_seq_q is not None and (packing is None or positions is not None):
        return None
    options = softcap, v.is_causal, positions, impl, *v.window_size, v.max_q, v.max_k
    score_options = alpha, scale, slopes
    types = tuple(map(type, (*score_options, *options)))
    if not NUMBERS.issuperset(types[3:]) or not NUMBERS_AND_TENSORS.issuperset(types):
        return None
    limits = (limit for limit in (lengths, known, v.cu_seq_q, v.cu_seq_k) if limit is not None)
    for tensor in (*tensors, *limits, *(option for option in score_options if isinstance(option, Tensor))):
        if type(tensor) not in PLAIN or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            return None
    query, key, value = tensors
    device, dtype = query.device, query.dtype
    if not dtype == key.dtype == value.dtype:
        return None
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), dtype, device, key.device,
        value.device, choose(dtype, device, impl, others=("reference",)), options, types,
        *map(number_or_kind, score_options),
        None if lengths is None else (lengths.shape, lengths.dtype, lengths.device),
        None if known is None else (known.shape, known.dtype, known.device), given, packing,
    )  # fmt: skip


def number_or_kind(option: float | Tensor | None) -> object:
    """Of a tensor, what is equal in those that pass the same checks, but for their values."""
    return (option.shape, option.dtype, option.device) if isinstance(option, Tensor) else option


def packing_of(visibility: Visibility) -> tuple | None:
    """What is equal in boundaries of packed sequences that pass the same checks; None where they fail them.

    How many sequences there are is left out: only the intervals depend on it.
    """
    cu_q, cu_k = visibility.cu_seq_q, visibility.cu_seq_k
    if not (isinstance(cu_q, Tensor) and isinstance(cu_k, Tensor)):
        return None
    if cu_q.dim() != 1 or cu_q.shape != cu_k.shape or cu_q.shape[0] == 0:
        return None
    return cu_q.dtype, cu_k.dtype, cu_q.device, cu_k.device, cu_q is cu_k
