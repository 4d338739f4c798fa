"""The pictures of the benchmark. Needs matplotlib."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from flash_entmax.show.plot.shared import shrink

from .settings import NAMES, OURS, TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    OURS: "#1257c4",
    "flash-attention-2": "#8a8f98",
    "cudnn": "#30343b",
    "flex-attention": "#b08a4f",
    "adasplash": "#d1495b",
    "sdpa": "#30343b",
    "dense-entmax": "#6a994e",
}
BASELINES = ("cudnn", "sdpa", "flash-attention-2")
COLUMNS = 4
PANEL, TIMES = 3.1, 4.6
RATIO_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
MILLISECOND_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
METHOD_COLOURS = ("#8a8f98", "#b08a4f", "#d1495b", "#6a994e", "#7fa8e8", "#1257c4")


def save_speed(content: dict, path: Path) -> Path | None:
    """A panel for each shape, then times by length and by captured inputs. None if nothing was timed."""
    results = [
        result
        for result in content["results"]
        if result["block_sparsity"] is not None and any(step_of(result, name) for name in NAMES)
    ]
    if not results:
        return None
    from matplotlib.figure import Figure

    baseline = next((name for name in BASELINES if any(step_of(result, name) for result in results)), None)
    shapes = sorted({shape_of(r) for r in results}, key=lambda shape: (*shape[:2], -shape[3], *shape[4:]))
    columns = max(2, min(COLUMNS, len(shapes)))
    rows = -(-len(shapes) // columns) if baseline else 0
    topics, captured = ([r for r in results if bool(r["captured"]) == is_captured] for is_captured in (False, True))
    heights = [PANEL * rows] * bool(rows) + [TIMES] * bool(topics) + [TIMES] * bool(captured)
    figure = Figure(figsize=(PANEL * columns + 1, sum(heights) + 1), layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if rows:
        draw_ratios(next(parts), results, shapes, baseline, rows, columns)
    if topics:
        draw_times(next(parts), topics)
    if captured:
        draw_captured_times(next(parts), captured)
    conditions = content["conditions"]
    machine = f"{conditions['device']}, {conditions['dtype']}, torch {conditions['torch']}, {conditions['date']}"
    title = f"Entmax attention beside softmax\n{machine}"
    heading = figure.suptitle(title, fontsize=12, weight="bold", x=0.01, ha="left")
    add_legend(figure, results)
    shrink(heading, 0.98 * figure.bbox.width)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def shape_of(result: dict) -> tuple[int, int, int, int, int, str]:
    """What the results of one panel share: the shape, and the file of captured inputs."""
    file = result["captured"]["file"] if result["captured"] else ""
    return result["length"], result["head_size"], result["heads"], result["key_heads"], result["batch"], file


def step_of(result: dict, name: str, key: str = "step_ms") -> float | None:
    return result["competitors"].get(name, {}).get(key)


def draw_ratios(part: "Figure", results: list[dict], shapes: list, baseline: str, rows: int, columns: int) -> None:
    """Step time relative to the baseline against block sparsity; a line for each competitor with several results."""
    panels = [[result for result in results if shape_of(result) == shape] for shape in shapes]
    names = [name for name in NAMES if any(sum(bool(step_of(r, name)) for r in panel) > 1 for panel in panels)] or NAMES
    grid = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    drawn, spare = grid.flat[: len(shapes)], grid.flat[len(shapes) :]
    for axes, shape, panel in zip(drawn, shapes, panels, strict=True):
        draw_ratio_panel(axes, panel, [name for name in names if name != baseline], baseline)
        length, head_size, heads, key_heads, batch, file = shape
        tokens = f"{length:,}" if batch == 1 else f"{batch} x {length:,}"
        origin = f"{Path(file).stem}\n" if file else ""
        shared = "" if heads == key_heads else f"/{key_heads}"
        axes.set_title(f"{origin}{tokens} tokens, {heads}{shared} heads of {head_size}", fontsize=9.5, loc="left")
    for axes in spare:
        axes.set_axis_off()
    name_ticks(grid[0, 0].yaxis, RATIO_TICKS, grid[0, 0].get_ylim())
    part.supxlabel("block sparsity (share of visible 64 x 64 tiles without support)", fontsize=10)
    part.supylabel(f"training step, over {TITLES[baseline]}'s", fontsize=10)


def draw_ratio_panel(axes: "Axes", results: list[dict], names: list[str], baseline: str) -> None:
    axes.axhline(1.0, color=COLOURS[baseline], linewidth=1.8, zorder=1)
    for name in names:
        points = sorted(
            (result["block_sparsity"], step_of(result, name) / step_of(result, baseline))
            for result in results
            if step_of(result, name) and step_of(result, baseline)
        )
        draw_line(axes, name, points)
    axes.set(yscale="log", xlim=(-0.04, 1.04))
    axes.grid(True, which="major", color="#e3e5e8", linewidth=0.7)
    axes.tick_params(labelsize=8.5)


def draw_line(axes: "Axes", name: str, points: list[tuple[float, float]]) -> None:
    is_ours = name == OURS
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[name],
            marker="o",
            markersize=5 if is_ours else 3.5,
            linewidth=2.4 if is_ours else 1.3,
            zorder=3 if is_ours else 2,
        )


def draw_times(part: "Figure", results: list[dict]) -> None:
    """Milliseconds against length, for the smallest head size, without grouped heads if possible.

    Every competitor is shown on the sparsest inputs that it ran on.
    """
    head_size = min(result["head_size"] for result in results)
    same = [result for result in results if result["head_size"] == head_size]
    same = [result for result in same if result["heads"] == result["key_heads"]] or same
    same = sorted(same, key=lambda result: (result["length"], result["block_sparsity"]))
    sparsest = {result["length"]: result for result in same}
    lengths = list(sparsest)
    low, high = (edge(result["block_sparsity"] for result in sparsest.values()) for edge in (min, max))
    sparsity = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    for axes, key, title in zip(
        part.subplots(1, 2), ("forward_ms", "step_ms"), ("forward", "training step"), strict=True
    ):
        for name in NAMES:
            points = {result["length"]: time for result in same if (time := step_of(result, name, key))}
            draw_line(axes, name, list(points.items()))
        axes.set(xscale="log", yscale="log")
        axes.set_title(
            f"{title}, milliseconds\nheads of {head_size}, block sparsity {sparsity}", fontsize=9.5, loc="left"
        )
        axes.set_xticks(lengths, [f"{length:,}\n{result['heads']} heads" for length, result in sparsest.items()])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("tokens", fontsize=10)
        format_times(axes)


def draw_captured_times(part: "Figure", results: list[dict]) -> None:
    """Milliseconds of every captured case, by its name. A line joins the cases of one file and shape."""
    labels = [f"{result['inputs']}  {result['block_sparsity']:.2f}" for result in results]
    for axes, key, title in zip(
        part.subplots(1, 2), ("forward_ms", "step_ms"), ("forward", "training step"), strict=True
    ):
        for name, shape in product(NAMES, {shape_of(result) for result in results}):
            same = [(place, result) for place, result in enumerate(results) if shape_of(result) == shape]
            draw_line(axes, name, [(place, time) for place, result in same if (time := step_of(result, name, key))])
        axes.set(yscale="log")
        axes.set_title(f"{title}, milliseconds", fontsize=9.5, loc="left")
        axes.set_xticks(range(len(results)), labels, rotation=90)
        axes.set_xlabel("captured inputs, and their block sparsity", fontsize=10)
        format_times(axes)


def format_times(axes: "Axes") -> None:
    """The grid, and ticks in milliseconds, of an axis of times."""
    name_ticks(axes.yaxis, MILLISECOND_TICKS, axes.get_ylim())
    axes.grid(True, which="major", color="#e3e5e8", linewidth=0.7)
    axes.tick_params(labelsize=8.5)


def name_ticks(axis, ticks: tuple[float, ...], limits: tuple[float, float]) -> None:
    """Label an axis by plain numbers instead of powers of ten: the ticks within its limits."""
    seen = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    axis.set_ticks(seen, [f"{tick:g}" for tick in seen])
    axis.set_ticks([], minor=True)


def add_legend(figure: "Figure", results: list[dict]) -> None:
    from matplotlib.lines import Line2D

    names = [name for name in NAMES if any(step_of(result, name) for result in results)]
    handles = [
        Line2D([], [], color=COLOURS[name], label=TITLES[name], linewidth=2.4 if name == OURS else 1.3)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9.5)


def save_refinement(content: dict, path: Path) -> Path:
    """Left: steps against length, over all distributions. Right: steps by distribution, at the longest length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    draw_steps_by_length(left, content)
    draw_steps_by_distribution(right, content)
    title = f"Steps until the probabilities of a row sum to 1 within {content['tolerance']:g}"
    figure.suptitle(title, fontsize=12, weight="bold", x=0.01, ha="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def draw_steps_by_length(axes: "Axes", content: dict) -> None:
    lengths = sorted({result["length"] for result in content["results"]})
    for (name, method), colour in zip(content["methods"].items(), METHOD_COLOURS, strict=True):
        at = [[r for r in content["results"] if r["method"] == name and r["length"] == length] for length in lengths]
        mean = [sum(result["mean_steps"] for result in found) / len(found) for found in at]
        worst = [max(result["worst_steps"] for result in found) for found in at]
        axes.plot(lengths, mean, color=colour, marker="o", markersize=4, linewidth=2, label=method["title"])
        axes.plot(lengths, worst, color=colour, linestyle=":", linewidth=1.3)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8.5)
    axes.set_xticks([], minor=True)
    name_ticks(axes.yaxis, (1, 2, 3, 5, 10, 20, 30), axes.get_ylim())
    axes.set_xlabel("keys of the row", fontsize=10)
    axes.set_title("mean row (solid) and worst row (dotted) of all distributions", fontsize=9.5, loc="left")
    axes.grid(True, which="major", color="#e3e5e8", linewidth=0.7)


