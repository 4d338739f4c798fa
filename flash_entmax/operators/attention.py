"""Operators of attention: schemas, shapes for tracing, autograd and torch.vmap. The backends compute them.

    flash_entmax::attention           -> output, value_mean, maximum, offset, reached_keys, reaching_queries
    flash_entmax::attention_backward  -> grad_query, grad_key, grad_value, grad_parameters
    flash_entmax::attention_tangent   -> the output's derivative along tangents of the inputs
    flash_entmax::attention_support   -> maximum in units of z, support size of each row, live tiles, keys of each tile
    flash_entmax::summarise           -> the four tensors of a KeySummary

backends.Backend says what these are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..core.alphas import ADVICE, check_alphas
from ..core.call import KeySummary, Problem, RoundedKeys, ScoreOptions, Tangents, VisibilityArgs
from ..core.modes import as_given
from ..core.registration import batch_into, below_autograd, differentiate, fake, operator, refuse_second_derivative
from ..core.tensors import ceil_div, empty_stored_as, row_dtype
from .eager import unrecorded


class OptionTensors(NamedTuple):
    """The options of a call that are tensors, or None; see ScoreOptions, VisibilityArgs, KeySummary, RoundedKeys."""

    alpha: Tensor | None = None
    scale: Tensor | None = None
    alibi_slopes: Tensor | None = None
    intervals: Tensor | None = None
    tile_kinds: Tensor | None = None
    tile_bits: Tensor | None = None
    summary_centre: Tensor | None = None
    summary_radius: Tensor | None = None
    summary_error: Tensor | None = None
    summary_largest: Tensor | None = None
    rounded: Tensor | None = None
    rounded_unit: Tensor | None = None
    rounded_error: Tensor | None = None
    rounded_centre: Tensor | None = None
    rounded_radius: Tensor | None = None
    rounded_centre_error: Tensor | None = None


class OptionNumbers(NamedTuple):
    """The options that are numbers. Where alpha and scale are tensors, their numbers count for nothing."""

    alpha: float
    scale: float
    softcap: float
    is_causal: bool
    max_visible_span: int
    backend: str


# Arguments in schemas, and the dimension of the batch for torch.vmap in them and in results.
_INPUTS = "Tensor query, Tensor key, Tensor value"
_STATE = "Tensor maximum, Tensor offset, Tensor reached_keys, Tensor reaching_queries"
_TENSORS = ", ".join(f"Tensor? {name}_tensor" for name in OptionTensors._fields)
_NUMBERS = "float alpha, float scale, float softcap, bool is_causal, SymInt max_visible_span, str backend"
_TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in Tangents._fields)
_INPUTS_BATCH, _STATE_BATCH = (0, 0, 0), (0, 0, 0, 0)
_TENSORS_BATCH = tuple(None if name in ("alpha", "scale", "tile_bits") else 0 for name in OptionTensors._fields)
_TANGENTS_BATCH = tuple(None if name in ("alpha", "scale") else 0 for name in Tangents._fields)
TENSORS, NUMBERS, TANGENTS = (len(names._fields) for names in (OptionTensors, OptionNumbers, Tangents))
SUMMARY, ROUNDED = len(KeySummary._fields), len(RoundedKeys._fields)
OPTIONS = TENSORS - SUMMARY - ROUNDED  # tensors that are not of the keys' summaries: they come first
STATE = len(_STATE_BATCH)
SAVED = 4 + STATE  # query, key, value, value_mean and the state


def flattened(
    score: ScoreOptions, visibility: VisibilityArgs, summary: KeySummary | None, rounded_keys: RoundedKeys | None,
    backend: str,
) -> tuple[OptionTensors, OptionNumbers]:  # fmt: skip
    """The options in the order of the operators' arguments."""
    alpha, scale, softcap, slopes = score
    intervals, kinds, bits, is_causal, span = visibility
    learned: tuple[Any, Any] = (None, None)
    numbers: tuple[Any, Any] = (alpha, scale)
    if isinstance(alpha, Tensor):
        learned, numbers = (alpha, scale), (1.5, 1.0)
    kept: tuple[Any, ...] = *(summary or (None,) * SUMMARY), *(rounded_keys or (None,) * ROUNDED)
    tensors = OptionTensors(*learned, slopes, intervals, kinds, bits, *kept)
    return tensors, OptionNumbers(*numbers, softcap, is_causal, span, backend)


