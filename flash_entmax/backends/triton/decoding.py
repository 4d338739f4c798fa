"""The launches of a call without gradients that has few queries: see decode.py, and decode_summaries.py."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.call import Problem
from ...core.intervals import FURTHEST
from ...core.pages import Pages
from ...core.tensors import aligned_size, ceil_div, empty_stored_as
from . import schedule
from .call_launches import CallLaunches, OpenedKernels
from .decode import PART, decode_parts_kernel, decode_scores_kernel, decode_solve_kernel
from .decode_blocks import KernelBlocks, block_bounds_kernel
from .decode_summaries import KernelRoundedKeys, rounded_scores_kernel, rounded_solve_kernel
from .launch import can_overlap
from .pages import kernel_pages
from .plan import Chunk, splits_of
from .tile import aligned, matrix, trimmed

DECODE = decode_scores_kernel, decode_solve_kernel, decode_parts_kernel
DECODE_ROUNDED = rounded_scores_kernel, rounded_solve_kernel, decode_parts_kernel
NO_PAGES = None, None, None  # table_stride, left and tokens


def decoded(problem: Problem, *inputs: Tensor) -> Tensor:
    """The output, from query, key and value."""
    output = empty_stored_as(inputs[0], aligned_size(problem.value_size))
    if problem.is_empty:
        output.zero_()
    elif problem.rounded_keys is not None:
        decode_rounded(problem, inputs, output)
    else:
        decode(problem, inputs, output)
    return trimmed(output, problem.value_size)


def decoded_in_pages(problem: Problem, pages: Pages, *inputs: Tensor) -> Tensor:
    """The output, from query and aligned caches (pages, key heads, page size, dim)."""
    score = problem.score
    if score.alibi_slopes is not None:  # packed queries have one row of them
        score = score._replace(alibi_slopes=score.alibi_slopes.expand(problem.batch, -1))
        problem = replace(problem, score=score)
    output = empty_stored_as(inputs[0], aligned_size(problem.value_size))
    if pages.cu_seq_q is not None or problem.is_empty:
        output.zero_()  # tokens of no row
    if not problem.is_empty:
        decode(problem, inputs, output, pages)
    return trimmed(output, problem.value_size)


def launches_of(problem: Problem, query: Tensor, pages: Pages | None = None) -> CallLaunches:
    overlaps = can_overlap(query.device)
    return CallLaunches.of(problem, query.dtype, False, decodes=True, overlaps=overlaps, pages=pages)


def decode(problem: Problem, inputs: tuple[Tensor, ...], output: Tensor, pages: Pages | None = None) -> None:
    """Write the output."""
    launches, tensors, paging = launches_of(problem, output, pages), None, NO_PAGES
    plan, device = launches.plan, output.device
    if pages is not None:
        tensors, left = kernel_pages(pages), pages.left if pages.has_window else FURTHEST
        paging = tensors.block_table.stride(0), left, inputs[0].shape[2]
    arguments = *map(aligned, inputs), matrix(output), tensors
    opened, arguments, scratch = launches.open(DECODE, arguments, plan.decode_scratch, device)
    launch_decode(opened, arguments, scratch, paging, device)


def launch_decode(
    opened: OpenedKernels, arguments: Sequence, scratch: Sequence, paging: tuple, device: torch.device
) -> None:
    query, key, value, output, tensors = arguments
    scores, support, largest, live_tiles, bounds, counts, finished, parts, second, largest_key = scratch
    for chunk in opened.plan.decode_chunks:
        numbers, programs, tiles = numbers_of(opened, chunk)
        splits = splits_of(tiles, opened.plan.key_tiles, schedule.scoring_programs(opened.plan.config), device)
        opened.launch(
            decode_scores_kernel, tiles * splits, schedule.decode_scores_settings, query, key, scores, largest,
            second, largest_key, bounds, opened.options, opened.visibility, tensors, *numbers, *paging, splits,
        )  # fmt: skip
        opened.launch(
            decode_solve_kernel, programs, schedule.decode_row_settings, value, scores, largest, second,
            largest_key, bounds, live_tiles, support, counts, finished, output, opened.options, tensors, *numbers,
            *paging,
        )  # fmt: skip
        launch_parts(opened, chunk, device, value, scores, support, counts, finished, parts, output, tensors, paging)


def decode_rounded(problem: Problem, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Write the output, by keys in 8 bits."""
    launches, device = launches_of(problem, output), output.device
    plan, given, blocks = launches.plan, problem.rounded_keys, None
    kernels, layout, capacity = DECODE_ROUNDED, plan.rounded_scratch, given.rounded.shape[2]
    if given.centre is not None:
        kernels, layout = (block_bounds_kernel, *kernels), plan.block_scratch
        blocks = KernelBlocks(matrix(given.centre), given.radius, given.centre_error)
    rounded_keys = KernelRoundedKeys(matrix(given.rounded), given.unit, given.error)
    arguments = *map(aligned, inputs), matrix(output), rounded_keys, blocks
    opened, arguments, scratch = launches.open(kernels, arguments, layout, device)
    query, key, value, output, rounded_keys, blocks = arguments
    scores, support, maxima, live_tiles, bounds, counts, finished, parts, lowest, *least = scratch
    least = least[0] if least else None
    for chunk in plan.decode_chunks:
        numbers, programs, tiles = numbers_of(opened, chunk)
        scoring, scorers = schedule.rounded_scores_settings, schedule.rounded_scoring_programs(plan.config)
        if blocks is not None:
            scoring, scorers = schedule.listed_scores_settings, schedule.LISTED_SCORING_PROGRAMS
        splits = splits_of(tiles, plan.key_tiles, scorers, device)
        split_numbers = *numbers[:4], capacity, *numbers[4:], splits
        if blocks is not None:
            opened.launch(
                block_bounds_kernel, tiles * splits, schedule.block_bounds_settings, query, blocks, maxima, least,
                bounds, opened.options, opened.visibility, *split_numbers,
            )  # fmt: skip
        opened.launch(
            rounded_scores_kernel, tiles * splits, scoring, query, rounded_keys, least, live_tiles, scores, maxima,
            lowest, bounds, opened.options, opened.visibility, *split_numbers,
        )  # fmt: skip
        opened.launch(
            rounded_solve_kernel, programs, schedule.decode_row_settings, query, key, value, scores, maxima, lowest,
            bounds, live_tiles, support, counts, finished, output, opened.options, opened.visibility, *numbers,
        )  # fmt: skip
        launch_parts(opened, chunk, device, value, scores, support, counts, finished, parts, output, None, NO_PAGES)


def numbers_of(opened: OpenedKernels, chunk: Chunk) -> tuple[tuple, int, int]:
    """(numbers that all kernels take, rows, tiles of rows) of a chunk of rows; see plan.decode_chunks."""
    first_unit, units, first_row, rows, line = chunk
    numbers = *opened.plan.sizes, first_unit, first_row, rows, line
    return numbers, units * rows, units * ceil_div(rows, opened.plan.config.ROWS)


def launch_parts(opened: OpenedKernels, chunk: Chunk, device, *arguments) -> None:
    *arguments, paging = arguments
    numbers, programs, _ = numbers_of(opened, chunk)
    splits = splits_of(programs, ceil_div(chunk.capacity, PART.value), schedule.DECODE_PARTS_PROGRAMS, device)
    opened.launch(
        decode_parts_kernel, programs * splits, schedule.decode_row_settings, *arguments, *numbers, *paging, splits
    )
