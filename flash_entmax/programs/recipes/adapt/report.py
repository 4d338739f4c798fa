"""Tables of the recipe adapt, the picture of its price list, and the page on a passage."""

from collections.abc import Callable, Iterator
from math import log10, nan
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from flash_entmax import inspection
from flash_entmax.show import page

from ...demo.train import precision
from ..report import over_seeds, seeds_of
from .settings import SOFTMAX, AdaptSize
from .text import Text
from .training import arm_of

SOFT = arm_of(SOFTMAX)
DENSITIES = {"tile_density": "tiles alive", "key_density": "keys reached"}
# Quantity of `LayerEvaluation`, in words, its factor, how it is shown.
FIGURES = (
    ("keys_per_query", "keys a query", 1, "{:.1f}"),
    ("tile_density", "tiles alive, %", 100, "{:.1f}"),
    ("key_density", "keys that the queries of a tile reach, %", 100, "{:.1f}"),
)


def write(console: Console, results: dict, path: Path) -> None:
    facts = (f"{name} {value}" for name, value in results["conditions"].items())
    console.print(", ".join(facts), soft_wrap=True)
    console.print(loss_table(results), price_table(results))
    for arm in arms_of_entmax(results):
        console.print(layer_table(results, arm))
    if len(results["alphas"]) > 2:
        console.print(f"{draw(results, path.with_name(f'{path.stem}-alpha.png'))}", soft_wrap=True)
    for line in answer_lines(results):
        console.print(line, soft_wrap=True, markup=False)
    for saved in results["saved"].values():
        files = filter(None, (saved["folder"], saved["page"]))
        places = ", ".join(files) if Path(saved["folder"]).exists() else f"{saved['folder']}, removed since"
        console.print(f"saved: {saved['run']}: {places}", soft_wrap=True)
    console.print(f"{results['seconds']:.0f} s, of earlier runs too; the numbers are {path}", soft_wrap=True)


def runs_of(results: dict, arm: str) -> list[dict]:
    return [results["runs"][key] for key in results["chosen"][arm]]


def places(results: dict) -> list[tuple[str, str]]:
    """(text, length), in the order of the columns."""
    found = results["before"][SOFT]["held_out"]
    return [(text, length) for length in next(iter(found.values())) for text in found]


def loss_of(measured: dict, place: tuple[str, str]) -> float:
    text, length = place
    return measured["held_out"][text][length]["loss"]


def figure_of(measured: dict, quantity: str, length: str) -> float:
    """The mean over the layers, then over both texts; NaN for softmax."""
    by_text = [by_length[length]["layers"] for by_length in measured["held_out"].values()]
    return mean(mean(layer[quantity] for layer in layers) if layers else nan for layers in by_text)


def new_table(title: str, *headings: str) -> Table:
    result = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        result.add_column(heading, justify="right" if number else "left")
    return result


def loss_table(results: dict) -> Table:
    """The loss before and after the training."""
    columns = [f"{text}\n{int(length):,}" for text, length in places(results)]
    title = f"held-out loss, nats per token, by tokens of the window: {seeds_of(results)}"
    table = new_table(title, "arm", "rate", *columns, "ms a\nstep")
    for arm, measured in results["before"].items():
        if arm in results["chosen"]:
            name = "as it came" if arm == SOFT else f"{arm} at once"
            table.add_row(name, "", *(f"{loss_of(measured, place):.3f}" for place in places(results)), "")
    for arm in results["chosen"]:
        runs = runs_of(results, arm)
        losses = (over_seeds([loss_of(each, place) for each in runs], "{:.3f}".format) for place in places(results))
        step = over_seeds([each["step_ms"] for each in runs], "{:.0f}".format)
        table.add_row(f"{arm}, trained", f"{results['best'][arm]:g}", *losses, step)
    return table


def costs(results: dict, arm: str, place: tuple[str, str]) -> list[float]:
    """Loss above that of the softmax arm with the same seed and batches, by seed."""
    pairs = zip(runs_of(results, arm), runs_of(results, SOFT), strict=True)
    return [loss_of(ours, place) - loss_of(theirs, place) for ours, theirs in pairs]


def step_ratios(results: dict, arm: str) -> list[float]:
    pairs = zip(runs_of(results, arm), runs_of(results, SOFT), strict=True)
    return [ours["step_ms"] / theirs["step_ms"] for ours, theirs in pairs]


def arms_of_entmax(results: dict) -> list[str]:
    return [arm for arm in results["chosen"] if arm != SOFT]


