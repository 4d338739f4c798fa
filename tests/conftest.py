"""Where the tests run: the kernels on CUDA, or in Triton's interpreter without it; plain PyTorch everywhere."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec

import interpreter
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


if not HAS_CUDA and find_spec("triton"):
    interpreter.prepare()


def with_room(function):
    """Calls it. Python maps and unmaps memory for each call that crosses the end of 16 KiB of frames, wherever a test
    happens to come near; in one frame that claims more, there is room below."""
    return function()


with_room.__code__ = with_room.__code__.replace(co_stacksize=2**17)

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
# Hours of new examples: HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py
# On a GPU most of the time goes to compiling: each test compiles kernels for so many kinds of calls.
FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10000"))
FUZZ_KITS = int(os.environ.get("FUZZ_KITS", "6"))
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
def launches(monkeypatch):
    """As if there were a GPU: what is launched directly."""
    from direct_launches import direct_launches

    with direct_launches(monkeypatch) as made:
        yield made


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
# least one case. So does test_fuzz of plain PyTorch's calls, and test_compiles of its settings. ENTMAX_THIRD=0, 1 or 2
# picks it; workers of pytest-xdist find what the first process has set.
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
        reporter.write_line(f"ENTMAX_THIRD={THIRD}: the third of the many cases that this run takes")


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
