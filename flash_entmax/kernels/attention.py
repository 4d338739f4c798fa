"""The stages in order, on a GPU: scan, certify, solve, output; then the gradient over the tiles that were live.

Scratch is bounded: block maxima and lists exist for one chunk of heads and rows at a time, and the next chunk writes
over them. What stays for the gradient is one bit for each tile.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import WORD_BITS, Problem, ceil_div
from . import schedule
from .backward import gradient_key_value_kernel, gradient_query_kernel
from .forward import output_kernel, support_kernel
from .lists import list_kernel
from .scan import scan_kernel
from .schedule import Launch, Shape
from .tau import certify_kernel, solve_kernel
from .tile import aligned, matrix

SCRATCH = 2**25  # numbers of 4 bytes in the scratch of one chunk: 128 MiB


class Chunk(NamedTuple):
    """Some units and, of each, some tiles."""

    first_unit: int
    units: int
    first_tile: int
    tiles: int

    def run(self, kernel, launch: Launch, *arguments, **constants) -> None:
        kernel[(self.units * self.tiles,)](*arguments, **constants, **launch.options, enable_fp_fusion=True)

    def coarser(self, factor: int) -> "Chunk":
        """The same rows in tiles `factor` times as large."""
        return Chunk(self.first_unit, self.units, self.first_tile // factor, ceil_div(self.tiles, factor))


def chunks(units: int, tiles: int, numbers: int, align: int = 1) -> Iterator[Chunk]:
    """Split units x tiles so that `numbers` of scratch for each tile fit SCRATCH; tiles in multiples of `align`."""
    most = max(1, SCRATCH // max(1, numbers))
    tiles_each = tiles if tiles <= most else max(align, most // align * align)
    units_each = max(1, most // tiles_each)
    for first_unit in range(0, units, units_each):
        for first_tile in range(0, tiles, tiles_each):
            yield Chunk(
                first_unit, min(units_each, units - first_unit), first_tile, min(tiles_each, tiles - first_tile)
            )


class Call(NamedTuple):
    """What every launch of one call shares."""

    problem: Problem
    shape: Shape

    @classmethod
    def of(cls, problem: Problem, query: Tensor) -> "Call":
        return cls(problem, schedule.shape_of(problem, query.dtype))

    @property
    def units(self) -> int:
        return self.problem.batch * self.problem.heads

    @property
    def query_tiles(self) -> int:
        return ceil_div(self.problem.query_length, self.shape.TILE)

    @property
    def key_tiles(self) -> int:
        return ceil_div(self.problem.key_length, self.shape.TILE)

    @property
    def words(self) -> int:
        return ceil_div(self.key_tiles, WORD_BITS)

    @property
    def extent(self) -> tuple[int, int, int, int]:
        return self.problem.heads, self.problem.group, self.problem.query_length, self.problem.key_length

    @property
    def exponent(self) -> float:
        return 1.0 / (self.problem.alpha - 1.0)

    def new_lists(self, live: Tensor, lists: int, capacity: int) -> tuple[Tensor, Tensor]:
        return live.new_empty(lists, capacity), live.new_empty(lists, 2)

    def list_tiles(self, live: Tensor, lists: Tensor, counts: Tensor, chunk: Chunk, transposed: bool = False) -> None:
        candidates = self.query_tiles if transposed else self.key_tiles
        chunk.run(
            list_kernel, schedule.LISTS, live, lists, counts, *self.extent,
            chunk.first_unit, chunk.units, chunk.first_tile, self.words, candidates, lists.shape[1],
            TRANSPOSED=transposed, S=self.shape,
        )  # fmt: skip


def device_of(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """(output, value_mean, maximum, offset, live) of flash_entmax::attention."""
    call = Call.of(problem, query)
    output = query.new_empty(problem.batch, problem.heads, problem.query_length, problem.value_size)
    value_mean = torch.empty_like(output)
    maximum, offset = (output.new_empty(output.shape[:3], dtype=torch.float32) for _ in range(2))
    live = torch.zeros(problem.live_shape(call.shape.TILE), dtype=torch.int32, device=query.device)
    if problem.is_empty:
        return output.zero_(), value_mean.zero_(), maximum.fill_(torch.inf), offset.fill_(1.0), live
    query, key, value = aligned(query), aligned(key), aligned(value)
    with device_of(query):
        forward_stages(call, query, key, value, output, value_mean, maximum, offset, live)
    return output, value_mean, maximum, offset, live


def forward_stages(call: Call, query, key, value, output, value_mean, maximum, offset, live) -> None:
    problem, shape = call.problem, call.shape
    ratio = shape.SCAN // shape.TILE
    blocks = ceil_div(problem.key_length, shape.SCAN) * ratio
    parts = list(chunks(call.units, call.query_tiles, blocks * shape.TILE, align=ratio))
    padded_rows = ceil_div(parts[0].tiles, ratio) * shape.SCAN
    maxima = torch.empty(parts[0].units * blocks * padded_rows, dtype=torch.float32, device=query.device)
    lists, counts = call.new_lists(live, parts[0].units * parts[0].tiles, call.key_tiles)
    slack = torch.empty_like(maximum)
    key_bound = torch.linalg.vector_norm(key, torch.inf, dim=(2, 3), dtype=torch.float32)
    rounding = abs(problem.slope) * problem.head_size * 2.0**-22
    q, k, v = matrix(query), matrix(key), matrix(value)

    for chunk in parts:
        rows = ceil_div(chunk.tiles, ratio) * shape.SCAN
        scan = chunk.coarser(ratio)
        scan.run(
            scan_kernel, schedule.scan_launch(shape), q, k, key_bound, maxima, maximum, slack, rounding,
            *call.extent, scan.first_unit, scan.units, scan.first_tile, rows, blocks, S=shape,
        )  # fmt: skip
        place = chunk.first_unit, chunk.units, chunk.first_tile
        chunk.run(
            certify_kernel, schedule.CERTIFY, maxima, maximum, slack, offset, live, problem.slope,
            call.exponent, *call.extent, *place, rows, blocks, call.words, S=shape,
        )  # fmt: skip
        call.list_tiles(live, lists, counts, chunk)
        chunk.run(
            solve_kernel, schedule.solve_launch(shape), q, k, maxima, maximum, slack, offset, live, lists, counts,
            problem.slope, call.exponent, *call.extent, *place, rows, blocks, call.words, call.key_tiles, S=shape,
        )  # fmt: skip
        call.list_tiles(live, lists, counts, chunk)
        chunk.run(
            output_kernel, schedule.output_launch(shape), q, k, v, maximum, offset, lists, counts, matrix(output),
            matrix(value_mean), problem.slope, call.exponent, *call.extent, *place, call.key_tiles, S=shape,
        )  # fmt: skip


def attention_backward(
    problem: Problem, grad_output, query, key, value, value_mean, maximum, offset, live
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value) of flash_entmax::attention_backward."""
    call = Call.of(problem, query)
    if problem.is_empty:
        return tuple(tensor.new_zeros(tensor.shape) for tensor in (query, key, value))
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    delta = torch.empty_like(maximum)
    query, key, value, grad_output = aligned(query), aligned(key), aligned(value), aligned(grad_output)
    with device_of(query):
        query_stage(call, grad_output, query, key, value, value_mean, maximum, offset, live, delta, gradients[0])
        key_value_stage(call, grad_output, query, key, value, maximum, offset, live, delta, *gradients[1:])
    return gradients


