"""The plan of every recipe that trains: arms, learning rates and seeds; what came of each is kept in one file.

Every arm is trained at every learning rate with the sweep's seeds, and at the best rate with all of them. The best is
that of the lowest mean validation loss, which is taken where the arm was trained: what happens at other lengths chooses
nothing. (Nor does a shorter training: it was seen to prefer rates at which the whole training does worse.) Where the
best is the first or last of several rates, the grid of that arm grows, at most as often as the size's ``extensions``
say. Only then the models at the best rates are measured. What is in the results is not made again, and a run that was
interrupted goes on from its last checkpoint.
"""

import time
from collections.abc import Callable
from statistics import mean

import torch
from rich.console import Console

from ..errors import CommandError
from . import Options, module_of, report, training
from .results import conditions, load, save
from .runs import Run, chosen_runs, runs_of
from .workers import cores, distribute


def run(name: str, options: Options) -> None:
    console = Console(highlight=False)
    recipe, size = module_of(name), module_of(name).SIZES[options.size]
    path = options.out / f"{name}-{options.size}.json"
    results = load(path, conditions(name, options))
    save(path, results)
    start = time.perf_counter()

    def perform(task: Callable, keep: dict, runs: list[Run]) -> None:
        # Arms in turn: each is compiled by one worker, and found compiled by the others.
        runs = sorted(runs, key=lambda each: (each.seed, each.learning_rate))
        missing = [each for each in runs if each.key not in keep]
        console.print(f"{name}, {options.size}: {task.__name__} {len(runs)} models, {len(runs) - len(missing)} done")
        for each, found in distribute(task, missing, workers_for(options, size), console):
            keep[each.key] = found
            save(path, results)

    rates = {arm: list(size.learning_rates) for arm in recipe.ARMS}
    for _ in range(1 + size.extensions):
        swept = {
            arm: {rate: runs_of(name, options, arm, rate, size.sweep_seeds) for rate in rates[arm]} for arm in rates
        }
        perform(train, results["runs"], [each for runs in swept.values() for seeds in runs.values() for each in seeds])
        results["rates"] = rates
        results["best"] = {arm: best_rate(results["runs"], runs) for arm, runs in swept.items()}
        rates = {arm: extended(rates[arm], results["best"][arm]) for arm in rates}
        if rates == results["rates"]:
            break
    chosen = chosen_runs(name, options, results["best"])
    perform(train, results["runs"], chosen)
    perform(measure, results["measures"], chosen)
    results["chosen"] = {arm: [each.key for each in chosen if each.arm == arm] for arm in recipe.ARMS}
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - start
    results["workers"] = workers_for(options, size)
    save(path, results)
    report.write(console, recipe, results, path)


def extended(rates: list[float], best: float) -> list[float]:
    """With the next rate of the geometric grid, in two digits, where the best is an end of it."""
    if len(rates) > 1 and best == rates[-1]:
        return [*rates, float(f"{rates[-1] ** 2 / rates[-2]:.2g}")]
    if len(rates) > 1 and best == rates[0]:
        return [float(f"{rates[0] ** 2 / rates[1]:.2g}"), *rates]
    return rates


def best_rate(found: dict, rates: dict[float, list[Run]]) -> float:
    return min(rates, key=lambda rate: mean(found[each.key]["validation"] for each in rates[rate]))


def train(run: Run, show: training.Show) -> dict:
    """A model that is there, as after a failure between its training and its validation, is not trained again."""
    recipe = module_of(run.recipe)
    size, start = recipe.SIZES[run.size], time.perf_counter()

    def batch_of(step: int) -> training.Batch:
        return recipe.batch(step, run, size)

    if not run.path.exists():
        model = run.model()
        if getattr(size, "compiled", False):
            model.compile(fullgraph=True, dynamic=False)
        training.fit(model, batch_of, recipe.loss, run.steps, run.learning_rate, run.path, show)
    model = run.model()
    training.restore(run.path, model)
    return {"validation": recipe.validate(model.eval(), run, size), "seconds": time.perf_counter() - start}


def measure(run: Run, show: training.Show) -> dict:
    recipe = module_of(run.recipe)
    model = run.model()
    if not run.path.exists():
        raise CommandError(f"{run.path} is not there, and the results say that it was trained: move the results away")
    training.restore(run.path, model)
    with torch.no_grad():
        found = recipe.measure(model.eval(), run, recipe.SIZES[run.size])
    show(1, 1)
    return found


def workers_for(options: Options, size) -> int:
    if options.workers is not None:
        return options.workers
    if options.device == "cuda":
        return size.workers * torch.cuda.device_count()
    return min(size.workers, cores())
