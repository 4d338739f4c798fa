"""The stages in order, on a GPU: threshold and output; then the gradient over the tiles that were live.

Scratch is bounded: maxima and lists exist for one chunk of heads and rows at a time, and the next chunk writes over
them. What stays for the gradient is one bit for each tile.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Modifiers, Problem, Tangents, ceil_div, empty_stored_as
from . import schedule
from .bound import summary_kernel
from .gradient import gradient_key_value_kernel, gradient_query_kernel
from .output import output_kernel, support_kernel
from .schedule import Launch, Shape
from .tangent import Directions, tangent_kernel
from .threshold import threshold_kernel
from .tile import Matrix, aligned, aligned_size, device_of, matrix, trimmed
from .visibility import View, bounds_kernel

MAXIMA = 7 * 2**24  # maxima of 2 bytes in the scratch of one chunk: 224 MiB
LISTED = 2**24  # listed tiles of 4 bytes in the scratch of one chunk: 64 MiB


class Chunk(NamedTuple):
    """Some units and, of each, some tiles, whose lists have `capacity` places each."""

    first_unit: int
    units: int
    first_tile: int
    tiles: int
    capacity: int

    @property
    def places(self) -> int:
        return self.units * self.tiles * self.capacity

    def run(self, kernel, launch: Launch, *arguments, **constants) -> None:
        kernel[(self.units * self.tiles,)](*arguments, **constants, **launch.options, enable_fp_fusion=True)


def chunks(units: int, tiles: int, capacity: int, limit: int, later: int | None = None) -> list[Chunk]:
    """Split units x tiles so that no chunk has more than `limit` places; whole units side by side while they fit.

    Tile t sees at most t + 1 + later of the `capacity` tiles on the other side; without `later`, any of them.
    """
    if tiles * capacity <= limit:
        parts = ceil_div(units, limit // max(1, tiles * capacity))
        each = ceil_div(units, parts)
        return [Chunk(unit, min(each, units - unit), 0, tiles, capacity) for unit in range(0, units, each)]
    result = []
    for unit in range(units):
        last = tiles
        while last > 0:  # from the end, where the lists are longest
            seen = capacity if later is None else min(capacity, max(1, last + later))
            count = min(last, max(1, limit // seen))
            result.append(Chunk(unit, 1, last - count, count, seen))
            last -= count
    return result


class Numbers(NamedTuple):
    """Scalars of the whole call, or tensors (heads,)."""

    scale: float | Tensor
    slope: float | Tensor
    exponent: float | Tensor


class Call(NamedTuple):
    """What every launch of one call shares."""

    problem: Problem
    shape: Shape
    view: View
    numbers: Numbers
    units: int
    query_tiles: int
    key_tiles: int
    words: int
    extent: tuple[int, int, int, int]

    @classmethod
    def of(cls, problem: Problem, modifiers: Modifiers, query: Tensor) -> "Call":
        shape = schedule.shape_of(problem, modifiers, query.dtype)
        key_tiles = ceil_div(problem.key_length, shape.TILE)
        alpha, scale = problem.alpha, problem.scale
        if modifiers.alpha is not None:
            alpha, scale = modifiers.alpha, modifiers.scale
        call = cls(
            problem,
            shape,
            View(
                modifiers.intervals,
                kinds=modifiers.kinds,
                bits=modifiers.bits,
                tilts=None if modifiers.slopes is None else (modifiers.slopes / scale).contiguous(),
                cap=problem.softcap / scale if problem.softcap else None,
            ),
            Numbers(scale, (alpha - 1.0) * scale, 1.0 / (alpha - 1.0)),
            units=problem.batch * problem.heads,
            query_tiles=ceil_div(problem.query_length, shape.TILE),
            key_tiles=key_tiles,
            words=problem.live_words(shape.TILE),
            extent=(problem.heads, problem.group, problem.query_length, problem.key_length),
        )
        return call if modifiers.intervals is None or problem.is_empty else call.bounded()

    def bounded(self) -> "Call":
        """With the bounds of the intervals of each tile of queries."""
        bounds = self.view.intervals.new_empty(self.problem.batch, self.query_tiles, 4)
        every = Chunk(0, self.problem.batch, 0, self.query_tiles, capacity=0)
        sizes = self.problem.query_length, self.list_size
        every.run(bounds_kernel, schedule.SUMMARY, self.view.intervals, bounds, *sizes, S=self.shape)
        return self._replace(view=self.view._replace(bounds=bounds))

    @property
    def list_size(self) -> int:
        """The most tiles of keys that a tile of queries may list: so many hold problem.reach keys in a row."""
        return min(self.key_tiles, self.problem.reach // self.shape.TILE + 2)

    def query_chunks(self, limit: int) -> list[Chunk]:
        """Chunks of tiles of queries, with lists of tiles of keys."""
        later = None
        if self.shape.CAUSAL:
            later = ceil_div(self.problem.key_length - self.problem.query_length, self.shape.TILE)
        return chunks(self.units, self.query_tiles, self.list_size, limit, later)


def new_lists(parts: list[Chunk], device: torch.device) -> Tensor:
    """Places for the lists of the largest chunk."""
    return torch.empty(max(chunk.places for chunk in parts), dtype=torch.int32, device=device)


def attention(problem: Problem, modifiers: Modifiers, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """(output, value_mean, maximum, offset, live) of flash_entmax::attention."""
    output = empty_stored_as(query, aligned_size(problem.value_size))
    value_mean = torch.empty_like(output)
    maximum, offset = (query.new_empty(output.shape[:3], dtype=torch.float32) for _ in range(2))
    live = query.new_empty(problem.live_shape(schedule.tile_size(query.dtype, problem.widest)), dtype=torch.int32)
    if problem.is_empty:
        output.zero_(), value_mean.zero_(), maximum.fill_(torch.inf), offset.fill_(1.0), live.zero_()
    else:
        with device_of(query):
            call = Call.of(problem, modifiers, query)
            results = matrix(output), matrix(value_mean), maximum, offset, live
            forward_stages(call, aligned(query), aligned(key), aligned(value), *results)
    return trimmed(output, problem.value_size), trimmed(value_mean, problem.value_size), maximum, offset, live


def forward_stages(
    call: Call, query: Matrix, key: Matrix, value: Matrix, output: Matrix, value_mean: Matrix, maximum, offset, live
) -> None:
    shape, (_, *numbers) = call.shape, call.numbers
    parts = call.query_chunks(MAXIMA // shape.TILE)
    lists = new_lists(parts, live.device)
    sublists = torch.empty_like(lists)
    maxima = torch.empty(len(lists) * shape.TILE, dtype=torch.float16, device=live.device)
    counts = lists.new_empty(max(chunk.units * chunk.tiles for chunk in parts), 2)
    summary = summarise(call, key)
    for chunk in parts:
        sizes = *call.extent, chunk.first_unit, chunk.units, chunk.first_tile
        chunk.run(
            threshold_kernel, schedule.threshold_launch(shape), query, key, *summary, maxima, maximum, offset, live,
            lists, sublists, counts, call.view, *numbers, *sizes, call.words, chunk.capacity, S=shape,
        )  # fmt: skip
        chunk.run(
            output_kernel, schedule.output_launch(shape), query, key, value, maximum, offset, lists, counts, output,
            value_mean, call.view, *numbers, *sizes, chunk.capacity, S=shape,
        )  # fmt: skip


def summarise(call: Call, key: Matrix) -> tuple[Matrix, Tensor, Tensor, Tensor]:
    """(centre, radius, error, largest component) of each block of keys."""
    batch, key_heads, _, size = key.data.shape
    centre = matrix(key.data.new_empty(batch, key_heads, call.key_tiles, size))
    blocks = batch * key_heads * call.key_tiles
    # Each of the three starts at a multiple of 16 bytes, or Triton would compile for another alignment.
    numbers = key.data.new_empty(3, ceil_div(blocks, 4) * 4, dtype=torch.float32).unbind()
    whole = Chunk(0, batch * key_heads, 0, call.key_tiles, capacity=0)
    whole.run(summary_kernel, schedule.SUMMARY, key, centre, *numbers, *call.extent, S=call.shape)
    return centre, *numbers


def attention_backward(
    problem: Problem, modifiers: Modifiers, grad_output, query, key, value, value_mean, maximum, offset, live,
    parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_parameters) of flash_entmax::attention_backward."""
    if problem.is_empty:
        nothing = maximum.new_zeros(3 if parameters else 0, problem.batch, problem.heads)
        return *(empty_stored_as(tensor, tensor.shape[-1]).zero_() for tensor in (query, key, value)), nothing
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    with device_of(query):
        call = Call.of(problem, modifiers, query)
        packed = maximum.new_empty(call.units * call.query_tiles * call.shape.TILE * 4)
        tensors = aligned(query), aligned(key), aligned(value), aligned(grad_output)
        may_be_blind = modifiers.intervals is not None or modifiers.kinds is not None or problem.diagonal < 0
        selected = matrix(torch.empty_like(tensors[3].data)) if may_be_blind else None
        gradients = [matrix(empty_stored_as(tensor, aligned_size(tensor.shape[-1]))) for tensor in (query, key, value)]
        shares = maximum.new_empty(problem.batch, problem.heads, call.query_tiles, 3) if parameters else None
        rows = maximum, offset, packed, live
        query_stage(call, *tensors, selected, aligned(value_mean), *rows, gradients[0], shares)
        key_value_stage(call, *tensors[:3], selected or tensors[3], packed, live, *gradients[1:])
    gradients = (trimmed(gradient.data, size) for gradient, size in zip(gradients, sizes, strict=True))
    if not parameters:
        return *gradients, maximum.new_empty(0, problem.batch, problem.heads)
    return *gradients, shares.sum(2).permute(2, 0, 1).contiguous()


