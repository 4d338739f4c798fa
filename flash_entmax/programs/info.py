"""`flash-entmax info`: what is installed, which implementation runs and why, where caches are, and what to try."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__
from ..backends import BACKENDS, choose

DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16
PREFIXES = "TRITON_", "TORCHINDUCTOR_", "CUDA_", "PYTORCH_", "OMP_NUM_THREADS"  # of variables that change what happens
MIB = 2**20


def print_info() -> None:
    lines = [*versions(), *devices(), *variables(), *tools()]  # Inductor sets a variable of its own
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:{width}}  {text}")
    print("\nimpl='auto' takes")
    for line in choices():
        print(f"  {line}")
    print("\nwhat to try")
    for hint in hints(Facts.here()):
        print(f"  - {hint}")


def versions() -> Iterator[tuple[str, str]]:
    yield "flash-entmax", __version__
    yield "installed in", str(Path(__file__).resolve().parents[2])
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", f"{torch.__version__}, {built_for()}"
    names = packages_distributions().get("triton", [])  # on ROCm and Windows it has another name
    known = ", ".join(f"{version(name)}{'' if name == 'triton' else f' ({name})'}" for name in names)
    yield "triton", known or "installed, of an unknown version" if find_spec("triton") else "not installed"
    try:
        yield "transformers", version("transformers")
    except PackageNotFoundError:
        yield "transformers", "not installed"


def built_for() -> str:
    """What this torch can run on beside the CPU."""
    if torch.version.hip:
        return f"for ROCm {torch.version.hip}"
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"


def devices() -> Iterator[tuple[str, str]]:
    yield "triton interpreter", "on (TRITON_INTERPRET=1)" if is_interpreted() else "off"
    yield "cpu threads", str(torch.get_num_threads())
    if not torch.cuda.is_available():
        yield "gpu", "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def tools() -> Iterator[tuple[str, str]]:
    """What Triton compiles with, and where compiled kernels and graphs are kept."""
    yield "c compiler", c_compiler() or "none found"
    for name, folder in caches().items():
        yield f"{name} cache", f"{folder} ({state_of_cache(folder)})"


def c_compiler() -> str | None:
    """The one that Triton takes."""
    named = os.environ.get("CC")
    found = [shutil.which(name) for name in ((named,) if named else ("gcc", "clang"))]
    return next(filter(None, found), None)


def caches() -> dict[str, Path]:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")
    return {
        "triton": Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")),
        "inductor": Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()),
    }


def state_of_cache(folder: Path) -> str:
    if not can_write(folder):
        return "cannot be written"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes):,} files, {sum(sizes) / MIB:.0f} MiB" if sizes else "empty"


def can_write(folder: Path) -> bool:
    """Whether the folder, or the first one above it that exists, takes new files."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def variables() -> Iterator[tuple[str, str]]:
    """The environment variables that are set and change what happens."""
    for name, value in sorted(os.environ.items()):
        if name.startswith(PREFIXES):
            yield name, value


def choices() -> Iterator[str]:
    """For each device and dtype, the implementation that impl="auto" takes, and the reason."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in DTYPES:
            kind = dtype, torch.device(device)
            impl, obstacle = choose(*kind, "auto"), BACKENDS["triton"].obstacle(*kind)
            if impl == "triton":
                reason = "the kernels run here"
            elif device == "cpu" and dtype != torch.float64:
                reason = "kernels are for CUDA; impl='triton' runs them in Triton's interpreter, to check them"
            else:
                reason = obstacle or "the interpreter is for checking the kernels: impl='triton' asks for it"
            yield f"{device:4}  {str(dtype).removeprefix('torch.'):8}  {impl:6}  {reason}"


class Facts(NamedTuple):
    """What the hints follow from.

    Attributes:
        has_gpu: torch finds one.
        has_driver: nvidia-smi is installed.
        is_cpu_build: this torch can use no GPU.
        obstacle: why the kernels do not take bfloat16 tensors on the GPU; empty where they do.
        has_compiler, has_headers: a C compiler, and Python.h.
        unwritable: the caches whose folders take no files, by name.
        interpreted: TRITON_INTERPRET=1 is set.
    """

    has_gpu: bool
    has_driver: bool
    is_cpu_build: bool
    obstacle: str
    has_compiler: bool
    has_headers: bool
    unwritable: dict[str, Path]
    interpreted: bool

    @classmethod
    def here(cls) -> "Facts":
        has_gpu = torch.cuda.is_available()
        return cls(
            has_gpu=has_gpu,
            has_driver=shutil.which("nvidia-smi") is not None,
            is_cpu_build=not (torch.version.cuda or torch.version.hip),
            obstacle=BACKENDS["triton"].obstacle(torch.bfloat16, torch.device("cuda")) if has_gpu else "",
            has_compiler=c_compiler() is not None,
            has_headers=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
            unwritable={name: folder for name, folder in caches().items() if not can_write(folder)},
            interpreted=is_interpreted(),
        )


def hints(facts: Facts) -> Iterator[str]:
    """What to try, the likeliest cause first."""
    if not facts.has_gpu and facts.has_driver and facts.is_cpu_build:
        yield "nvidia-smi is here, but this torch is for CPUs only: install a torch for CUDA (pytorch.org)"
    elif not facts.has_gpu and facts.has_driver:
        yield "torch finds no GPU: does nvidia-smi list one, and does CUDA_VISIBLE_DEVICES hide it?"
    elif not facts.has_gpu:
        yield "there is no GPU: plain PyTorch runs, with the same results; the speeds in the README are those of a GPU"
    if facts.obstacle:
        yield f"the kernels do not run on this GPU, and plain PyTorch is slow there: {facts.obstacle}"
    if facts.has_gpu and facts.interpreted:
        yield "TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests: unset it"
    if facts.has_gpu and not facts.has_compiler:
        yield "Triton needs a C compiler to launch kernels: install gcc, or name one in CC"
    if facts.has_gpu and not facts.has_headers:
        yield "Triton needs Python.h to launch kernels: install Python's headers (python3-dev on Debian and Ubuntu)"
    for name, folder in facts.unwritable.items():
        variable = {"triton": "TRITON_CACHE_DIR", "inductor": "TORCHINDUCTOR_CACHE_DIR"}[name]
        yield f"{folder} cannot be written: let {variable} name a folder that can"
    if facts.has_gpu:
        yield "the first call of each kind compiles kernels, for some seconds; later processes find them in the cache"
        yield "short sequences wait for the host: use CUDA graphs, or torch.compile with mode='reduce-overhead'"
    yield "wrong or slow results: flash-entmax check compares both with what is expected here"
    yield "an error after an update of torch or Triton: empty the caches above"
