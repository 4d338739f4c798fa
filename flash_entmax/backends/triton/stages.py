"""The order of the launches of a call by tiles: threshold and output; then the gradient over what they have listed.

What launches them, and what stands for tensors, is the caller's: tensors, addresses, or places in notes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.call import KeySummary
from . import schedule
from .bound import KernelKeySummary, summary_kernel
from .call_launches import CallLaunches, OpenedKernels
from .certify import certify_kernel
from .gradient import gradient_key_value_kernel, gradient_query_kernel
from .mark import mark_kernel
from .output import output_kernel
from .plan import Plan
from .query_lists import list_queries_kernel, reaching_kernel
from .scan import scan_kernel
from .share import add_parts_kernel, share_kernel
from .solve import solve_kernel
from .tile import Matrix, aligned, matrix

FORWARD = scan_kernel, certify_kernel, solve_kernel, output_kernel
MARK = list_queries_kernel, mark_kernel
BACKWARD = gradient_query_kernel, list_queries_kernel, gradient_key_value_kernel
SHARE = share_kernel, add_parts_kernel


def forward_stages(
    launches: CallLaunches, given: KeySummary | None, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]
) -> None:
    """Write the results. Records and words are 0 before. Without a summary of the keys, one is made."""
    plan, device = launches.plan, inputs[0].device
    *results, words = results
    if not plan.are_words_kept:
        words = inputs[0].new_zeros(plan.chunk_words, dtype=torch.int32)
    kernels, arguments = forward_kernels(plan, given), forward_arguments(plan, given, inputs, (*results, words))
    opened, arguments, scratch = launches.open(kernels, arguments, plan.forward_scratch, device)
    launch_forward(opened, arguments, scratch)


def forward_kernels(plan: Plan, given: KeySummary | None) -> tuple:
    kernels = FORWARD + MARK if plan.is_marked else FORWARD
    return (summary_kernel, *kernels) if given is None else kernels


def forward_arguments(
    plan: Plan, given: KeySummary | None, inputs: tuple[Tensor, ...], results: tuple[Tensor | None, ...]
) -> tuple:
    """Inputs, the summary that is given, and the results. Only for a backward are all of these given, or read."""
    output, value_mean, maximum, offset, reached_keys, words = results
    kept = (matrix(value_mean), maximum, offset, reached_keys) if plan.outline.needs_backward else (None,) * 4
    summary = None
    if given is not None:
        centre, *numbers = given
        summary = KernelKeySummary(aligned(centre), *(number.contiguous() for number in numbers))
    return *map(aligned, inputs), summary, matrix(output), *kept, words


def launch_forward(opened: OpenedKernels, arguments: Sequence, scratch: Sequence) -> None:
    """`arguments` are those of `forward_arguments`."""
    plan = opened.plan
    query, key, value, summary, output, value_mean, maximum, offset, reached_keys, words = arguments
    lists, sublists, maxima, flags, query_lists, counts, *scratch = scratch
    bound_gap, score_error, margin, lowest, *own_summary, own_maximum, own_offset, own_records = scratch
    if maximum is None:
        maximum, offset, reached_keys = own_maximum, own_offset, own_records
    if summary is None:
        own_centre, *own_numbers = own_summary
        summary = KernelKeySummary(Matrix(own_centre, *plan.centre_strides), *own_numbers)
        opened.launch(summary_kernel, plan.blocks, schedule.summary_settings, key, summary, *plan.sizes)
    for chunk, scanned, heads, place in plan.forward_programs:
        opened.run_over_tiles(
            scan_kernel, *scanned, schedule.scan_settings, query, key, summary, maxima, maximum, bound_gap, score_error,
            lists, counts, numbers=(chunk.first_tile, chunk.capacity, chunk.tiles),
        )  # fmt: skip
        opened.run(
            certify_kernel, chunk, schedule.certify_settings, maxima, maximum, offset, bound_gap, score_error, margin,
            lowest, lists, counts, words,
        )  # fmt: skip
        if plan.is_marked:
            opened.run_over_tiles(
                list_queries_kernel, *heads, schedule.list_settings, words, flags, query_lists, numbers=(0, *place)
            )
            opened.run_over_tiles(
                mark_kernel, *heads, schedule.mark_settings, query, key, lowest, flags, query_lists, numbers=place
            )
        opened.run(
            solve_kernel, chunk, schedule.solve_settings, query, key, maxima, maximum, offset, margin, flags, lists,
            sublists, counts, reached_keys, numbers=(int(plan.is_marked),),
        )  # fmt: skip
        opened.run(
            output_kernel, chunk, schedule.output_settings, query, key, value, maximum, offset, reached_keys, sublists,
            counts, output, value_mean,
        )  # fmt: skip


def backward_stages(launches: CallLaunches, arguments: Sequence, device: torch.device) -> None:
    """Write the gradients, and the parameters' gradients by tile of queries."""
    plan = launches.plan
    opened, arguments, scratch = launches.open(backward_kernels(plan), arguments, plan.backward_scratch, device)
    launch_backward(opened, arguments, scratch)


def backward_kernels(plan: Plan) -> tuple:
    return BACKWARD + (SHARE if plan.slots else ()) + (() if plan.are_words_kept else (reaching_kernel,))


def launch_backward(opened: OpenedKernels, arguments: Sequence, scratch: Sequence) -> None:
    """`arguments` are inputs, value_mean, grad_output, selected, the gradients, the state, parameter_parts.

    dQ comes first, with the pairs of numbers of each query that dK and dV need.
    """
    plan = opened.plan
    pairs, floors, lists, remade_words, shares, parts = scratch
    query, key, value, value_mean, grad_output, selected, *gradients = arguments[:9]
    maximum, offset, reached_keys, words, parameter_parts = arguments[9:]
    grad_query, grad_key, grad_value = gradients
    for chunk in plan.query_chunks:
        opened.run(
            gradient_query_kernel, chunk, schedule.output_settings, query, key, value, value_mean, grad_output,
            selected, maximum, offset, pairs, floors, reached_keys, lists, grad_query, parameter_parts,
        )  # fmt: skip
    capacities = plan.backward_query_list
    for first_unit, units, first_key, tiles, _ in plan.key_chunks:
        heads = first_unit * plan.group, units * plan.group, tiles
        if not plan.are_words_kept:
            words = remade_words
            opened.run_over_tiles(
                reaching_kernel, *heads, schedule.mark_settings, query, key, floors, reached_keys, lists, words,
                numbers=(first_key, *capacities),
            )  # fmt: skip
        opened.run_over_tiles(
            list_queries_kernel, *heads, schedule.list_settings, words, None, lists,
            numbers=(first_key, 0, plan.query_tiles, plan.list_size, *capacities),
        )  # fmt: skip
        if plan.slots:
            opened.launch(
                share_kernel, units, schedule.summary_settings, lists, shares, plan.group, tiles, *capacities,
                plan.slots, plan.wanted_programs,
            )  # fmt: skip
        opened.run_over_tiles(
            gradient_key_value_kernel, first_unit, units, tiles + plan.slots, schedule.output_settings, query, key,
            value, selected or grad_output, pairs, lists, shares, parts, grad_key, grad_value,
            numbers=(first_key, *capacities, plan.slots),
        )  # fmt: skip
        if plan.slots:
            opened.launch(
                add_parts_kernel, units * plan.adding_programs, schedule.summary_settings, shares, parts, grad_key,
                grad_value, opened.options, *plan.sizes, first_unit, units, first_key, tiles, plan.slots,
            )  # fmt: skip
