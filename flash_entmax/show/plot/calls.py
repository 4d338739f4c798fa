"""Pictures of recorded calls: support size by layer and head, one head's map, block sparsity along the text."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.checks import is_int, typed
from ...inspection import Recorded
from .shared import INVISIBLE, colours, ink_on, require_matplotlib, shrink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_CELLS = 256
MOST_NUMBERS = 24  # heads: with more, a cell has no room for its number
MOST_LAYER_NUMBERS = 40  # layers: with more, the axis has no room for every number
GREY = "#444"
TITLE_SIZE = 13


def support_figure(calls: Sequence[Recorded], title: str) -> "Figure":
    """A heat map with numbers: the mean support size by layer (row) and head (column). Redder means more keys.

    Args:
        calls: one for each layer, which may differ in their numbers of heads.
        title: one line.
    """
    require_matplotlib()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    check_calls(calls)
    sizes = [call.keys_per_query.cpu() for call in calls]
    heads, palette = max(map(len, sizes)), colours()
    positive = [size for row in sizes for size in row.tolist() if size > 0]
    norm = LogNorm(min(positive, default=1.0) / 1.02, max(positive, default=1.0) * 1.02)
    height, width = 1.5 + max(1.2, 0.36 * len(calls)), 2.4 + max(3.6, 0.52 * min(heads, MOST_NUMBERS))
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.95 / width, 0.6 / height, 1 - 2.25 / width, 1 - 1.35 / height))
    grid = torch.full((len(sizes), heads), torch.nan, dtype=torch.float64)
    for layer, size in enumerate(sizes):
        grid[layer, : len(size)] = size
    image = axes.imshow(grid.numpy(), cmap=palette, norm=norm, aspect="auto")
    if heads <= MOST_NUMBERS:
        for layer, row in enumerate(sizes):
            for head, size in enumerate(row.tolist()):
                ink = "black" if math.isnan(size) else ink_on(palette(float(norm(size))))
                axes.text(head, layer, compact(size), color=ink, fontsize=9, ha="center", va="center_baseline")
    axes.set_xticks(range(0, heads, 1 + heads // (MOST_NUMBERS + 1)))
    axes.set_yticks(range(len(calls)), [call.number for call in calls])
    axes.set(xlabel="head", ylabel="layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edges, axis in ((range(heads), axes.axvline), (range(len(calls)), axes.axhline)):
        for edge in edges:
            axis(edge - 0.5, color="white", linewidth=1.5)
    bar = figure.add_axes((1 - 1.12 / width, 0.6 / height, 0.16 / width, 1 - 1.35 / height))
    scale = figure.colorbar(image, cax=bar, format=lambda size, _: f"{size:.3g}")
    scale.set_ticks(log_ticks(norm.vmin, norm.vmax))
    scale.minorticks_off()
    scale.outline.set_visible(False)
    scale.set_label("keys per query", fontsize=10)
    seen = max(call.visible_per_query for call in calls)
    add_titles(figure, title, f"Mean number of {said_of(calls)}, of {compact(seen)} visible on average")
    return figure


def map_figure(call: Recorded, title: str, batch: int = 0, head: int = 0, cells: int = MAP_CELLS) -> "Figure":
    """One head's attention, with queries down and keys across. White is exactly zero, and grey is hidden.

    Of a state-space layer, white is what is not among the largest shares of a row, and is "other".

    Up to ``cells`` queries and keys, a cell is one probability. Beyond, a cell is a square of pairs, coloured by the
    share of its pairs that are positive.
    """
    require_matplotlib()
    from matplotlib.colors import LogNorm, PowerNorm
    from matplotlib.figure import Figure

    if not is_int(cells) or cells < 1:
        raise ValueError(f"cells must be an integer of at least 1, got {typed(cells)}")
    p, rows = call.problem, call.rows(batch, head).cpu()
    square = max(1, math.ceil(max(p.query_length, p.key_length) / cells))
    if square == 1:
        density, norm = rows.to_dense().double(), PowerNorm(0.5, vmin=0, vmax=1)
        ticks, label = [0.01, 0.1, 0.25, 0.5, 1.0], "probability" if call.covered == 1 else "share"
    else:
        density = binned(rows, square)
        norm = LogNorm(1 / square**2, 1)
        ticks = [10.0**-power for power in range(1 + int(math.log10(square**2)))]
        entries = "with positive probability" if call.covered == 1 else "that are kept"
        label = f"share of pairs {entries}, in squares of {square}"
    image = torch.as_tensor(colours()(norm(density.clamp_min(1e-12).numpy()))[..., :3])
    image[density == 0] = 1.0
    hidden = call.visibility(batch, head).hidden(p.key_length, square).cpu()
    image[hidden] = torch.tensor(rgb(INVISIBLE), dtype=image.dtype)
    width, height = 6.8, 6.4
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.8 / width, 0.5 / height, 4.9 / width, 4.9 / height))
    axes.imshow(image.numpy(), interpolation="nearest", extent=(0, p.key_length, p.query_length, 0), aspect="auto")
    axes.set(xlabel="key", ylabel="query")
    axes.tick_params(labelsize=9)
    axes.spines[:].set_color("#999")
    bar = figure.add_axes((5.82 / width, 0.5 / height, 0.13 / width, 4.9 / height))
    add_colourbar(figure, bar, norm, ticks, label)
    size, share = call.keys_per_query[head].item(), 100 * call.block_sparsity[head].item()
    white = "exactly zero" if call.covered == 1 else f"other, at most {100 - 100 * call.covered:g} % of an output"
    tile = call.tile
    add_titles(
        figure,
        title,
        f"{compact(size)} of {compact(call.visible_per_query)} visible keys per query; {share:.0f} % of the visible "
        f"{tile} x {tile} tiles are empty\nwhite: {white}; grey: hidden from the query",
    )
    return figure


def sparsity_figure(calls: Sequence[Recorded], title: str) -> "Figure":
    """A heat map: block sparsity by layer (row) and position of the queries. Redder means fewer empty tiles.

    Args:
        calls, title: as for :func:`support_figure`.
    """
    require_matplotlib()
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    check_calls(calls)
    grid, tile = sparsity_grid(calls)
    width, height = 8.2, 1.5 + min(7.0, max(1.8, 0.2 * len(calls)))
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.75 / width, 0.6 / height, 1 - 2.0 / width, 1 - 1.4 / height))
    end = max(call.problem.query_length for call in calls)
    norm, palette = Normalize(0, 100), colours().reversed()
    extent = (0, tile * grid.shape[1], len(calls) - 0.5, -0.5)
    axes.imshow(100 * grid.numpy(), cmap=palette, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    axes.set_facecolor(INVISIBLE)
    step = 1 + (len(calls) - 1) // MOST_LAYER_NUMBERS
    axes.set_yticks(range(0, len(calls), step), [call.number for call in calls[::step]])
    axes.set(xlabel="position of the query (token)", ylabel="layer", xlim=(0, end))
    axes.tick_params(length=2, labelsize=9)
    axes.spines[:].set_visible(False)
    for edge in range(1, len(calls)):
        axes.axhline(edge - 0.5, color="white", linewidth=0.8)
    bar = figure.add_axes((1 - 1.05 / width, 0.6 / height, 0.16 / width, 1 - 1.4 / height))
    add_colourbar(figure, bar, norm, [0, 25, 50, 75, 100], "empty tiles, %", palette)
    tiles = {call.tile for call in calls}
    size = f"{tile} x {tile} " if len(tiles) == 1 else ""
    about = f"Share of the {size}tiles with a visible key that hold no {said_of(calls)}"
    add_titles(figure, title, about)
    return figure


def check_calls(calls: object) -> None:
    if not isinstance(calls, Sequence):
        raise TypeError(f"calls must be a list of recorded calls, got {typed(calls)}")
    if not any(len(call.keys_per_query) for call in calls):
        raise ValueError("no call with a head to picture")


def said_of(calls: Sequence[Recorded]) -> str:
    """What is counted as a key of a query, in words."""
    covered = sorted({call.covered for call in calls})
    words = "keys with positive probability"
    if covered[0] < 1:
        kept = f"tokens that make up {100 * covered[0]:g} % of an output"
        words = kept if covered[-1] < 1 else f"{words} (state-space: {kept})"
    return words


def sparsity_grid(calls: Sequence[Recorded]) -> tuple[Tensor, int]:
    """Block sparsity (layers, tiles of queries) float64, NaN past the end of a call; and the smallest tile size."""
    smallest = min(call.tile for call in calls)
    rows = [call.block_sparsity_by_position.cpu().repeat_interleave(call.tile // smallest) for call in calls]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan), smallest


def binned(rows: Tensor, square: int) -> Tensor:
    """Sparse CSR (query length, key length) -> (squares, squares) float64: the share of pairs with an entry."""
    squares = [math.ceil(length / square) for length in rows.shape]
    row = torch.arange(rows.shape[0]).repeat_interleave(rows.crow_indices().diff()) // square
    cell = row * squares[1] + rows.col_indices() // square
    counts = torch.bincount(cell, minlength=squares[0] * squares[1]).view(squares).double()
    queries, keys = (
        torch.full((n,), square).clamp_max(length - square * torch.arange(n))
        for n, length in zip(squares, rows.shape, strict=True)
    )
    return counts / (queries.unsqueeze(-1) * keys)


def add_colourbar(figure: "Figure", axes: "Axes", norm, ticks: list[float], label: str, palette=None) -> None:
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(norm, palette or colours())
    bar = figure.colorbar(mappable, cax=axes, ticks=ticks, format=lambda share, _: f"{share:g}")
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=10)
    axes.tick_params(labelsize=9)


def add_titles(figure: "Figure", title: str, explained: str) -> None:
    width, height = figure.get_size_inches()
    place = 0.16 / width, 1 - 0.27 / height
    heading = figure.text(*place, title, fontsize=TITLE_SIZE, weight="bold", va="center", parse_math=False)
    place = 0.16 / width, 1 - 0.46 / height
    explanation = figure.text(*place, explained, fontsize=10, va="top", color=GREY, parse_math=False)
    for text in (heading, explanation):
        shrink(text, (width - 2 * 0.16) * figure.dpi)


def compact(number: float) -> str:
    """Rounded for a narrow cell: one decimal below 100, thousands from 10,000 on; a dash for NaN."""
    if math.isnan(number):
        return "-"
    return f"{number:.1f}" if number < 99.95 else f"{number:.0f}" if number < 9999.5 else f"{number / 1000:.0f}k"


def log_ticks(low: float, high: float) -> list[float]:
    """The round numbers 1, 2, 5, 10, ... of a range; the ends of the range if there are fewer than two."""
    found = [step * 10**power for power in range(6) for step in (1, 2, 5) if low <= step * 10**power <= high]
    return found if len(found) > 1 else [low, high]


def rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
