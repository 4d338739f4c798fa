"""The backend in Triton: the kernels, for CUDA tensors, and for CPU tensors under Triton's interpreter.

Importing this package imports no Triton: the first call that needs a kernel does.
"""

import os
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

import torch

from .config import tile_size as tile_size

TRITON_IS_INSTALLED = find_spec("triton") is not None
OLDEST = 3, 6  # version of Triton that compiles all kernels


def installed_version() -> tuple[int, int] | None:
    """None where Triton is not installed under its own name, as for ROCm."""
    try:
        major, minor, *_ = version("triton").split(".")
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


VERSION = installed_version()
HOMES = {
    "reach_shapes": "reach",
    "reached_tiles": "reach",
    "summarise": "attention",
    "append_keys": "append",
    "attention_forward": "attention",
    "prepare": "prepared",
    "prepare_step": "prepared",
    "attention_paged": "attention",
    "attention_backward": "attention",
    "attention_tangent": "attention",
    "attention_support": "attention",
    "row_maxima": "parts",
    "sums_at": "parts",
    "output_at": "parts",
    "entmax": "rows",
    "entmax_backward": "rows",
    "loss": "rows",
    "loss_backward": "rows",
}


def obstacle(dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels cannot take tensors of this dtype on this device; empty if they can."""
    if dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, got float64"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16"
    elif device.type != "cuda":
        return f"the kernels run on CUDA devices, got {device}"
    elif VERSION is not None and VERSION < OLDEST:
        return f"the kernels need Triton {'.'.join(map(str, OLDEST))}, got {'.'.join(map(str, VERSION))}"
    elif not torch.version.hip and capability(device) < (8, 0):
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if not TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    return ""


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability. A compiler asks for itself: it does not trace caches."""
    return torch.cuda.get_device_capability(device) if torch.compiler.is_compiling() else kept_capability(device)


kept_capability = cache(torch.cuda.get_device_capability)


def is_default_for(device: torch.device) -> bool:
    """The interpreter is for tests."""
    return device.type != "cpu"


def __getattr__(name: str):
    """The other functions of a backend, each from the module that launches its kernels."""
    if name in HOMES:
        return getattr(home_of(name), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def home_of(name: str) -> ModuleType:
    return import_module(f".{HOMES[name]}", __name__)
