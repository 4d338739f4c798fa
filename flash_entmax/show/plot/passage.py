"""The attention of a short passage: a map for every head, and the text as one of its bytes sees it."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shared import INVISIBLE, colours, require_matplotlib, save_figure, shade

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, SMALL_PANEL, MANY_HEADS = 2.0, 1.5, 6
TEXT_WIDTH = 5.6
MARGINS = {"left": 0.75, "right": 0.2, "top": 1.4, "bottom": 1.55}
LINE_LENGTH = 48
FEWEST_LINES = 7
LETTERS_PER_INCH = 11.5
MARK = "#1257c4"


def save_attention(probability: Tensor, text: bytes, position: int, title: str, path: Path) -> None:
    """Write :func:`attention_figure` to ``path``, in the format that its suffix names (.png, .pdf, .svg)."""
    save_figure(attention_figure(probability, text, position, title), path)


def attention_figure(probability: Tensor, text: bytes, position: int, title: str) -> "Figure":
    """A row for each layer: a map (query x key) of every head, then the passage as one byte sees it.

    A probability of exactly zero is white. The passage is coloured for the head that attends farthest back from this
    byte.

    Args:
        probability: (layers, heads, length, length), causal attention of a passage to itself.
        text: the passage, ``length`` bytes.
        position: the byte whose attention colours the passage.
        title: which model and text this is; one line.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    layers, heads, length, _ = probability.shape
    if len(text) != length:
        raise ValueError(f"text must have a byte for each of the {length} positions, got {len(text)}")
    probability = probability.detach().double().cpu()
    panel = SMALL_PANEL if heads >= MANY_HEADS else PANEL
    width = MARGINS["left"] + heads * panel + TEXT_WIDTH + MARGINS["right"]
    height = MARGINS["top"] + layers * (panel + 0.3) + MARGINS["bottom"]
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        layers,
        heads + 1,
        width_ratios=[panel] * heads + [TEXT_WIDTH],
        left=MARGINS["left"] / width,
        right=1 - MARGINS["right"] / width,
        top=1 - MARGINS["top"] / height,
        bottom=MARGINS["bottom"] / height,
        hspace=0.2,
        wspace=0.12,
    )
    for layer in range(layers):
        for head in range(heads):
            axes = figure.add_subplot(grid[layer, head])
            draw_map(axes, probability[layer, head], position)
            label_map(axes, layer, head, is_first=head == 0, is_last=layer == layers - 1)
        axes = figure.add_subplot(grid[layer, heads])
        head = farthest_head(probability[layer, :, position])
        draw_text(axes, probability[layer, head, position], text, position)
        size = int((probability[layer, head, position] > 0).sum())
        seen = f"layer {layer + 1}, head {head + 1}: attends to {size} of {position + 1} bytes"
        axes.set_title(seen, fontsize=11, loc="left", pad=3)
    add_titles(figure, title, position, height)
    add_legend(figure, width, height)
    return figure


def farthest_head(probability: Tensor) -> int:
    """The head that attends to the smallest mean position. probability is (heads, length), of one query."""
    return int((probability @ torch.arange(probability.shape[-1], dtype=probability.dtype)).argmin())


def draw_map(axes: "Axes", probability: Tensor, position: int) -> None:
    """White where a probability is zero, grey where the mask hides the key. probability is (length, length)."""
    from matplotlib.colors import to_rgb

    length = probability.shape[-1]
    image = torch.tensor(colours()(shade(probability).numpy())[..., :3])
    image[probability == 0] = 1.0
    image[torch.ones(length, length).triu(1).bool()] = torch.tensor(to_rgb(INVISIBLE), dtype=image.dtype)
    axes.imshow(image.numpy(), interpolation="nearest")
    axes.axhline(position, color=MARK, linewidth=0.7)
    size = (probability > 0).sum(-1).double().mean()
    axes.set_title(f"{size:.1f} keys per query", fontsize=10, pad=3)


