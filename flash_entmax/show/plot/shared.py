"""What the pictures share: the colours of a probability, the text that is read on them, and how they are written."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INVISIBLE = "#e3e5e8"


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'flash-entmax[plot]'") from error


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write to ``path``, in the format that its suffix names (.png, .pdf, .svg), and return it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def colours() -> "Colormap":
    """From light yellow, for the smallest positive number, to dark red."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attention", colormaps["YlOrRd"](torch.linspace(0.2, 1.0, 128).tolist()))


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on the colour: by relative luminance, as WCAG defines contrast."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "white" if luminance < 0.179 else "black"


def shade(probability: Tensor) -> Tensor:
    """Where on the colour scale a probability lies: its square root, so that small ones can be told apart."""
    return probability.clamp(0, 1).sqrt()