def unpack_arguments(query: Tensor, value: Tensor, tensors: tuple, numbers: tuple) -> tuple[Problem, str]:
    """The problem that an operator's arguments pose, and the name of the backend for it."""
    alphas, scales, slopes, intervals, kinds, bits = tensors[:OPTIONS]  # in the order of OptionTensors
    summary = None if tensors[OPTIONS] is None else KeySummary(*tensors[OPTIONS:-ROUNDED])
    rounded_keys = None if tensors[-ROUNDED] is None else RoundedKeys(*tensors[-ROUNDED:])
    alpha, scale, softcap, is_causal, span, backend = numbers  # in the order of OptionNumbers
    if alphas is not None:
        alpha, scale = alphas, scales
    score = ScoreOptions(alpha, scale, softcap, slopes)
    visibility = VisibilityArgs(intervals, kinds, bits, is_causal, span)
    return Problem.of(query.shape, value.shape, score, visibility, summary, rounded_keys), backend


def tile_of(backend: str, query: Tensor, value: Tensor) -> int:
    """Queries, and keys, of one tile."""
    return BACKENDS[backend].tile_size(query.dtype, max(query.shape[-1], value.shape[-1]))


@operator(f"{_INPUTS}, bool needs_backward, {_TENSORS}, {_NUMBERS}", results=6)
def attention(query: Tensor, key: Tensor, value: Tensor, needs_backward: bool, *options: Any) -> tuple[Tensor, ...]:
    problem, backend = unpack_arguments(query, value, options[:TENSORS], options[TENSORS:])
    if options[0] is not None:
        check_alphas(options[0], ADVICE)
    with as_given(query):
        return BACKENDS[backend].attention_forward(problem, query, key, value, needs_backward)


@fake("attention")
def _(query: Tensor, key: Tensor, value: Tensor, needs_backward: bool, *options: Any) -> tuple[Tensor, ...]:
    problem, backend = unpack_arguments(query, value, options[:TENSORS], options[TENSORS:])
    output = empty_stored_as(query, problem.value_size)
    row = query.new_empty(problem.batch, problem.heads, problem.query_length, dtype=row_dtype(query))
    shapes = BACKENDS[backend].reach_shapes(problem, query.dtype)
    reach = [query.new_empty(shape if needs_backward else (0,), dtype=torch.int32) for shape in shapes]
    if not needs_backward:
        return output, output.new_empty(0), row.new_empty(0), row.new_empty(0), *reach
    return output, torch.empty_like(output), row, torch.empty_like(row), *reach


@operator(
    f"Tensor grad_output, {_INPUTS}, Tensor value_mean, {_STATE}, bool needs_parameters, {_TENSORS}, {_NUMBERS}",
    results=4,
)
def attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    state, needs_parameters, options = rest[:STATE], rest[STATE], rest[STATE + 1 :]
    problem, backend = unpack_arguments(query, value, options[:TENSORS], options[TENSORS:])
    arguments: tuple[Any, ...] = grad_output, query, key, value, value_mean, *state, needs_parameters
    with as_given(query):
        return BACKENDS[backend].attention_backward(problem, *arguments)


@fake("attention_backward")
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs_parameters = rest[STATE - 1]
    grad_parameters = maximum.new_empty(3 if needs_parameters else 0, *maximum.shape[:2])
    return *(empty_stored_as(tensor, tensor.shape[-1]) for tensor in (query, key, value)), grad_parameters


@operator(f"{_INPUTS}, Tensor value_mean, {_STATE}, {_TANGENTS}, {_TENSORS}, {_NUMBERS}", results=1)
def attention_tangent(query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, *rest: Any) -> Tensor:
    state, tangents, options = rest[:STATE], rest[STATE : STATE + TANGENTS], rest[STATE + TANGENTS :]
    problem, backend = unpack_arguments(query, value, options[:TENSORS], options[TENSORS:])
    arguments: tuple[Any, ...] = query, key, value, value_mean, *state, Tangents(*tangents)
    with as_given(query):
        return BACKENDS[backend].attention_tangent(problem, *arguments)


@fake("attention_tangent")
def _(query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value_mean)