def label_map(axes: "Axes", layer: int, head: int, is_first: bool, is_last: bool) -> None:
    axes.tick_params(labelsize=8, length=2, labelleft=is_first, labelbottom=is_last)
    axes.text(0.97, 0.95, f"head {head + 1}", transform=axes.transAxes, fontsize=9, ha="right", va="top", color="#444")
    if is_first:
        axes.set_ylabel(f"layer {layer + 1}\nquery (byte)", fontsize=10)
    if is_last:
        axes.set_xlabel("key (byte)", fontsize=10)


def lines_of(text: bytes) -> list[list[int]]:
    """The positions of each printed line, which ends with a newline or after LINE_LENGTH bytes."""
    lines, line = [], []
    for index, byte in enumerate(text):
        line.append(index)
        if byte == ord("\n") or len(line) == LINE_LENGTH:
            lines.append(line)
            line = []
    return [*lines, line] if line else lines


def glyph(byte: int) -> str:
    """The character that is drawn for a byte: itself, an arrow for a newline, a dot for what does not print."""
    return "↵" if byte == ord("\n") else chr(byte) if 32 <= byte < 127 else "·"


def draw_text(axes: "Axes", probability: Tensor, text: bytes, position: int) -> None:
    """The passage: every byte on the colour of its probability, a frame around the query, grey ink after it."""
    from matplotlib.patches import Rectangle

    palette, lines = colours(), lines_of(text)
    rows = max(len(lines), FEWEST_LINES)
    for row, line in enumerate(lines):
        for column, index in enumerate(line):
            p = probability[index]
            if p > 0:
                axes.add_patch(Rectangle((column, row), 1, 1, color=palette(float(shade(p))), linewidth=0))
            if index == position:
                axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=MARK, linewidth=1.8, zorder=3))
            faint = index > position or (text[index] == ord("\n") and p == 0)
            ink = "white" if p > 0.4 else "#a0a0a0" if faint else "black"
            style = {"family": "monospace", "fontsize": 11.5, "ha": "center", "va": "center_baseline"}
            axes.text(column + 0.5, row + 0.5, glyph(text[index]), color=ink, parse_math=False, **style)
    axes.set(xlim=(-0.5, LINE_LENGTH + 0.5), ylim=(rows + 0.2, -0.2))
    axes.set_axis_off()


def add_titles(figure: "Figure", title: str, position: int, height: float) -> None:
    left = MARGINS["left"] / figure.get_figwidth()
    figure.text(left, 1 - 0.35 / height, title, fontsize=15, weight="bold", va="center")
    explained = (
        "Left: each row of a map is one byte of the passage, each coloured cell an earlier byte that it attends to. "
        f"Right: the passage as byte {position} sees it (blue), "
        "through the head of each layer that attends farthest back."
    )
    explained = textwrap.fill(explained, int(LETTERS_PER_INCH * (figure.get_figwidth() - MARGINS["left"])))
    figure.text(left, 1 - 0.57 / height, explained, fontsize=11, va="top", color="#333", linespacing=1.4)


def add_legend(figure: "Figure", width: float, height: float) -> None:
    """The colour scale, and what white, grey and blue mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bar = figure.add_axes((MARGINS["left"] / width, 0.45 / height, 4.0 / width, 0.16 / height))
    scale = ScalarMappable(PowerNorm(0.5, vmin=0, vmax=1), colours())
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[0.01, 0.1, 0.25, 0.5, 1.0])
    bar.set_xticklabels(["0.01", "0.1", "0.25", "0.5", "1"])
    bar.set_title("probability, where it is not zero", fontsize=10, pad=4)
    bar.tick_params(labelsize=9)
    marks = [
        Patch(facecolor="white", edgecolor="#777", label="exactly zero"),
        Patch(facecolor=INVISIBLE, edgecolor="#777", label="not visible: later than the query"),
        Line2D([], [], color=MARK, label="the query shown at the right"),
    ]
    figure.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=((MARGINS["left"] + 4.6) / width, 0.5 / height),
        fontsize=10,
        frameon=False,
    )
