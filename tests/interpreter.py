"""Triton's interpreter as the tests use it: quicker, with steady products, and with every access to memory checked."""

from bisect import bisect_right

import torch
from quick_interpreter import quicken_the_interpreter


def prepare() -> None:
    quicken_the_interpreter()
    steady_products()
    check_memory(Memory())
    spoil_scratch()


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
