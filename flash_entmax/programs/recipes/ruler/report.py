"""The tables of the recipe ruler: scores by task and length of each model, and effective lengths."""

from math import sqrt
from pathlib import Path
from statistics import fmean, variance

from rich.console import Console
from rich.table import Table

from .settings import RulerSize


def key_of(model: str, task: str, length: int) -> str:
    return f"{model} | {task} | {length} tokens"


def write(
    console: Console, results: dict, models: list[str], lengths: tuple[int, ...], size: RulerSize, path: Path
) -> None:
    facts = (f"{name} {value}" for name, value in results["conditions"].items() if name != "settings")
    console.print(", ".join(facts), soft_wrap=True)
    for model in models:
        console.print(score_table(results, model, lengths, size))
    console.print(length_table(results, models, lengths, size))
    console.print(f"{results['seconds']:.0f} s, of earlier runs too; the numbers are {path}", soft_wrap=True)


def scores(results: dict, model: str, task: str, length: int, size: RulerSize) -> list[float]:
    """Of the samples, in per cent."""
    found = results["runs"][key_of(model, task, length)]
    return [100 * found[str(seed)]["score"] for seed in range(size.samples)]


def mean_of_tasks(results: dict, model: str, length: int, size: RulerSize) -> tuple[float, float | None]:
    """(mean, its standard error over the samples), in per cent. A single sample has no error."""
    by_task = [scores(results, model, task, length, size) for task in size.tasks]
    mean = fmean(map(fmean, by_task))
    if size.samples == 1:
        return mean, None
    return mean, sqrt(sum(map(variance, by_task)) / size.samples) / len(by_task)


def score_table(results: dict, model: str, lengths: tuple[int, ...], size: RulerSize) -> Table:
    attention = results["models"][model]["attention"]
    samples = "one sample" if size.samples == 1 else f"mean of {size.samples} samples"
    table = Table(title=f"{model}, {attention}: answers found, %, by tokens: {samples}", title_justify="left")
    table.add_column("task")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for task in size.tasks:
        cells = (f"{fmean(scores(results, model, task, length, size)):.1f}" for length in lengths)
        table.add_row(task, *cells, end_section=task == size.tasks[-1])
    means = (mean_of_tasks(results, model, length, size) for length in lengths)
    shown = (f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}" for mean, error in means)
    table.add_row("mean" if size.samples == 1 else "mean ± its standard error", *shown)
    return table


def length_table(results: dict, models: list[str], lengths: tuple[int, ...], size: RulerSize) -> Table:
    table = Table(title=f"effective length, of {listing(lengths)} tokens", title_justify="left")
    table.add_column("model")
    for heading in (f"mean of at least\n{size.threshold:g} %", f"{size.threshold:g} % of its own\nat {lengths[0]:,}"):
        table.add_column(heading, justify="right")
    for model in models:
        means = {length: mean_of_tasks(results, model, length, size)[0] for length in lengths}
        own = size.threshold / 100 * means[lengths[0]]
        shown = (effective_length(means, least) for least in (size.threshold, own))
        table.add_row(model, *("none" if length is None else f"{length:,}" for length in shown))
    return table


def effective_length(means: dict[int, float], least: float) -> int | None:
    """The longest length whose mean is at least that, and not 0; None if there is none."""
    return max((length for length, mean in means.items() if mean >= least - 1e-9 and mean > 0), default=None)


def listing(lengths: tuple[int, ...]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)
