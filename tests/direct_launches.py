"""As if there were a GPU: what is launched directly, with addresses, is seen, and runs in Triton's interpreter."""

import ctypes
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flash_entmax.backends.triton import launch, notes, plan
from flash_entmax.operators import dispatch


class Compiled:
    """A kernel as Triton has compiled it for the arguments of one launch."""

    function, packed_metadata = 7, ()

    def __init__(self, launches: "Launches", kernel, rule, arguments: tuple) -> None:
        self.launches, self.kernel, self.rule, self.like = launches, kernel, rule, arguments

    def run(self, programs, y, z, stream, function, metadata, enter, leave, told, *arguments) -> None:
        assert (y, z, stream, function, metadata, enter, leave, told) == (1, 1, 0, 7, (), None, None, None)
        *addresses, config = arguments
        tensors = [tensors_at(own, like) for own, like in zip(addresses, self.like, strict=True)]
        self.launches.direct.append((self.kernel, programs, arguments))
        self.launches.launch(self.kernel, programs, self.rule, config, *tensors)


class Launches:
    """Of all calls: what went through Triton, with tensors, and what was launched directly, with addresses; both, with
    tensors; and how many stages were launched without notes. `are_run`: the interpreter runs what is launched."""

    def __init__(self) -> None:
        self.by_triton, self.direct, self.all, self.are_run, self.opened = [], [], [], False, 0
        self.interpret, self.open_launcher = launch.launch, launch.Launcher.open

    def open(self, *arguments):
        self.opened += 1
        return self.open_launcher(*arguments)

    def through_triton(self, kernel, programs, rule, config, *arguments):
        self.by_triton.append((kernel, programs, (*arguments, config)))
        self.launch(kernel, programs, rule, config, *arguments)
        return Compiled(self, kernel, rule, arguments)

    def launch(self, kernel, programs, rule, config, *arguments) -> None:
        self.all.append((kernel, programs, (*arguments, config)))
        if self.are_run:
            self.interpret(kernel, programs, rule, config, *arguments)


def tensors_at(argument, like):
    """An argument of a direct launch with tensors in place of addresses, where the argument of another launch has some.

    They have the dtypes of these, and reach as far.
    """
    if isinstance(like, tuple):
        assert isinstance(argument, tuple)
        parts = (tensors_at(*pair) for pair in zip(argument, like, strict=True))
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    if not isinstance(like, Tensor):
        return argument
    assert isinstance(argument, int)
    if not like.numel():
        return torch.empty(0, dtype=like.dtype)
    steps = zip(like.shape, like.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps)
    memory = (ctypes.c_char * (count * like.itemsize)).from_address(argument)
    return torch.frombuffer(memory, dtype=like.dtype, count=count)


@contextmanager
def direct_launches(monkeypatch) -> Iterator[Launches]:
    made = Launches()
    monkeypatch.setattr(dispatch, "kept", OrderedDict())
    monkeypatch.setattr(launch, "CAN_BE_DIRECT", True)
    for module in (launch, notes):
        monkeypatch.setattr(module, "current_stream", lambda device: 0)
    monkeypatch.setattr(launch, "launch", made.through_triton)
    monkeypatch.setattr(launch.Launcher, "open", lambda *arguments: made.open(*arguments))
    forget()
    yield made
    forget()


def forget() -> None:
    """What was planned and compiled before."""
    plan.plan_of.cache_clear()
    launch.launcher_of.cache_clear()