def query_stage(
    call: Call, query, key, value, grad_output, selected, value_mean, maximum, offset, packed, live, grad_query,
    shares,
) -> None:  # fmt: skip
    parts = call.query_chunks(LISTED)
    lists = new_lists(parts, live.device)
    shape = call.shape if shares is None else replace(call.shape, PARAMETERS=True)
    for chunk in parts:
        chunk.run(
            gradient_query_kernel, schedule.gradient_launch(shape), query, key, value, value_mean, grad_output,
            selected, maximum, offset, packed, live, lists, grad_query, shares, call.view, *call.numbers, *call.extent,
            chunk.first_unit, chunk.units, chunk.first_tile, call.words, chunk.capacity, S=shape,
        )  # fmt: skip


def key_value_stage(call: Call, query, key, value, grad_output, packed, live, grad_key, grad_value) -> None:
    parts = chunks(call.units // call.problem.group, call.key_tiles, call.query_tiles, LISTED)
    lists = new_lists(parts, live.device)
    for chunk in parts:
        chunk.run(
            gradient_key_value_kernel, schedule.gradient_launch(call.shape), query, key, value, grad_output, packed,
            live, lists, grad_key, grad_value, call.view, *call.numbers, *call.extent,
            chunk.first_unit, chunk.units, chunk.first_tile, call.words, chunk.capacity, S=call.shape,
        )  # fmt: skip


def attention_tangent(
    problem: Problem, modifiers: Modifiers, query, key, value, value_mean, maximum, offset, live, tangents: Tangents
) -> Tensor:
    """The output's derivative along the tangents, of flash_entmax::attention_tangent."""
    result = empty_stored_as(query, aligned_size(problem.value_size))
    if problem.is_empty:
        return trimmed(result.zero_(), problem.value_size)
    with device_of(query):
        call = Call.of(problem, modifiers, query)
        parts = call.query_chunks(LISTED)
        lists = new_lists(parts, live.device)
        directions = directions_of(tangents, (query, key, value), maximum)
        shape = replace(call.shape, PARAMETERS=directions.alpha is not None)
        tensors = aligned(query), aligned(key), aligned(value)
        for chunk in parts:
            chunk.run(
                tangent_kernel, schedule.tangent_launch(shape), *tensors, directions, maximum, offset, live, lists,
                matrix(result), call.view, *call.numbers, *call.extent, chunk.first_unit, chunk.units,
                chunk.first_tile, call.words, chunk.capacity, S=shape,
            )  # fmt: skip
    return trimmed(result, problem.value_size)


def directions_of(tangents: Tangents, tensors: tuple[Tensor, ...], maximum: Tensor) -> Directions:
    """With zeros where there is no tangent; no parameters where none of them has one."""
    batch, heads, _ = maximum.shape
    like = *tensors, *(maximum.new_empty(shape) for shape in ((heads,), (heads,), (batch, heads)))
    given = [torch.zeros_like(other) if own is None else own for own, other in zip(tangents, like, strict=True)]
    parameters = tuple(tensor.to(maximum.dtype).contiguous() for tensor in given[3:])
    has_parameters = any(tangent is not None for tangent in tangents[3:])
    return Directions(*map(aligned, given[:3]), *(parameters if has_parameters else (None, None, None)))


def support(
    problem: Problem, modifiers: Modifiers, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum in units of z, support size, exact map of live tiles) of flash_entmax::attention_support."""
    size = torch.zeros(maximum.shape, dtype=torch.int32, device=query.device)
    tile = schedule.tile_size(query.dtype, problem.widest)
    grid = (ceil_div(length, tile) for length in (problem.query_length, problem.key_length))
    marks = torch.zeros(problem.batch, problem.heads, *grid, dtype=torch.bool, device=query.device)
    if problem.is_empty:
        return maximum.clone(), size, marks
    with device_of(query):
        call = Call.of(problem, modifiers, query)
        parts = call.query_chunks(LISTED)
        lists = new_lists(parts, query.device)
        tensors = aligned(query), aligned(key)
        for chunk in parts:
            chunk.run(
                support_kernel, schedule.threshold_launch(call.shape), *tensors, maximum, offset, live, lists, size,
                marks, call.view, call.numbers.slope, *call.extent, chunk.first_unit, chunk.units, chunk.first_tile,
                call.words, chunk.capacity, S=call.shape,
            )  # fmt: skip
    slope = call.numbers.slope
    return maximum * (slope.view(-1, 1) if isinstance(slope, Tensor) else slope), size, marks
