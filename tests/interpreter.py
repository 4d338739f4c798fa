"""Triton's interpreter as the tests use it: quicker, with steady products, and with every access to memory checked."""

from bisect import bisect_right
from dataclasses import replace

import torch


def prepare() -> None:
    quicken_the_interpreter()
    steady_products()
    check_memory(Memory())
    spoil_scratch()


def quicken_the_interpreter() -> None:
    """Leaves out what Triton's interpreter does again and again to no effect; results keep their bits."""
    from triton.runtime import interpreter

    patch_once(interpreter)
    forget_overflow(interpreter.interpreter_builder)
    remember_types(interpreter)
    know_same_types()
    unwrap_by_type()


def patch_once(interpreter) -> None:
    """Triton's interpreter patches triton.language for each kernel, takes it back, and patches it again, to the same
    effect, for each call of a jit function inside: half of its time. Here one patch, never taken back, serves all
    functions of a module."""
    patch_lang, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            pass

    def patch_module(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch_lang(function)
        return Kept()

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton."):
            patch_module(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_module
    interpreter.InterpretedFunction.__call__ = call


def forget_overflow(builder) -> None:
    """Each sum and product of integers is made again in 64 bits, for a check that only the option debug turns on."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def remember_types(interpreter) -> None:
    """Types and shapes of values are made anew for each operation, from few that differ."""
    from triton.language import core

    numpy_dtype, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype_of(type):
        if type.name not in dtypes:
            dtypes[type.name] = numpy_dtype(type)
        return dtypes[type.name]

    interpreter._get_np_dtype = numpy_dtype_of
    make_block, blocks, shapes = core.block_type.__init__, {}, {}

    def plain(number):
        return number.value if isinstance(number, core.constexpr) else number

    def block(self, element_type, shape) -> None:
        key = element_type.name, *map(plain, plain(shape))
        if key not in blocks:
            make_block(self, element_type, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    make_tensor, tensors = core.tensor.__init__, {}

    def tensor(self, handle, type) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: of_type for name, of_type in vars(self).items() if name != "handle"}
        vars(self).update(tensors[type.name], handle=handle)

    core.block_type.__init__, core.tensor.__init__ = block, tensor


INTEGERS, FLOATS = ("int1", "int32", "int64"), ("fp32", "fp64")


def know_same_types() -> None:
    """Most operations have operands of one type and one shape, or a number that takes the other operand's type: there
    is nothing to find out, cast or broadcast. Shapes of equal sizes are one object: see remember_types."""
    from triton.language.core import tensor
    from triton.language.semantic import TritonSemantic

    convert_both, broadcast_both = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value

    def takes_type_of(number, value) -> bool:
        if type(value) is not tensor:
            return False
        kinds = {int: ("int32", "int64", *FLOATS), float: FLOATS}
        return value.dtype.name in kinds.get(type(number), ())

    def convert(self, left, right, *options, **more):
        if type(left) is type(right) is tensor:
            if not left.dtype.name == right.dtype.name in INTEGERS + FLOATS:
                return convert_both(self, left, right, *options, **more)
        elif takes_type_of(right, left):
            right = self._cast_to_computation_type(right, left.dtype)
        elif takes_type_of(left, right):
            left = self._cast_to_computation_type(left, right.dtype)
        else:
            return convert_both(self, left, right, *options, **more)
        return self.broadcast_impl_value(left, right)

    def broadcast(self, left, right):
        is_same = getattr(left.type, "shape", None) is getattr(right.type, "shape", None)
        return (left, right) if is_same else broadcast_both(self, left, right)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = convert, broadcast


def unwrap_by_type() -> None:
    """Most of what Triton looks at for a constant in it is a number, a type or a value."""
    from triton.language import core

    unwrap = core._unwrap_if_constexpr
    bare = {int, float, bool, str, core.dtype, core.block_type, core.pointer_type, core.tensor}

    def quick_unwrap(value):
        return value if type(value) in bare else unwrap(value)

    core._unwrap_if_constexpr = quick_unwrap


def steady_products() -> None:
    """NumPy's bits of a product of a query and a key depend on the tile's shape and on the processor. Added in float64
    and rounded once, they hardly do. What sums in float32 lose, only the tests on a GPU show."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        is_integer = a.dtype.scalar.is_int8()
        assert is_integer or a.data.dtype.kind == "f", f"held as integers in the interpreter: {a.dtype}"
        product = numpy.matmul(a.data, b.data, dtype=numpy.int32 if is_integer else numpy.float64)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


class Memory:
    """The tensors of the launch that runs, and the places outside of them that it has asked for.

    A kernel that reads or writes outside of its tensors would go on with whatever lies there, or crash later tests.
    Here such reads give zeros, such writes are left out, and the launch ends in an AssertionError.
    """

    def __init__(self) -> None:
        self.starts, self.ends, self.strayed = [], [], []

    def open(self, arguments) -> None:
        bounds = sorted(set(storages(arguments)))
        self.starts, self.ends = (list(side) for side in zip((0, 0), *bounds, strict=True))
        self.strayed.clear()

    def close(self, kernel: str) -> None:
        assert not self.strayed, f"{kernel} goes outside of its tensors: {self.strayed[0]} places, the first time"

    def inside(self, pointers, mask):
        """The mask without places outside of the launch's tensors."""
        import numpy
        from triton.runtime.interpreter import TensorHandle

        wanted = numpy.broadcast_to(mask.data, pointers.data.shape)
        places = pointers.data if wanted.all() else pointers.data[wanted]
        if not places.size:
            return mask
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = int(places.min()), int(places.max())
        if last + size <= self.ends[bisect_right(self.starts, first) - 1]:
            return mask
        starts, ends = (numpy.array(side, numpy.uint64) for side in (self.starts, self.ends))
        is_inside = pointers.data + numpy.uint64(size) <= ends[numpy.searchsorted(starts, pointers.data, "right") - 1]
        if is_inside[wanted].all():
            return mask
        self.strayed.append(int((~is_inside[wanted]).sum()))
        return TensorHandle(wanted & is_inside, mask.dtype)


def storages(argument):
    """(first address, one past the last) of each tensor's memory."""
    if isinstance(argument, (tuple, list)):
        for part in argument:
            yield from storages(part)
    elif hasattr(argument, "untyped_storage"):
        storage = argument.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def check_memory(memory: Memory) -> None:
    """Every load, store and atomic operation goes by what is in memory. Kernels here use no compare-and-swap."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    start_launch, end_launch = GridExecutor._init_args_hst, GridExecutor._restore_args_dev
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def start(self, arguments, keywords):
        on_host, keywords_on_host = start_launch(self, arguments, keywords)
        memory.open([*on_host, *keywords_on_host.values()])
        return on_host, keywords_on_host

    def end(self, *arguments):
        end_launch(self, *arguments)
        memory.close(self.fn.__name__)

    def checked_load(self, pointers, mask, *rest):
        return load(self, pointers, memory.inside(pointers, mask), *rest)

    def checked_store(self, pointers, value, mask, *rest):
        return store(self, pointers, value, memory.inside(pointers, mask), *rest)

    def checked_atomic(self, operation, pointers, value, mask, *rest):
        return atomic(self, operation, pointers, value, memory.inside(pointers, mask), *rest)

    GridExecutor._init_args_hst, GridExecutor._restore_args_dev = start, end
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    InterpreterBuilder.create_atomic_rmw = checked_atomic


def spoil_scratch() -> None:
    """New scratch holds NaN and -1: what is read before it is written shows, and shows each time."""
    from flash_entmax.backends.triton.scratch import Scratch

    def allocate(self, device):
        return torch.full((self.size,), 255, dtype=torch.uint8, device=device)

    Scratch.allocate = allocate
