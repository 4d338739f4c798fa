"""Seeing calls as they run: where PyTorch dispatches the operator of attention, and at the modules of other layers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..operators import attention as ops

# Makes the record of a call. Of attention: name, number, arguments and results of the operator.
MakeCall = Callable[..., Any]
# Takes the name of a call's module, and what makes its record.
OnCall = Callable[[str, Callable[[], Any]], None]
# Takes a module; gives what makes the record of its calls (name, number, arguments, keywords), or None.
Layers = Callable[[nn.Module], MakeCall | None]


@contextmanager
def watch_calls(model: nn.Module | None, layers: Layers | None, make_call: MakeCall, on_call: OnCall) -> Iterator[None]:
    """Report each call of attention, and of these layers, of this thread, except those of a backward pass."""
    numbers = count()
    with (
        running_modules(model) as running,
        watched_layers(model, layers, numbers, on_call),
        CallWatcher(running, numbers, make_call, on_call),
    ):
        yield


@contextmanager
def watched_layers(
    model: nn.Module | None, layers: Layers | None, numbers: Iterator[int], on_call: OnCall
) -> Iterator[None]:
    """Report the calls of the modules for which ``layers`` gives what makes their record, before they run."""
    model, thread, handles = getattr(model, "_orig_mod", model), threading.get_ident(), []

    def report(name: str, make: MakeCall, module: nn.Module, arguments: tuple, keywords: dict) -> None:
        if threading.get_ident() == thread and torch._C._current_graph_task_id() == -1:
            on_call(name, partial(make, name, next(numbers), arguments, keywords))

    if model is not None and layers is not None:
        for name, module in model.named_modules():
            make = layers(module)
            if make is not None:
                report_own = partial(report, name or type(module).__name__, make)
                handles.append(module.register_forward_pre_hook(report_own, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RunningModules(threading.local):
    """The names of the modules that are running in this thread, innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, name: str) -> None:
        self.names.append(name)

    def end(self, name: str) -> None:
        if self.names and self.names[-1] == name:  # a module may have begun before the recording
            self.names.pop()


@contextmanager
def running_modules(model: nn.Module | None) -> Iterator[RunningModules]:
    """Follow which modules of the model are running. The model itself has the name of its class."""
    running = RunningModules()
    handles = []
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    for name, module in model.named_modules() if model is not None else ():
        own = name or type(module).__name__
        handles.append(module.register_forward_pre_hook(lambda *_, own=own: running.begin(own)))
        handles.append(module.register_forward_hook(lambda *_, own=own: running.end(own), always_call=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


class CallWatcher(TorchDispatchMode):
    """Sees every operator that PyTorch dispatches in this thread, and reports those of attention."""

    def __init__(self, running: RunningModules, numbers: Iterator[int], make_call: MakeCall, on_call: OnCall) -> None:
        super().__init__()
        self.running, self.numbers, self.make_call, self.on_call = running, numbers, make_call, on_call

    def __torch_dispatch__(
        self, function: Callable, types: object, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        results = function(*arguments, **(keywords or {}))
        in_backward = torch._C._current_graph_task_id() != -1
        if function is ops.attention and not in_backward:
            number = next(self.numbers)
            kept = results
            if not arguments[3]:  # what a backward reads was not kept, and the report needs it
                with _disable_current_modes():  # other watchers have seen the call
                    kept = function(*arguments[:3], True, *arguments[4:])
            name = self.running.names[-1] if self.running.names else f"call {number}"
            self.on_call(name, partial(self.make_call, name, number, arguments, kept))
        return results
