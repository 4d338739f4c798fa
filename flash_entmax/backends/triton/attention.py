"""The stages in order, on a GPU: threshold and output; then the gradient over the tiles that were live.

Scratch is bounded. Maxima and lists exist for one chunk of heads and rows at a time, and the next chunk writes over
them. What stays for the gradient is one bit for each tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Problem, Tangents
from ...core.tensors import aligned_size, ceil_div, empty_stored_as
from . import schedule
from .bound import Summary, summary_kernel
from .gradient import gradient_key_value_kernel, gradient_query_kernel
from .launch import launch
from .output import output_kernel, support_kernel
from .queries import KernelScoreOptions
from .schedule import Config, Launch
from .tangent import Directions, tangent_kernel
from .threshold import threshold_kernel
from .tile import Matrix, aligned, device_of, matrix, trimmed
from .visibility import KernelVisibility, bounds_kernel

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


def chunks(units: int, tiles: int, capacity: int, limit: int, later: int | None = None) -> list[Chunk]:
    """Split units x tiles so that no chunk has more than `limit` places. Whole units stay together while they fit.

    Tile t sees at most t + 1 + later of the `capacity` tiles on the other side; without `later`, any of them.
    """
    if tiles * capacity <= limit:
        parts = ceil_div(units, limit // max(1, tiles * capacity))
        size = ceil_div(units, parts)
        return [Chunk(unit, min(size, units - unit), 0, tiles, capacity) for unit in range(0, units, size)]
    result = []
    for unit in range(units):
        last = tiles
        while last > 0:  # from the end, where the lists are longest
            seen = capacity if later is None else min(capacity, max(1, last + later))
            count = min(last, max(1, limit // seen))
            result.append(Chunk(unit, 1, last - count, count, seen))
            last -= count
    return result


class Launches(NamedTuple):
    """What all launches of one call share."""

    problem: Problem
    config: Config
    options: KernelScoreOptions
    visibility: KernelVisibility
    units: int
    query_tiles: int
    key_tiles: int
    words: int

    @classmethod
    def of(
        cls, problem: Problem, query: Tensor, needs_backward: bool = True, needs_parameters: bool = False
    ) -> "Launches":
        config = schedule.config_of(problem, query.dtype, needs_backward, needs_parameters)
        alpha, scale, softcap, slopes = problem.score
        launches = cls(
            problem,
            config,
            KernelScoreOptions(
                scale,
                (alpha - 1.0) * scale,
                1.0 / (alpha - 1.0),
                softcap / scale if softcap else None,
                None if slopes is None else (slopes / scale).contiguous(),
            ),
            KernelVisibility(),
            units=problem.batch * problem.heads,
            query_tiles=ceil_div(problem.query_length, config.TILE),
            key_tiles=ceil_div(problem.key_length, config.TILE),
            words=problem.live_words(config.TILE),
        )
        return launches if problem.is_empty else launches.masked()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernels' Sizes."""
        problem = self.problem
        return problem.heads, problem.group, problem.query_length, problem.key_length

    @property
    def list_size(self) -> int:
        """The most tiles of keys that a tile of queries may list."""
        return min(self.key_tiles, self.problem.visibility.max_visible_span // self.config.TILE + 2)

    def masked(self) -> "Launches":
        """With the problem's masks, and the bounds of the intervals of each tile of queries."""
        intervals, kinds, bits, *_ = self.problem.visibility
        visibility, batch = self.visibility, self.problem.batch
        if kinds is not None:
            visibility = visibility._replace(tile_kinds=kinds, tile_bits=bits)
        if intervals is not None:
            bounds = intervals.new_empty(batch, self.query_tiles, 4)
            visibility = visibility._replace(intervals=intervals, bounds=bounds)
            numbers = intervals, bounds, self.problem.query_length, self.list_size
            launch(bounds_kernel, batch * self.query_tiles, schedule.SUMMARY, self.config, *numbers)
        return self._replace(visibility=visibility)

    def query_chunks(self, limit: int) -> list[Chunk]:
        """Chunks of tiles of queries, with lists of tiles of keys."""
        later = None
        if self.config.CAUSAL:
            later = ceil_div(self.problem.key_length - self.problem.query_length, self.config.TILE)
        return chunks(self.units, self.query_tiles, self.list_size, limit, later)

    def key_chunks(self, limit: int) -> list[Chunk]:
        """Chunks of tiles of keys, with lists of tiles of queries."""
        return chunks(self.units // self.problem.group, self.key_tiles, self.query_tiles, limit)

    def run(self, kernel, chunk: Chunk, setting: Launch, *arguments, words: bool = True) -> None:
        """Launch a kernel with one program for each tile of the chunk; `words` if it reads or writes the live map."""
        place = chunk.first_unit, chunk.units, chunk.first_tile, *((self.words,) if words else ()), chunk.capacity
        programs = chunk.units * chunk.tiles
        launch(kernel, programs, setting, self.config, *arguments, self.options, self.visibility, *self.sizes, *place)


def new_lists(parts: list[Chunk], device: torch.device) -> Tensor:
    """Places for the lists of the largest chunk."""
    return torch.empty(max(chunk.places for chunk in parts), dtype=torch.int32, device=device)


def attention_forward(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
) -> tuple[Tensor, ...]:
    """(output, value_mean, maximum, offset, live); see backends.Backend."""
    output = empty_stored_as(query, aligned_size(problem.value_size))
    value_mean = torch.empty_like(output) if needs_backward else output.new_empty(0)
    maximum, offset = (query.new_empty(output.shape[:3], dtype=torch.float32) for _ in range(2))
    live_shape = problem.live_shape(schedule.tile_size(query.dtype, problem.widest)) if needs_backward else (0,)
    live = query.new_empty(live_shape, dtype=torch.int32)
    if problem.is_empty:
        for tensor, number in ((output, 0), (value_mean, 0), (maximum, torch.inf), (offset, 1), (live, 0)):
            tensor.fill_(number)
    else:
        with device_of(query):
            launches = Launches.of(problem, query, needs_backward)
            results = matrix(output), matrix(value_mean) if needs_backward else None, maximum, offset, live
            forward_stages(launches, aligned(query), aligned(key), aligned(value), *results)
    output = trimmed(output, problem.value_size)
    if not needs_backward:
        return output, value_mean, maximum.new_empty(0), offset.new_empty(0), live
    return output, trimmed(value_mean, problem.value_size), maximum, offset, live


def forward_stages(
    launches: Launches, query: Matrix, key: Matrix, value: Matrix, output: Matrix, value_mean: Matrix | None,
    maximum: Tensor, offset: Tensor, live: Tensor,
) -> None:  # fmt: skip
    config = launches.config
    parts = launches.query_chunks(MAXIMA // config.TILE)
    lists = new_lists(parts, live.device)
    sublists = torch.empty_like(lists)
    maxima = torch.empty(len(lists) * config.TILE, dtype=torch.float16, device=live.device)
    counts = lists.new_empty(max(chunk.units * chunk.tiles for chunk in parts), 2)
    summary = summarise(launches, key)
    for chunk in parts:
        launches.run(
            threshold_kernel, chunk, schedule.threshold_launch(config), query, key, summary, maxima, maximum, offset,
            live, lists, sublists, counts,
        )  # fmt: skip
        launches.run(
            output_kernel, chunk, schedule.output_launch(config), query, key, value, maximum, offset, lists, counts,
            output, value_mean, words=False,
        )  # fmt: skip


def summarise(launches: Launches, key: Matrix) -> Summary:
    """The summary of each block of keys."""
    batch, key_heads, _, size = key.data.shape
    centre = matrix(key.data.new_empty(batch, key_heads, launches.key_tiles, size))
    blocks = batch * key_heads * launches.key_tiles
    # Each of the three starts at a multiple of 16 bytes, or Triton would compile for another alignment.
    numbers = key.data.new_empty(3, ceil_div(blocks, 4) * 4, dtype=torch.float32).unbind()
    summary = Summary(centre, *numbers)
    launch(summary_kernel, blocks, schedule.SUMMARY, launches.config, key, summary, *launches.sizes)
    return summary


def attention_backward(
    problem: Problem, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor,
    maximum: Tensor, offset: Tensor, live: Tensor, needs_parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_parameters); see backends.Backend."""
    if problem.is_empty:
        nothing = maximum.new_zeros(3 if needs_parameters else 0, problem.batch, problem.heads)
        return *(empty_stored_as(tensor, tensor.shape[-1]).zero_() for tensor in (query, key, value)), nothing
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    with device_of(query):
        launches = Launches.of(problem, query, needs_parameters=needs_parameters)
        pairs = maximum.new_empty(launches.units * launches.query_tiles * launches.config.TILE * 4)
        tensors = aligned(query), aligned(key), aligned(value), aligned(grad_output)
        selected = matrix(torch.empty_like(tensors[3].data)) if problem.may_hide_all_keys else None
        gradients = [matrix(empty_stored_as(tensor, aligned_size(tensor.shape[-1]))) for tensor in (query, key, value)]
        shares = None
        if needs_parameters:
            shares = maximum.new_empty(problem.batch, problem.heads, launches.query_tiles, 3)
        query, key, value, grad_output = tensors
        mean = aligned(value_mean)
        query_stage(
            launches, query, key, value, mean, grad_output, selected, maximum, offset, pairs, live, gradients[0], shares
        )
        key_value_stage(launches, query, key, value, selected or grad_output, pairs, live, *gradients[1:])
    gradients = (trimmed(gradient.data, size) for gradient, size in zip(gradients, sizes, strict=True))
    if not needs_parameters:
        return *gradients, maximum.new_empty(0, problem.batch, problem.heads)
    return *gradients, shares.sum(2).permute(2, 0, 1).contiguous()


def query_stage(
    launches: Launches, query: Matrix, key: Matrix, value: Matrix, value_mean: Matrix, grad_output: Matrix,
    selected: Matrix | None, maximum: Tensor, offset: Tensor, pairs: Tensor, live: Tensor, grad_query: Matrix,
    shares: Tensor | None,
) -> None:  # fmt: skip
    """dQ, the pairs of numbers of each query, and the parameters' gradients by tile of queries."""
    parts = launches.query_chunks(LISTED)
    lists = new_lists(parts, live.device)
    for chunk in parts:
        launches.run(
            gradient_query_kernel, chunk, schedule.gradient_launch(launches.config), query, key, value, value_mean,
            grad_output, selected, maximum, offset, pairs, live, lists, grad_query, shares,
        )  # fmt: skip


def key_value_stage(
    launches: Launches, query: Matrix, key: Matrix, value: Matrix, grad_output: Matrix, pairs: Tensor, live: Tensor,
    grad_key: Matrix, grad_value: Matrix,
) -> None:  # fmt: skip
    """dK and dV."""
    parts = launches.key_chunks(LISTED)
    lists = new_lists(parts, live.device)
    for chunk in parts:
        launches.run(
            gradient_key_value_kernel, chunk, schedule.gradient_launch(launches.config), query, key, value,
            grad_output, pairs, live, lists, grad_key, grad_value,
        )  # fmt: skip


def attention_tangent(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor, offset: Tensor,
    live: Tensor, tangents: Tangents,
) -> Tensor:  # fmt: skip
    """The output's derivative along the tangents."""
    result = empty_stored_as(query, aligned_size(problem.value_size))
    if problem.is_empty:
        return trimmed(result.zero_(), problem.value_size)
    with device_of(query):
        directions = directions_of(tangents, (query, key, value), maximum)
        launches = Launches.of(problem, query, needs_parameters=directions.alpha is not None)
        parts = launches.query_chunks(LISTED)
        lists = new_lists(parts, live.device)
        tensors = aligned(query), aligned(key), aligned(value)
        for chunk in parts:
            launches.run(
                tangent_kernel, chunk, schedule.tangent_launch(launches.config), *tensors, directions, maximum, offset,
                live, lists, matrix(result),
            )  # fmt: skip
    return trimmed(result, problem.value_size)


def directions_of(tangents: Tangents, tensors: tuple[Tensor, ...], maximum: Tensor) -> Directions:
    """Zeros where a tensor has no tangent; no parameters where none of them has one."""
    batch, heads, _ = maximum.shape
    like = *tensors, *(maximum.new_empty(shape) for shape in ((heads,), (heads,), (batch, heads)))
    given = [torch.zeros_like(other) if own is None else own for own, other in zip(tangents, like, strict=True)]
    parameters = tuple(tensor.to(maximum.dtype).contiguous() for tensor in given[3:])
    has_parameters = any(tangent is not None for tangent in tangents[3:])
    return Directions(*map(aligned, given[:3]), *(parameters if has_parameters else (None, None, None)))


def attention_support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum in units of z, support size, exact map of live tiles)."""
    size = torch.zeros(maximum.shape, dtype=torch.int32, device=query.device)
    tile = schedule.tile_size(query.dtype, problem.widest)
    grid = (ceil_div(length, tile) for length in (problem.query_length, problem.key_length))
    marks = torch.zeros(problem.batch, problem.heads, *grid, dtype=torch.bool, device=query.device)
    if problem.is_empty:
        return maximum.clone(), size, marks
    with device_of(query):
        launches = Launches.of(problem, query)
        parts = launches.query_chunks(LISTED)
        lists = new_lists(parts, query.device)
        tensors = aligned(query), aligned(key)
        for chunk in parts:
            launches.run(
                support_kernel, chunk, schedule.threshold_launch(launches.config), *tensors, maximum, offset, live,
                lists, size, marks,
            )  # fmt: skip
    z_scale = problem.z_scale
    return maximum * (z_scale.view(-1, 1) if isinstance(z_scale, Tensor) else z_scale), size, marks
