"""Calls of few queries like one before: their launches are written down once. Later calls look up addresses only."""

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Problem
from ...core.tensors import ROW_ALIGNMENT, empty_stored_as
from . import launch, schedule
from .call_launches import CallLaunches, OpenedKernels
from .decoding import DECODE, NO_PAGES, launch_decode, launches_of
from .launch import SettingsRule, current_stream, is_watched
from .plan import NO_MASKS, Plan
from .scratch import ALIGNMENT
from .tile import device_of, is_aligned, matrix
from .visibility import KernelVisibility


class Place(NamedTuple):
    """An argument of launches that each call has its own of: number so many of its values."""

    number: int


class Step(NamedTuple):
    """One launch. `pick` takes its arguments from the values of a call and the constants behind them."""

    run: Callable
    function: int
    metadata: tuple
    programs: int
    pick: itemgetter


class Notes:
    """In place of what launches kernels: writes down what it is asked for."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __call__(self, kernel, programs: int, rule: SettingsRule, *arguments) -> None:
        self.launches.append((kernel, programs, arguments))


def prepare(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> "PreparedCall | None":
    """See backends.Backend."""
    if not (launch.CAN_BE_DIRECT and schedule.is_decoded(problem, False)) or problem.is_empty:
        return None
    if problem.value_size % ROW_ALIGNMENT or not all(is_aligned(matrix(tensor)) for tensor in (query, key, value)):
        return None
    with device_of(query):
        return PreparedCall(launches_of(problem, query).plan, query, value)


class PreparedCall:
    """The launches of calls whose tensors differ by their addresses only."""

    def __init__(self, plan: Plan, query: Tensor, value: Tensor) -> None:
        self.plan, self.scratch = plan, plan.decode_scratch
        output = empty_stored_as(query, value.shape[-1])
        self.output = output.shape, output.stride()
        self.kind = {"dtype": query.dtype, "device": query.device}
        self.steps, self.constants, self.strides = (), (), ()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, intervals: Tensor | None) -> Tensor | None:
        """The output; None where the launches are no direct ones, see launch.py."""
        device = self.kind["device"]
        if is_watched(DECODE) or (query.is_cuda and device.index != torch.cuda.current_device()):
            return None
        output, memory = torch.empty_strided(*self.output, **self.kind), self.scratch.allocate(device)
        if not (self.steps or self.write_down((query, key, value, output), intervals)):
            return None
        addresses = query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr()
        visibility, bits = NO_MASKS, addresses[0] | addresses[1] | addresses[2] | addresses[3]
        if intervals is not None:
            visibility = KernelVisibility(intervals.data_ptr())
            bits |= visibility.intervals
        first = memory.data_ptr()
        if (bits | first) % ALIGNMENT:
            return None
        matrices = [(address, *strides) for address, strides in zip(addresses, self.strides, strict=True)]
        values = *matrices, visibility, *[first + start for start in self.scratch.starts], *self.constants
        stream = current_stream(device.index)
        for run, function, metadata, programs, pick in self.steps:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *pick(values))
        return output

    def write_down(self, tensors: tuple[Tensor, ...], intervals: Tensor | None) -> bool:
        """Whether all kernels of these calls are compiled. Their launches are known from then on."""
        plan, device, matrices = self.plan, self.kind["device"], [matrix(tensor) for tensor in tensors]
        visibility = NO_MASKS if intervals is None else KernelVisibility(intervals)
        arguments = CallLaunches(plan, plan.options, visibility).with_options((*matrices, None))
        compiled = plan.launcher.compiled_for(DECODE, arguments, device, plan.largest)
        if compiled is None:
            return False
        notes, places = Notes(), [Place(number) for number in range(5 + len(self.scratch.starts))]
        opened = OpenedKernels(notes, plan, plan.options, places[4])
        launch_decode(opened, (*places[:4], None), places[5:], NO_PAGES, device)
        steps, self.constants = steps_of(notes, compiled, len(places), plan)
        self.strides = [m[1:] for m in matrices]
        self.steps = steps  # last: other threads look for it
        return True


def steps_of(notes: Notes, compiled: dict, places: int, plan: Plan) -> tuple[list[Step], list]:
    """(steps, constants): the constants have the numbers behind the places."""
    steps, constants = [], []
    for kernel, programs, arguments in notes.launches:
        numbers = []
        for argument in (*arguments, plan.config):
            numbers.append(argument.number if type(argument) is Place else places + len(constants))
            if type(argument) is not Place:
                constants.append(argument)
        own = compiled[id(kernel)]
        steps.append(Step(own.run, own.function, own.packed_metadata, programs, itemgetter(*numbers)))
    return steps, constants