@operator(f"{_INPUTS}, {_TENSORS}, {_STATE}, {_NUMBERS}", results=4)
def attention_support(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, state, numbers = rest[:TENSORS], rest[TENSORS:-NUMBERS], rest[-NUMBERS:]
    problem, backend = unpack_arguments(query, value, tensors, numbers)
    with as_given(query):
        return BACKENDS[backend].attention_support(problem, query, key, *state)


@fake("attention_support")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    maximum = rest[TENSORS]
    tile = tile_of(rest[-1], query, value)
    query_tiles, key_tiles = (ceil_div(tensor.shape[2], tile) for tensor in (query, key))
    size = torch.empty_like(maximum, dtype=torch.int32)
    marks = query.new_empty(*query.shape[:2], query_tiles, key_tiles, dtype=torch.bool)
    return torch.empty_like(maximum), size, marks, query.new_empty(marks.shape[:3], dtype=torch.int32)


@operator("Tensor key, int value_size, str backend", results=4)
def summarise(key: Tensor, value_size: int, backend: str) -> tuple[Tensor, ...]:
    return tuple(BACKENDS[backend].summarise(key, value_size))


@fake("summarise")
def _(key: Tensor, value_size: int, backend: str) -> tuple[Tensor, ...]:
    batch, heads, length, size = key.shape
    blocks = ceil_div(length, BACKENDS[backend].tile_size(key.dtype, max(size, value_size)))
    numbers = (key.new_empty(batch, heads, blocks, dtype=torch.float32) for _ in range(3))
    return key.new_empty(batch, heads, blocks, size), *numbers


class Attention(torch.autograd.Function):
    """The derivatives of flash_entmax::attention's output by query, key, value, alpha, scale and ALiBi slopes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool, *options: Any) -> tuple:
        compute = unrecorded(attention, (query, key, value, *options[:TENSORS]))
        with below_autograd():
            results = compute(query, key, value, True, *options)
        ctx.scalars = options[TENSORS:]
        ctx.save_for_backward(query, key, value, *results[1:], *options[:TENSORS])
        ctx.save_for_forward(query, key, value, *results[1:], *options[:TENSORS])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple:
        absent = (None,) * (TENSORS + NUMBERS)
        if grad_output is None:
            return None, None, None, None, *absent
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        needed = ctx.needs_input_grad[4:7]
        compute = unrecorded(attention_backward, (grad_output, *saved))
        *gradients, parameters = compute(grad_output, *saved[:SAVED], any(needed), *saved[SAVED:], *ctx.scalars)
        if not any(needed):
            return *gradients, None, *absent
        grad_alpha, grad_scale, grad_slopes = parameters
        parameters = grad_alpha.sum(0), grad_scale.sum(0), grad_slopes
        kept = (gradient if is_needed else None for gradient, is_needed in zip(parameters, needed, strict=True))
        return *gradients, None, *kept, *absent[3:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        saved = ctx.saved_tensors
        for tensor, own in zip(saved[:3], tangents[:3], strict=True):
            if own is not None and own.dtype != tensor.dtype:
                raise TypeError(f"tangents must have the dtype of their tensors, {tensor.dtype}, got {own.dtype}")
        own_tangents = Tangents(*tangents[:3], *tangents[4:7])
        tangent = attention_tangent(*saved[:SAVED], *own_tangents, *saved[SAVED:], *ctx.scalars)
        return tangent, *(None,) * (1 + STATE)


differentiate(attention, Attention)
for derivative in (attention_backward, attention_tangent):
    refuse_second_derivative(derivative, instead="impl='reference' of the call")

batch_into(attention, (*_INPUTS_BATCH, None, *_TENSORS_BATCH), (0,) * 6)
batch_into(attention_backward, (0, *_INPUTS_BATCH, 0, *_STATE_BATCH, None, *_TENSORS_BATCH), (0, 0, 0, 1))
batch_into(attention_tangent, (*_INPUTS_BATCH, 0, *_STATE_BATCH, *_TANGENTS_BATCH, *_TENSORS_BATCH), (0,))
batch_into(attention_support, (*_INPUTS_BATCH, *_TENSORS_BATCH, *_STATE_BATCH), (0, 0, 0, 0))
batch_into(summarise, (0,), (0, 0, 0, 0))
