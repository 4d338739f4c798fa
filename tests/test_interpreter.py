"""The quick operations of the interpreter give what Triton's own give: the same bits, types and errors."""

from importlib.util import find_spec
from itertools import product

import pytest
from conftest import HAS_CUDA

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("Triton's interpreter runs without a GPU", allow_module_level=True)

import numpy
import triton.language as tl
from quick_arithmetic import ARITHMETIC, COMPARISONS, OF_BITS
from triton.language import core
from triton.runtime.interpreter import TensorHandle

TYPES = {
    "int1": numpy.bool_, "int8": numpy.int8, "int32": numpy.int32, "int64": numpy.int64,
    "fp16": numpy.float16, "fp32": numpy.float32, "fp64": numpy.float64,
}  # fmt: skip
SHAPES = (), (4,), (1, 4), (4, 1), (2, 4)
NUMBERS = 3, -1, 0.25, float("inf"), True, core.constexpr(2), core.constexpr(-0.5)
NAMES = [f"__{name}__" for name in (*ARITHMETIC, *OF_BITS, *COMPARISONS, "truediv")]
REFLECTED = [f"__r{name}__" for name in (*ARITHMETIC, "truediv")]


def value(type_name: str, shape: tuple[int, ...], seed: int = 0) -> core.tensor:
    numbers = numpy.random.default_rng(seed).integers(-9, 9, shape or (1,)) / 2
    element = getattr(tl, {"fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(type_name, type_name))
    handle = TensorHandle(numbers.astype(TYPES[type_name]), element)
    return core.tensor(handle, core.block_type(element, list(shape)) if shape else element)


def pointer(shape: tuple[int, ...], element: core.dtype) -> core.tensor:
    kind = core.pointer_type(element)
    handle = TensorHandle(numpy.full(shape or (1,), 2**40, dtype=numpy.uint64), kind)
    return core.tensor(handle, core.block_type(kind, list(shape)) if shape else kind)


def outcome(compute, *operands):
    """Data, type of the data, type of the value; or None for an error."""
    try:
        result = compute(*operands)
    except Exception:
        return None
    data = result.handle.data
    return data.tobytes(), data.dtype, data.shape, str(result.type), str(result.shape)


def check(quick, *operands) -> None:
    with numpy.errstate(all="ignore"):
        assert outcome(quick, *operands) == outcome(quick.long_way, *operands), operands


@pytest.mark.parametrize("name", NAMES)
def test_operators_of_values(name):
    for left, right in product(TYPES, TYPES):
        for left_shape, right_shape in product(SHAPES, SHAPES):
            check(getattr(core.tensor, name), value(left, left_shape), value(right, right_shape, 1))


@pytest.mark.parametrize("name", [*NAMES, *REFLECTED])
def test_operators_of_values_and_numbers(name):
    for kind, number in product(TYPES, NUMBERS):
        check(getattr(core.tensor, name), value(kind, (2, 4)), number)


def test_places_in_memory():
    for element, offset in product((tl.int1, tl.float16, tl.int64), ("int32", "int64", "int8")):
        for shapes in product(SHAPES, SHAPES):
            check(core.tensor.__add__, pointer(shapes[0], element), value(offset, shapes[1]))
        check(core.tensor.__add__, pointer((4,), element), 5)


def test_where():
    for condition, x, y in product(("int1", "int32"), TYPES, TYPES):
        check(tl.where, value(condition, (2, 4)), value(x, (2, 4), 1), value(y, (2, 4), 2))
    for shapes in product(SHAPES, SHAPES, SHAPES):
        check(tl.where, *(value(kind, shape) for kind, shape in zip(("int1", "fp32", "fp32"), shapes, strict=True)))
    for kind, number in product(TYPES, NUMBERS):
        check(tl.where, value("int1", (2, 4)), value(kind, (2, 4)), number)
        check(tl.where, value("int1", (2, 4)), number, value(kind, (2, 4)))
        check(tl.where, value("int1", (2, 4)), number, number)


def test_new_dimensions():
    for shape, places in product(SHAPES, product((None, slice(None)), repeat=2)):
        check(core.tensor.__getitem__, value("fp32", shape), places)
    for places in ((None, slice(None), None), None, slice(None), (slice(0, 2), None)):
        check(core.tensor.__getitem__, value("fp32", (4,)), places)
