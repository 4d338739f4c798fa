"""Launches that are written down once, for calls whose tensors differ by their addresses only.

A stage launches into `Notes` as it would launch kernels, with a `Place` wherever each call has an address of its own.
What comes of the notes is `WrittenLaunches`: a call hands over its tensors, and all is launched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor

from .launch import SettingsRule, current_stream
from .plan import Plan
from .scratch import ALIGNMENT, Scratch

address_of = Tensor.data_ptr


@dataclass(frozen=True)
class Place:
    """An address that each call has its own of: that of its tensor of this number, or, behind these, of scratch."""

    number: int


class Notes:
    """In place of what launches kernels: writes down what it is asked for. All tensors are different objects."""

    def __init__(self, tensors: Sequence[Tensor], scratch: Scratch) -> None:
        self.launches: list[tuple] = []
        self.values = len(tensors) + len(scratch.starts)
        self.places = {id(tensor): Place(number) for number, tensor in enumerate(tensors)}
        self.scratch = [Place(number) for number in range(len(tensors), self.values)]

    def __call__(self, kernel, programs: int, rule: SettingsRule, *arguments) -> None:
        self.launches.append((kernel, programs, arguments))

    def placed(self, argument: Any) -> Any:
        """An argument of launches with places where it has tensors."""
        if isinstance(argument, Tensor):
            return self.places[id(argument)]
        return tuple(map(self.placed, argument)) if isinstance(argument, tuple) else argument


class WrittenLaunches:
    """All launches of a stage, in order, by compiled kernels.

    A call makes one list of values: the addresses of its tensors and of its scratch, all constants, and then tuples
    that hold an address, as a matrix does. Each launch picks its arguments out of this list.
    """

    __slots__ = ("constants", "device", "starts", "steps", "tuples")

    def __init__(self, notes: Notes, compiled: dict, plan: Plan, scratch: Scratch, device: torch.device) -> None:
        launches = [(kernel, programs, (*own, plan.config)) for kernel, programs, own in notes.launches]
        constants = {id(part): part for *_, own in launches for part in parts_of(own) if type(part) is not Place}
        numbers = {known: notes.values + number for number, known in enumerate(constants)}
        tuples: list[itemgetter] = []

        def number_of(argument: Any) -> int:
            """The number of an argument among the values."""
            if type(argument) is Place:
                return argument.number
            if id(argument) not in numbers:
                tuples.append(itemgetter(*map(number_of, argument)))
                numbers[id(argument)] = notes.values + len(numbers)
            return numbers[id(argument)]

        steps = []
        for kernel, programs, own in launches:
            known, pick = compiled[id(kernel)], itemgetter(*map(number_of, own))
            steps.append((known.run, known.function, known.packed_metadata, programs, pick))
        self.constants, self.tuples, self.steps = tuple(constants.values()), tuple(tuples), tuple(steps)
        self.starts, self.device = tuple(scratch.starts), device.index

    def run(self, tensors: tuple[Tensor, ...], memory: Tensor) -> bool:
        """Launch all, in the current stream; False, and nothing is launched, where 16 does not divide an address."""
        addresses, first = tuple(map(address_of, tensors)), memory.data_ptr()
        if reduce(or_, addresses, first) % ALIGNMENT:
            return False
        values = [*addresses, *map(first.__add__, self.starts), *self.constants]
        for pick in self.tuples:
            values.append(pick(values))
        stream = current_stream(self.device)
        for run, function, metadata, programs, pick in self.steps:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *pick(values))
        return True


def parts_of(argument: Any) -> Iterator[Any]:
    """The places in an argument, and all between them that hold none."""
    if isinstance(argument, tuple) and has_place(argument):
        for part in argument:
            yield from parts_of(part)
    else:
        yield argument


def has_place(argument: Any) -> bool:
    return any(map(has_place, argument)) if isinstance(argument, tuple) else type(argument) is Place