def draw_steps_by_distribution(axes: "Axes", content: dict) -> None:
    longest = max(result["length"] for result in content["results"])
    found = [result for result in content["results"] if result["length"] == longest]
    distributions = list(dict.fromkeys(result["distribution"] for result in found))
    for number, (name, colour) in enumerate(zip(content["methods"], METHOD_COLOURS, strict=True)):
        steps = {result["distribution"]: result["mean_steps_of_tile"] for result in found if result["method"] == name}
        apart = 0.13 * (number - 2.5)  # methods with equal steps stand one under another
        places = [distributions.index(distribution) + apart for distribution in steps]
        axes.scatter(list(steps.values()), places, color=colour, s=34, zorder=3)
    for border in range(1, len(distributions)):
        axes.axhline(border - 0.5, color="#c9ccd1", linewidth=0.6)
    axes.set(xscale="log")
    axes.set_yticks(range(len(distributions)), distributions, fontsize=9)
    axes.invert_yaxis()
    name_ticks(axes.xaxis, (1, 2, 3, 5, 10, 20, 30), axes.get_xlim())
    axes.set_title(f"{longest:,} keys: steps of a tile of 64 rows, by distribution of scores", fontsize=9.5, loc="left")
    axes.grid(True, which="major", axis="x", color="#e3e5e8", linewidth=0.7)
