"""The report of a recipe: for each of its measures a table and a picture, over the seeds."""

from collections.abc import Callable, Iterator
from math import isfinite, nan
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from .recipe import Measure, Recipe, ScoredRecipe


def write(console: Console, recipe: Recipe, results: dict, path: Path) -> None:
    facts = (f"{name} {value}" for name, value in results["conditions"].items() if name != "settings")
    console.print(", ".join(facts), soft_wrap=True)
    validation = Table(title=f"validation loss, nats: {recipe.validation}", title_justify="left")
    for heading in ("arm", "learning rate", seeds_of(results), "each"):
        validation.add_column(heading)
    for arm, rate in results["best"].items():
        losses = [results["runs"][key]["validation"] for key in results["chosen"][arm]]
        by_seed = "  ".join(f"{loss:.4f}" for loss in losses)
        rates = results["rates"][arm]
        edge = " (end of the grid)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        validation.add_row(arm, f"{rate:g}{edge}", over_seeds(losses, "{:.4f}".format), by_seed)
    console.print(validation)
    for measure in recipe.measures:
        console.print(table(measure, results))
        picture = draw(measure, results, path.with_name(f"{path.stem}-{measure.key}.png"))
        console.print(f"{picture}", soft_wrap=True)
    if isinstance(recipe, ScoredRecipe) and "best_checkpoints" in results:
        for measure in recipe.measures:
            console.print(table_of_best(measure, results, recipe.scored))
    console.print(f"{results['seconds']:.0f} s, of earlier runs too; the numbers are {path}", soft_wrap=True)


def over_seeds(values: list[float], shown: Callable[[float], str]) -> str:
    """Mean ± the sample's standard deviation; the number alone if there is one seed.

    A training that failed has an infinite loss. It counts in the mean, and the deviation is then nan.
    """
    deviation = stdev(values) if len(values) > 1 and all(map(isfinite, values)) else nan
    return shown(mean(values)) + (f" ± {shown(deviation).removeprefix('+')}" if len(values) > 1 else "")


def seeds_of(results: dict, shown: str = "mean and standard deviation") -> str:
    count = len(next(iter(results["chosen"].values())))
    return "one seed" if count == 1 else f"{shown} of {count} seeds"


def places(measure: Measure, results: dict, arm: str) -> Iterator[tuple[str, list[float]]]:
    """(place, one number per seed), for each place."""
    found = [results["measures"][key][measure.key] for key in results["chosen"][arm]]
    for place in found[0]:
        yield place, [by_place[place] for by_place in found]


def some(places: list, most: int) -> list:
    """At most so many places, evenly spaced, the last one included."""
    step = -(-len(places) // most)
    return places[::-1][::step][::-1]


def table(measure: Measure, results: dict) -> Table:
    title = f"{measure.title}, by {measure.place}: {seeds_of(results)}"
    result = Table(title=title, title_justify="left")
    result.add_column("arm")
    rows = {arm: some(list(places(measure, results, arm)), measure.columns) for arm in results["chosen"]}
    for place, _ in next(iter(rows.values())):
        result.add_column(heading(place), justify="right")
    for arm, cells in rows.items():
        result.add_row(arm, *(over_seeds(values, f"{{:.{measure.digits}f}}".format) for _, values in cells))
    return result


def table_of_best(measure: Measure, results: dict, scored: str) -> Table:
    """One model of each arm: of all its rates, seeds and checkpoints, the one with the highest score."""
    title = f"{measure.title}, by {measure.place}: the best of rates, seeds and checkpoints, by {scored}"
    result = Table(title=title, title_justify="left")
    result.add_column("arm")
    result.add_column("learning rate, seed, checkpoint")
    for arm, key in results["best_checkpoints"].items():
        found = results["best_measures"][key][measure.key]
        if not result.row_count:
            for place in found:
                result.add_column(heading(place), justify="right")
        _, rate, seed, _ = key.split(" | ")
        step = results["runs"][key]["checkpoint"]["step"]
        shown = (f"{number:.{measure.digits}f}" for number in found.values())
        result.add_row(arm, f"{rate}, {seed}, step {step:,}", *shown)
    return result


def heading(place: str) -> str:
    return f"{int(place):,}" if place.isdigit() else place


def draw(measure: Measure, results: dict, path: Path) -> Path:
    """A line for each arm: the mean over the seeds against the place, with their range shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for arm in results["chosen"]:
        names, values = zip(*places(measure, results, arm), strict=True)
        values = [[value if isfinite(value) else nan for value in seeds] for seeds in values]
        x = [float(name) for name in names]
        (line,) = axes.plot(x, list(map(mean, values)), marker="o", label=arm)
        axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    if measure.logarithmic:
        axes.set_xlim(min(x) / 1.2, max(x) * 1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{place:,.10g}" for place in x])
    axes.set(xlabel=measure.place, ylabel=measure.title)
    axes.set_title(f"{results['conditions']['recipe']}: {seeds_of(results, 'mean and range')}", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
