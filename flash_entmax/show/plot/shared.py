"""What the pictures share: the colours of probabilities, the ink on these colours, and how a picture is written."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.text import Text

INVISIBLE = "#e3e5e8"


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install '.[plot]', from a clone") from error


FORMATS = ".png", ".pdf", ".svg"


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write the figure and its folder, and return ``path``. The suffix names the format: .png, .pdf or .svg."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS)}, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def shrink(text: "Text", width: float) -> None:
    """Take a smaller font until the text is no wider, in pixels, down to 4 points."""
    while text.get_window_extent().width > width and text.get_fontsize() > 4:
        text.set_fontsize(0.96 * text.get_fontsize())


def colours() -> "Colormap":
    """The colour map: light yellow for the smallest positive number, dark red for the largest."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attention", colormaps["YlOrRd"](torch.linspace(0.2, 1.0, 128).tolist()))


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever has more contrast to the colour, as WCAG defines it by relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "white" if luminance < 0.179 else "black"


def shade(probability: Tensor) -> Tensor:
    """The place of a probability on the colour scale, 0 to 1: its square root, which tells small ones apart."""
    return probability.clamp(0, 1).sqrt()
