"""Where the tests run: the kernels on CUDA, or in Triton's interpreter without it; plain PyTorch everywhere."""

import atexit
import os
import shutil
import tempfile
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is first imported
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # One for this run: what was compiled before an operator's results changed their layout would be found again.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def quicken_the_interpreter() -> None:
    """Leaves out what Triton's interpreter does again and again to no effect; results keep their bits."""
    from triton.runtime import interpreter

    patch_once(interpreter)
    forget_overflow(interpreter.interpreter_builder)
    remember_types(interpreter)


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
    make_block, blocks = core.block_type.__init__, {}

    def plain(number):
        return number.value if isinstance(number, core.constexpr) else number

    def block(self, element_type, shape) -> None:
        key = element_type.name, *map(plain, plain(shape))
        if key not in blocks:
            make_block(self, element_type, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    make_tensor, tensors = core.tensor.__init__, {}

    def tensor(self, handle, type) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: of_type for name, of_type in vars(self).items() if name != "handle"}
        vars(self).update(tensors[type.name], handle=handle)

    core.block_type.__init__, core.tensor.__init__ = block, tensor


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


def checked_memory() -> None:
    """A kernel that reads or writes outside of the tensors that it was given would go on with whatever lies there, or
    crash later tests. Here such reads give zeros, such writes are left out, and the launch ends in an AssertionError.
    """
    import numpy
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    start_launch, end_launch = GridExecutor._init_args_hst, GridExecutor._restore_args_dev
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, exchange = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    starts, ends, strayed = [], [], []

    def storages(argument):
        if isinstance(argument, (tuple, list)):
            for part in argument:
                yield from storages(part)
        elif hasattr(argument, "untyped_storage"):
            storage = argument.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    def start(self, arguments, keywords):
        nonlocal starts, ends
        on_host, keywords_on_host = start_launch(self, arguments, keywords)
        bounds = sorted({*storages(on_host), *storages(list(keywords_on_host.values()))})
        starts, ends = (list(side) for side in zip((0, 0), *bounds, strict=True))
        strayed.clear()
        return on_host, keywords_on_host

    def end(self, *arguments):
        end_launch(self, *arguments)
        assert not strayed, f"{self.fn.__name__} goes outside of its tensors: {strayed[0]} places, the first time"

    def inside(pointers, mask):
        """The mask without places outside of the launch's tensors."""
        wanted = numpy.broadcast_to(mask.data, pointers.data.shape)
        places = pointers.data if wanted.all() else pointers.data[wanted]
        if not places.size:
            return mask
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = int(places.min()), int(places.max())
        if last + size <= ends[bisect_right(starts, first) - 1]:
            return mask
        number = numpy.searchsorted(numpy.array(starts, numpy.uint64), pointers.data, side="right") - 1
        is_inside = pointers.data + numpy.uint64(size) <= numpy.array(ends, numpy.uint64)[number]
        if is_inside[wanted].all():
            return mask
        strayed.append(int((~is_inside[wanted]).sum()))
        return TensorHandle(wanted & is_inside, mask.dtype)

    def everywhere(pointers):
        from triton.language import int1

        return TensorHandle(numpy.ones_like(pointers.data, dtype=bool), int1)

    def checked_load(self, pointers, mask, *rest):
        return load(self, pointers, inside(pointers, mask), *rest)

    def checked_store(self, pointers, value, mask, *rest):
        return store(self, pointers, value, inside(pointers, mask), *rest)

    def checked_atomic(self, operation, pointers, value, mask, *rest):
        return atomic(self, operation, pointers, value, inside(pointers, mask), *rest)

    def checked_exchange(self, pointers, *rest):
        assert inside(pointers, everywhere(pointers)).data.all(), "an exchange goes outside of its tensors"
        return exchange(self, pointers, *rest)

    GridExecutor._init_args_hst, GridExecutor._restore_args_dev = start, end
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = checked_atomic, checked_exchange


def spoiled_scratch() -> None:
    """New scratch holds NaN and -1: what is read before it is written shows, and shows each time."""
    from flash_entmax.backends.triton.scratch import Scratch

    def allocate(self, device):
        return torch.full((self.size,), 255, dtype=torch.uint8, device=device)

    Scratch.allocate = allocate


if not HAS_CUDA and find_spec("triton"):
    quicken_the_interpreter()
    steady_products()
    checked_memory()
    spoiled_scratch()


