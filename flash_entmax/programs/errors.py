"""What the commands of `flash-entmax` share: one error, and checks that run before any work."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile


class CommandError(Exception):
    """A command cannot do what was asked; the message is for the person who asked."""


def require(extra: str, *packages: str) -> None:
    """Raise a CommandError that names the extra to install, if one of the packages is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise CommandError(f"needs {' and '.join(missing)}: pip install '.[{extra}]', from a clone")


def device_for(choice: str) -> str:
    """``choice`` is "auto", "cpu" or "cuda". "auto" becomes "cuda" if there is a GPU, else "cpu"."""
    import torch

    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: PyTorch finds no CUDA device here")
    return choice


def make_folder(path: Path, option: str = "--out") -> None:
    """Make the folder of the results, which the option named, and see that files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror}") from error
