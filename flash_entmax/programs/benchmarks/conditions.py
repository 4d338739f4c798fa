"""The conditions of a measurement: machine, versions, settings, and how time was taken."""

import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flash_entmax import __version__

from .measure import timing_method
from .settings import ALPHA, BenchSettings

PEERS = ("adasplash", "entmax")
GROUPED_HEADS = (
    "softmax takes them by enable_gqa; where a backend refuses, a note says that the timed call repeats keys and "
    "values; dense entmax repeats them"
)


def conditions_of(settings: BenchSettings) -> dict[str, object]:
    return {
        "device": device_name(settings),
        "driver": driver() if settings.on_cuda else None,
        "flash_entmax": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if settings.on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if settings.on_cuda else None,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "peers": {name: version_of(name) for name in PEERS},
        "date": time.strftime("%Y-%m-%d"),
        "command": settings.command,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "causal": True,
        "alpha": ALPHA,
        "inputs": inputs_of(settings),
        "grouped_heads": GROUPED_HEADS if any(case.group > 1 for case in settings.cases) else None,
        "timing": timing_method(settings),
        "clocks": "not changed",
    }


def inputs_of(settings: BenchSettings) -> str:
    sources = (str(case.captured or "testing.topic_inputs, seed 0") for case in settings.cases)
    return "; ".join(dict.fromkeys(sources))


def device_name(settings: BenchSettings) -> str:
    if settings.on_cuda:
        return torch.cuda.get_device_name()
    return f"{processor() or platform.machine()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The name of the processor's model on Linux; what Python knows of it elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