def with_room(function):
    """Calls it. Python maps and unmaps memory for each call that crosses the end of 16 KiB of frames, wherever a test
    happens to come near; in one frame that claims more, there is room below."""
    return function()


with_room.__code__ = with_room.__code__.replace(co_stacksize=2**17)

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
# Hours of new examples: HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py
FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10000"))
settings.register_profile(
    "fuzz", deadline=None, print_blob=True, max_examples=FUZZ_EXAMPLES, suppress_health_check=list(HealthCheck)
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "repeatable")
settings.load_profile(PROFILE)


@dataclass(frozen=True)
class Backend:
    """One implementation on one device, and the shapes and dtypes that it has the time for."""

    impl: str
    device: str

    @property
    def is_interpreted(self) -> bool:
        return self.impl == "triton" and self.device == "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.is_interpreted:
            return torch.float32, torch.float16
        if self.impl == "triton":
            return torch.float32, torch.float16, torch.bfloat16
        return torch.float64, torch.float32, torch.float16, torch.bfloat16

    def sizes(self, interpreter, processor, cuda):
        """The size for where this backend runs: the interpreter takes about 5 ms for each 64 x 64 tile and pass."""
        if self.is_interpreted:
            return interpreter
        return cuda if self.device == "cuda" else processor


def backends() -> list[Backend]:
    found = [Backend("torch", "cpu")]
    if HAS_CUDA:
        found.append(Backend("triton", "cuda"))
    elif find_spec("triton"):
        found.append(Backend("triton", "cpu"))
    return found


@pytest.fixture(scope="session", params=backends(), ids=lambda backend: f"{backend.impl}-{backend.device}")
def backend(request) -> Backend:
    return request.param


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    from inspect_command import write_llama

    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    from inspect_command import write_demo

    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def pools():
    started = []
    yield started
    for pool in started:
        pool.close()


@pytest.fixture
def pool(pools):
    """Processes on gloo that serve all tests of several ranks; new ones after a test that has ended one of them."""
    from rank_pool import RankPool

    if not pools or not pools[-1].is_whole():
        pools.append(RankPool())
    return pools[-1]


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Workers of pytest-xdist share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# Whose every case the interpreter would take many minutes for; it takes a third, another one each day, in each test at
# least one case. ENTMAX_THIRD=0, 1 or 2 picks it; workers of pytest-xdist find what the first process has set.
MANY_CASES = (
    "test_biases", "test_decode", "test_key_summaries", "test_key_summaries_calls", "test_learned", "test_masks",
    "test_nn_cache", "test_numerics", "test_packed", "test_paged",
)  # fmt: skip
THIRD = int(os.environ.setdefault("ENTMAX_THIRD", str(date.today().toordinal() % 3)))

# Fixtures of a module that run for long: the tests of each go to one worker, and start first (--dist loadgroup).
LONG_FIXTURES = ("finished", "written")


def pytest_sessionstart(session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and any(backend.is_interpreted for backend in backends()):
        reporter.write_line(f"ENTMAX_THIRD={THIRD}: the third of the options' cases that Triton's interpreter takes")


def is_one_of_many(item) -> bool:
    """One of the cases of which the interpreter takes a third."""
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return isinstance(backend, Backend) and backend.is_interpreted and item.module.__name__ in MANY_CASES


def of_third(items) -> tuple[list, list]:
    """Kept and dropped."""
    counts = Counter((item.module, item.originalname) for item in items if is_one_of_many(item))
    kept, dropped, seen = [], [], Counter()
    for item in items:
        test = item.module, item.originalname
        is_kept = not is_one_of_many(item) or seen[test] % 3 == THIRD % min(3, counts[test])
        seen[test] += is_one_of_many(item)
        (kept if is_kept else dropped).append(item)
    return kept, dropped


def pytest_itemcollected(item) -> None:
    for name in set(LONG_FIXTURES).intersection(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.xdist_group(f"{item.module.__name__}: {name}"))


def pytest_collection_modifyitems(config, items) -> None:
    """A GPU, and plain PyTorch, take all cases of the options' tests; Triton's interpreter one of three."""
    items[:], dropped = of_third(items)
    config.hook.pytest_deselected(items=dropped)
    for item in items:
        item.runtest = partial(with_room, item.runtest)
