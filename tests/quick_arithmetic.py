"""Operations of Triton's interpreter in one call of NumPy each, where types need no conversion.

The types of the operands alone say whether that is so, and what type the result has: both are found out once.
"""

from collections.abc import Callable
from functools import partial

INTEGERS, FLOATS = ("int32", "int64"), ("fp32", "fp64")
NUMBERS = INTEGERS + FLOATS
TYPES_TAKEN = {int: NUMBERS, float: FLOATS}  # by a number of Python
ARITHMETIC = {"add": "add", "sub": "subtract", "mul": "multiply"}
OF_BITS = {"and": "bitwise_and", "or": "bitwise_or"}
COMPARISONS = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal",
               "ne": "not_equal"}  # fmt: skip


def compute_at_once(interpreter) -> None:
    import numpy

    quick = Quick(interpreter)
    for name, operation in ARITHMETIC.items():
        operation = getattr(numpy, operation)
        quick.replace_operator(f"__{name}__", operation, NUMBERS)
        quick.replace_operator(f"__r{name}__", swapped(operation), NUMBERS)
    for name, operation in OF_BITS.items():
        quick.replace_operator(f"__{name}__", getattr(numpy, operation), ("int1", *INTEGERS))
    for name, operation in COMPARISONS.items():
        quick.replace_operator(f"__{name}__", getattr(numpy, operation), ("int1", *NUMBERS), gives_bool=True)
    quick.replace_operator("__truediv__", numpy.divide, FLOATS)
    quick.replace_operator("__rtruediv__", swapped(numpy.divide), FLOATS)
    quick.replace_where()
    quick.replace_index()


def swapped(operation: Callable) -> Callable:
    return lambda left, right: operation(right, left)


class Quick:
    """Replaces operations. ``long_way`` of each is Triton's own, which all other types take."""

    def __init__(self, interpreter) -> None:
        from triton.language import core

        self.core, self.Handle, self.semantic = core, interpreter.TensorHandle, interpreter.interpreter_semantic

    def value(self, data, type):
        handle = object.__new__(self.Handle)
        handle.data, handle.dtype, handle.attr = data, type.scalar, {}
        return self.core.tensor(handle, type)

    def shape_of(self, *types):
        """Of blocks that NumPy broadcasts as Triton does, and of numbers; None for blocks of different ranks."""
        import numpy

        shapes = [[self.core._unwrap_if_constexpr(size) for size in type.shape] for type in types if type.is_block()]
        return list(numpy.broadcast_shapes(*shapes)) if len(set(map(len, shapes))) < 2 else None

    def result_type(self, element, *types):
        shape = self.shape_of(*types)
        return None if shape is None else self.core.block_type(element, shape) if shape else element

    def plan_of(self, left, right, operation: Callable, types: tuple[str, ...], gives_bool: bool):
        """(the type of the result, what computes its data); `right` is a type, or that of a number of Python."""
        import numpy

        if isinstance(right, type):
            if left.scalar.name not in TYPES_TAKEN.get(right, ()):
                return None, None
            right = left
        scalars = left.scalar, right.scalar
        if scalars[0].is_ptr() and operation is numpy.add and scalars[1].name in INTEGERS:
            width = numpy.uint64(max(1, scalars[0].element_ty.primitive_bitwidth // 8))
            place = self.result_type(scalars[0], left, right)
            return place, lambda places, steps: places + width * steps.astype(numpy.uint64)
        names = {scalar.name for scalar in scalars}
        if not names <= set(types) or (len(names) > 1 and not names <= set(INTEGERS)):
            return None, None
        widest = max(scalars, key=lambda scalar: scalar.primitive_bitwidth)
        return self.result_type(self.core.int1 if gives_bool else widest, left, right), operation

    def replace_operator(
        self, name: str, operation: Callable, types: tuple[str, ...], gives_bool: bool = False
    ) -> None:
        core, value, plans = self.core, self.value, {}
        long_way = partial(getattr(core.tensor, name), _semantic=self.semantic)

        def compute(self, other, plan_of=self.plan_of):
            kind = type(other)
            if kind is core.constexpr:
                other = other.value
                kind = type(other)
            is_value = kind is core.tensor
            key = self.type.name, other.type.name if is_value else kind
            if key not in plans:
                plans[key] = plan_of(self.type, other.type if is_value else kind, operation, types, gives_bool)
            result, data_of = plans[key]
            if result is None:
                return long_way(self, other)
            return value(data_of(self.handle.data, other.handle.data if is_value else other), result)

        compute.long_way = long_way
        setattr(core.tensor, name, compute)

    def replace_where(self) -> None:
        import numpy
        import triton.language

        core, value, plans = self.core, self.value, {}
        numpy_types = {"int32": numpy.int32, "int64": numpy.int64, "fp32": numpy.float32, "fp64": numpy.float64}
        long_way = partial(core.where, _semantic=self.semantic)

        def plan_of(condition, kinds):
            """(the type of the result, the type of NumPy that numbers of Python are made of)."""
            found = [kind for kind in kinds if not isinstance(kind, type)]
            names = {kind.scalar.name for kind in found}
            numbers = [kind for kind in kinds if isinstance(kind, type)]
            if condition.scalar.name != "int1" or len(names) != 1 or not names <= {"int1", *NUMBERS}:
                return None, None
            if any(not names <= set(TYPES_TAKEN.get(kind, ())) for kind in numbers):
                return None, None
            element = found[0].scalar
            return self.result_type(element, condition, *found), numpy_types.get(element.name)

        def where(condition, x, y):
            if type(condition) is not core.tensor:
                return long_way(condition, x, y)
            x, y = (given.value if type(given) is core.constexpr else given for given in (x, y))
            kinds = tuple(given.type if type(given) is core.tensor else type(given) for given in (x, y))
            key = condition.type.name, *(getattr(kind, "name", kind) for kind in kinds)
            if key not in plans:
                plans[key] = plan_of(condition.type, kinds)
            result, number = plans[key]
            if result is None:
                return long_way(condition, x, y)
            data = (given.handle.data if type(given) is core.tensor else number(given) for given in (x, y))
            return value(numpy.where(condition.handle.data, *data), result)

        where.long_way = long_way
        core.where = triton.language.where = where

    def replace_index(self) -> None:
        """x[:, None] and the like."""
        core, value, types = self.core, self.value, {}
        long_way, whole = partial(core.tensor.__getitem__, _semantic=self.semantic), slice(None)

        def index(self, places):
            if type(places) is not tuple or any(place is not None and place != whole for place in places):
                return long_way(self, places)
            key = self.type.name, *(place is None for place in places)
            if key not in types:
                sizes = list(self.type.shape) if self.type.is_block() else []
                is_known = sizes and len(sizes) == places.count(whole)
                left = iter(sizes)
                shape = [1 if place is None else core._unwrap_if_constexpr(next(left)) for place in places if is_known]
                types[key] = core.block_type(self.type.scalar, shape) if is_known else None
            result = types[key]
            return long_way(self, places) if result is None else value(self.handle.data[places], result)

        index.long_way = long_way
        core.tensor.__getitem__ = index