def query_stage(
    call: Call, grad_output, query, key, value, value_mean, maximum, offset, live, delta, grad_query
) -> None:
    parts = list(chunks(call.units, call.query_tiles, call.key_tiles))
    lists, counts = call.new_lists(live, parts[0].units * parts[0].tiles, call.key_tiles)
    for chunk in parts:
        call.list_tiles(live, lists, counts, chunk)
        chunk.run(
            gradient_query_kernel, schedule.gradient_launch(call.shape), matrix(query), matrix(key), matrix(value),
            matrix(value_mean), matrix(grad_output), maximum, offset, delta, lists, counts, matrix(grad_query),
            call.problem.scale, call.problem.slope, call.exponent, *call.extent,
            chunk.first_unit, chunk.units, chunk.first_tile, call.key_tiles, S=call.shape,
        )  # fmt: skip


def key_value_stage(
    call: Call, grad_output, query, key, value, maximum, offset, live, delta, grad_key, grad_value
) -> None:
    group = call.problem.group
    parts = list(chunks(call.units // group, call.key_tiles, group * call.query_tiles))
    lists, counts = call.new_lists(live, parts[0].units * group * parts[0].tiles, call.query_tiles)
    for chunk in parts:
        group_chunk = Chunk(chunk.first_unit * group, chunk.units * group, chunk.first_tile, chunk.tiles)
        call.list_tiles(live, lists, counts, group_chunk, transposed=True)
        chunk.run(
            gradient_key_value_kernel, schedule.gradient_launch(call.shape), matrix(query), matrix(key), matrix(value),
            matrix(grad_output), maximum, offset, delta, lists, counts, matrix(grad_key), matrix(grad_value),
            call.problem.scale, call.problem.slope, call.exponent, *call.extent,
            chunk.first_unit, chunk.units, chunk.first_tile, call.query_tiles, S=call.shape,
        )  # fmt: skip


def support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum in units of z, support size, exact map of live tiles) of flash_entmax::attention_support."""
    call = Call.of(problem, query)
    size = torch.zeros(maximum.shape, dtype=torch.int32, device=query.device)
    marks = torch.zeros(*live.shape[:3], call.key_tiles, dtype=torch.bool, device=query.device)
    if problem.is_empty:
        return maximum.clone(), size, marks
    query, key = aligned(query), aligned(key)
    parts = list(chunks(call.units, call.query_tiles, call.key_tiles))
    lists, counts = call.new_lists(live, parts[0].units * parts[0].tiles, call.key_tiles)
    with device_of(query):
        for chunk in parts:
            call.list_tiles(live, lists, counts, chunk)
            chunk.run(
                support_kernel, schedule.solve_launch(call.shape), matrix(query), matrix(key), maximum, offset, lists,
                counts, size, marks, call.problem.slope, *call.extent,
                chunk.first_unit, chunk.units, chunk.first_tile, call.key_tiles, call.key_tiles, S=call.shape,
            )  # fmt: skip
    return maximum * problem.slope, size, marks
