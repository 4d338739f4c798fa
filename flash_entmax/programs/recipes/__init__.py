"""Claims about models, each reproduced by one command: flash-entmax recipe NAME.

Needs matplotlib, rich and safetensors: pip install "flash-entmax[recipes]".
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..errors import CommandError, device_for, require

# Those that train models by the plan in sweep.py, and those that look at the models of another.
TRAINED = ("max-retrieval", "sort", "reverse", "language-model")
MEASURED = ("sparsity", "training-speed")
NAMES = (*TRAINED, *MEASURED)
SIZES = ("toy", "small", "full")  # in seconds, in minutes on a laptop, in minutes on a GPU


@dataclass(frozen=True)
class Options:
    """What the command line said; ``device`` is "cpu" or "cuda", and ``text`` the language model's corpus."""

    out: Path
    size: str
    device: str
    text: Path | None = None
    workers: int | None = None


def options_for(out: Path, size: str | None, device: str, text: Path | None, workers: int | None) -> Options:
    """``device`` may be "auto", and the size None: what fits the device."""
    require("recipes", "matplotlib", "rich", "safetensors")
    device = device_for(device)
    if workers is not None and workers < 1:
        raise CommandError(f"--workers must be at least 1, got {workers}")
    if text is not None and not text.exists():
        raise CommandError(f"--text {text}: no such file or folder")
    return Options(out, size or ("full" if device == "cuda" else "small"), device, text, workers)


def run(name: str, options: Options) -> None:
    """Do what is not in the results yet; write results, tables and pictures."""
    from . import sweep

    if name in TRAINED:
        sweep.run(name, options)
    else:
        module_of(name).run(options)


def module_of(name: str):
    """The recipe: one module for each, but for `sort` and `reverse`, which share theirs."""
    from . import sequences

    twins = {"sort": sequences.SORT, "reverse": sequences.REVERSE}
    return twins.get(name) or import_module(f".{name.replace('-', '_')}", __name__)
