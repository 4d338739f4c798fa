"""What a function's results depend on beside its arguments, as a key: what was kept under an equal key is right."""

import dis
import math
import operator
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

CONSTANT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
LIBRARIES = (torch, math, operator)  # whose attributes stay what they are


class State(NamedTuple):
    """`key` is made of values, code, and identities of what `alive` holds, which nothing else takes meanwhile."""

    key: object
    alive: list[object]


def state_of(value: object) -> State | None:
    """The state of functions, tensors and constants, in tuples or alone; None where anything else has a part in it.

    Of a tensor it is the object, where its numbers lie, and how often it was written to as PyTorch counts that; on a
    CPU also the numbers, which NumPy may share without counting. Of a Python function it is the code, with the state of
    all that this reads: defaults, closure, attributes, global variables.
    """
    alive: list[object] = []
    try:
        return State(_key(value, alive, {}), alive)
    except (_UnknownError, RecursionError):  # of a list that holds itself
        return None


class Content:
    """A copy of a tensor's numbers, equal to a copy of the same ones. NaN is equal to nothing."""

    def __init__(self, copy: Tensor) -> None:
        self.copy = copy

    def __hash__(self) -> int:
        return hash((self.copy.shape, self.copy.dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and torch.equal(self.copy, other.copy)


class _UnknownError(Exception):
    """Something may change, and it cannot be told whether it did."""


def _key(value: Any, alive: list[object], seen: dict[int, int]) -> object:
    kind = type(value)
    if kind in CONSTANT:
        return kind, value
    if kind in (tuple, list):
        return kind, tuple(_key(part, alive, seen) for part in value)
    if kind is dict:
        return kind, tuple((_key(name, alive, seen), _key(part, alive, seen)) for name, part in value.items())
    if kind in (Tensor, nn.Parameter) and not value.is_inference():  # those do not count what is written to them
        content = Content(value.detach().clone()) if value.device.type == "cpu" else value.data_ptr()
        return _held(value, alive), value._version, content
    if kind is FunctionType:
        return _key_of_function(value, alive, seen)
    if kind is MethodType:
        return kind, _key(value.__func__, alive, seen), _key(value.__self__, alive, seen)
    if kind is partial:
        return kind, *(_key(part, alive, seen) for part in (value.func, value.args, value.keywords, value.__dict__))
    if kind is BuiltinFunctionType and (value.__self__ is None or isinstance(value.__self__, (ModuleType, type))):
        return _held(value, alive)
    if any(value is library for library in LIBRARIES) or (
        kind is type and value.__module__.partition(".")[0] in ("torch", "builtins")
    ):
        return _held(value, alive)
    raise _UnknownError


def _held(value: object, alive: list[object]) -> tuple[type, int]:
    alive.append(value)
    return type(value), id(value)


def _key_of_function(function: FunctionType, alive: list[object], seen: dict[int, int]) -> object:
    if id(function) in seen:
        return FunctionType, seen[id(function)]
    seen[id(function)] = len(seen)
    if function.__code__ not in _names:
        _names[function.__code__] = names_read(function.__code__)
    names = _names[function.__code__]
    if names is None:
        raise _UnknownError
    known = function.__globals__
    parts = (
        function.__defaults__,
        function.__kwdefaults__,
        function.__dict__,
        tuple(_content(cell) for cell in function.__closure__ or ()),
        {name: known[name] for name in names if name in known},  # the others are Python's own
    )
    return FunctionType, function.__code__, _key(parts, alive, seen)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        raise _UnknownError from None


_names: WeakKeyDictionary = WeakKeyDictionary()  # of code, which does not change


def names_read(code: CodeType) -> tuple[str, ...] | None:
    """The global variables that the code, and that of functions made in it, reads; None if it imports or sets any."""
    names: dict[str, None] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            return None
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] = None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            read = names_read(inner)
            if read is None:
                return None
            names |= dict.fromkeys(read)
    return tuple(names)