def price_table(results: dict) -> Table:
    """What each alpha costs and saves: a row for each figure, a column for each arm."""
    arms, lengths = arms_of_entmax(results), list(dict.fromkeys(length for _, length in places(results)))
    table = new_table("what it costs, and what it saves", f"figure: {seeds_of(results)}", *arms)

    def row(heading: str, numbers_of: Callable[[str], list[float]], shown: str) -> None:
        table.add_row(heading, *(over_seeds(numbers_of(arm), shown.format) for arm in arms))

    for place in places(results):
        heading = f"loss above softmax, same batches: {place[0]}, {int(place[1]):,}"
        row(heading, lambda arm, at=place: costs(results, arm, at), "{:+.4f}")
    for quantity, heading, factor, shown in FIGURES:
        for n in lengths:
            row(
                f"{heading}, {int(n):,}",
                lambda arm, q=quantity, f=factor, at=n: [f * figure_of(each, q, at) for each in runs_of(results, arm)],
                shown,
            )
    row("training step at rest, over softmax's", lambda arm: step_ratios(results, arm), "{:.2f}")
    row(
        "tokens a second generated, by the saved model",
        lambda arm: [results["saved"][arm]["tokens_per_second"]],
        "{:.1f}",
    )
    table.caption = f"softmax, the saved model: {results['saved'][SOFT]['tokens_per_second']:.1f} tokens a second"
    return table


def layer_table(results: dict, arm: str) -> Table:
    """Keys and densities by layer, at the longest length: means over texts and seeds."""
    length = places(results)[-1][1]
    table = new_table(f"{arm} by layer, {int(length):,} tokens", "layer", *(heading for _, heading, _, _ in FIGURES))
    found = [by_length[length]["layers"] for run in runs_of(results, arm) for by_length in run["held_out"].values()]
    for number, same in enumerate(zip(*found, strict=True)):
        means = (factor * mean(layer[quantity] for layer in same) for quantity, _, factor, _ in FIGURES)
        table.add_row(str(number), *map("{:.1f}".format, means))
    return table


def answer_lines(results: dict) -> Iterator[str]:
    for prompt, answer in results["before"][SOFT]["answers"].items():
        yield f"\n{prompt}"
        yield f"  softmax as it came: {answer!r}"
        for arm in results["chosen"]:
            saved = results["saved"][arm]
            yield f"  {saved['run']}: {saved['answers'][prompt]!r}"


def draw(results: dict, path: Path) -> Path:
    """Loss, keys, densities and time of a step against alpha, by the logarithm of alpha - 1: means over the seeds."""
    from matplotlib.figure import Figure

    arms = sorted(arms_of_entmax(results), key=results["alphas"].get)
    alphas = [results["alphas"][arm] for arm in arms]
    across = [log10(alpha - 1) for alpha in alphas]
    length = places(results)[-1][1]

    def over_arms(number_of: Callable[[str], float]) -> list[float]:
        return [number_of(arm) for arm in arms]

    def figures(quantity: str) -> list[float]:
        return over_arms(lambda arm: mean(figure_of(each, quantity, length) for each in runs_of(results, arm)))

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, keys, density, step = figure.subplots(1, 4)
    for place in places(results):
        label = f"{place[0]}, {int(place[1]):,}"
        loss.plot(across, over_arms(lambda arm, at=place: mean(costs(results, arm, at))), marker="o", label=label)
    loss.set(title="loss above softmax, nats")
    keys.plot(across, figures("keys_per_query"), marker="o")
    keys.set(title=f"keys a query, of {int(length):,}", yscale="log")
    for quantity, label in DENSITIES.items():
        density.plot(across, [100 * share for share in figures(quantity)], marker="o", label=f"{label}, %")
    density.set(title=f"by tile of queries, {int(length):,} tokens", yscale="log")
    step.plot(across, over_arms(lambda arm: mean(step_ratios(results, arm))), marker="o")
    step.set(title="training step over softmax's")
    for axes in (loss, keys, density, step):
        axes.set(xlabel="alpha", xticks=across, xticklabels=[f"{alpha:g}" for alpha in alphas])
        axes.tick_params("x", labelsize=7)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (loss, density):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


@torch.no_grad()
def page_of(model: nn.Module, tokenizer, text: Text, size: AdaptSize, folder: Path, arm: str) -> str:
    """Write the page on the first held-out passage into the folder; its path, or why there is none."""
    ids = text.held_out[: size.passage].long()
    with precision(model.device), inspection.record(model) as calls:
        model(ids.unsqueeze(0).to(model.device), use_cache=False)
    tokens = [tokenizer.decode([token]) for token in ids.tolist()]
    path = folder / "attention.html"
    try:
        return str(page.save_page(path, tokens, calls, title=f"{arm}: {len(tokens)} tokens of held-out prose"))
    except ValueError as error:
        return f"no page: {error}"
