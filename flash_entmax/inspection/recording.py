"""Seeing attention calls as they run: where PyTorch dispatches their operator, and in which module of a model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..operators import attention as ops

# Takes a call: the name of its module, its number, arguments and results of the operator.
OnCall = Callable[[str, int, tuple, tuple[Tensor, ...]], None]


@contextmanager
def watch_calls(model: nn.Module | None, on_call: OnCall) -> Iterator[None]:
    """Report each attention call of this thread in the ``with`` block, except those of a backward pass."""
    with running_modules(model) as running, CallWatcher(running, on_call):
        yield


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

    def __init__(self, running: RunningModules, on_call: OnCall) -> None:
        super().__init__()
        self.running, self.on_call, self.count = running, on_call, 0

    def __torch_dispatch__(
        self, function: Callable, types: object, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        results = function(*arguments, **(keywords or {}))
        in_backward = torch._C._current_graph_task_id() != -1
        if function is ops.attention and not in_backward:
            number, self.count = self.count, self.count + 1
            kept = results
            if not arguments[3]:  # what a backward reads was not kept, and the report needs it
                kept = function(*arguments[:3], True, *arguments[4:])
            name = self.running.names[-1] if self.running.names else f"call {number}"
            self.on_call(name, number, arguments, kept)
        return results
