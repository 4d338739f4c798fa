"""Where the tests run: the kernels on CUDA, or in Triton's interpreter without it; plain PyTorch everywhere."""

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass
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
    """Triton's interpreter patches triton.language for each kernel, and again, to the same effect, for each call of a
    jit function inside: half of its time. Here the kernel's own patch serves all functions outside of Triton, and one
    patch all functions of a module of Triton's: it is never taken back."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterError

    patched_call = InterpretedFunction.__call__
    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patched.add(module)
            return patched_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    InterpretedFunction.__call__ = call


def steady_products() -> None:
    """NumPy's bits of a product of a query and a key depend on the tile's shape and on the processor. Added in float64
    and rounded once, they hardly do. What sums in float32 lose, only the tests on a GPU show."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        assert a.data.dtype.kind == "f", f"held as integers in the interpreter: {a.dtype}"
        product = numpy.matmul(a.data, b.data, dtype=numpy.float64)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


if not HAS_CUDA and find_spec("triton"):
    quicken_the_interpreter()
    steady_products()

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


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Workers of pytest-xdist share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# Whose every case the interpreter would take many minutes for; it takes the first of three, in each test at least one.
MANY_CASES = ("test_biases", "test_learned", "test_masks", "test_numerics", "test_packed")


def pytest_collection_modifyitems(config, items) -> None:
    """A GPU, and plain PyTorch, take all cases of the options' tests; Triton's interpreter one of three."""
    kept, dropped, seen = [], [], {}
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if isinstance(backend, Backend) and backend.is_interpreted and item.module.__name__ in MANY_CASES:
            number = seen[item.originalname] = seen.get(item.originalname, -1) + 1
            if number % 3:
                dropped.append(item)
                continue
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
