"""The plan of every recipe that trains: arms, learning rates and seeds. One file keeps all results.

1. Train every arm at every learning rate, with the seeds of the sweep.
2. The best rate of an arm has the lowest mean validation loss. Validation looks like training, so that results at other
   lengths choose nothing. A shorter training could not choose: it prefers rates at which the whole one does worse.
3. If the best rate is the first or last of several, add the next one and train again, up to ``extensions`` times.
4. Train every arm at its best rate with all seeds, then those that go on from another arm, and measure these models.
5. Where models are scored on their way: of all rates, seeds and checkpoints of an arm, measure the one with the highest
   score as well. Papers report such models. They show what an arm can do, and not what it does.

Numbers that are in the results are not computed again. An interrupted training goes on from its last checkpoint. The
command line may ask for some of the arms, other rates (which then do not grow by step 3), or another number of seeds.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

from ..errors import CommandError
from ..files import write_json
from . import checkpoints, language_model, max_retrieval, report, sequences, training, watched
from .recipe import Batch, BranchedRecipe, Recipe, Run, ScoredRecipe, Size, WatchedRecipe, branch_step, parent_of
from .results import conditions, load
from .runs import chosen_runs, new_model, runs_of, trained_model
from .settings import RecipeSettings
from .workers import cores, distribute

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (max_retrieval.RECIPE, sequences.SORT, sequences.REVERSE, sequences.COPY, language_model.RECIPE)
}

# What torch.compile may make of one function, here of a block's: a process trains many arms, each with a moving alpha
# and without. More would be an error.
MOST_GRAPHS = 64


def run(recipe: Recipe, settings: RecipeSettings) -> None:
    console = Console(highlight=False, markup=False)
    name, size = recipe.name, recipe.sizes[settings.size]
    path = settings.out / f"{name}-{settings.size}.json"
    results = load(path, conditions(name, settings, size))
    write_json(path, results)
    start = time.perf_counter()

    def perform(task: Callable, done: dict, runs: list[Run]) -> None:
        # Arms take turns. One worker compiles an arm, and the others find it compiled.
        runs = sorted(runs, key=lambda run: (run.seed, run.learning_rate))
        missing = [run for run in runs if run.key not in done]
        console.print(f"{name}, {settings.size}: {task.__name__} {len(runs)} models, {len(runs) - len(missing)} done")
        for finished, numbers in distribute(task, missing, workers_for(settings, size), console):
            done[finished.key] = numbers
            write_json(path, results)

    arms, parents = chosen_arms(recipe, settings.arms)
    rates = {arm: list(settings.rates or size.rates_of(arm)) for arm in arms if arm not in parents}
    for _ in range(1 + (0 if settings.rates else size.extensions)):
        swept = {
            arm: {rate: runs_of(recipe, settings, arm, rate, size.sweep_seeds) for rate in rates[arm]} for arm in rates
        }
        perform(train, results["runs"], [run for runs in swept.values() for seeds in runs.values() for run in seeds])
        results["rates"] = rates
        results["best"] = {arm: best_rate(results["runs"], runs) for arm, runs in swept.items()}
        rates = {arm: extended(rates[arm], results["best"][arm]) for arm in rates}
        if rates == results["rates"]:
            break
    results["rates"] |= {arm: [results["best"][parent]] for arm, parent in parents.items()}
    results["best"] = {arm: results["best"][parents.get(arm, arm)] for arm in arms}
    chosen = chosen_runs(recipe, settings, results["best"], settings.seeds or size.seeds)
    perform(train, results["runs"], [run for run in chosen if run.arm not in parents])
    if parents:
        perform(train, results["runs"], [run for run in chosen if run.arm in parents])
        for run in [run for runs in swept.values() for seeds in runs.values() for run in seeds] + chosen:
            run.branch_path.unlink(missing_ok=True)  # three times the model's size
    perform(measure, results["measures"], chosen)
    results["chosen"] = {arm: [run.key for run in chosen if run.arm == arm] for arm in arms}
    if size.checkpoints:
        trained = [run for runs in swept.values() for seeds in runs.values() for run in seeds] + chosen
        best = [best_checkpoint(results["runs"], [run for run in trained if run.arm == arm]) for arm in arms]
        perform(measure_best, results.setdefault("best_measures", {}), best)
        results["best_checkpoints"] = {run.arm: run.key for run in best}
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - start
    results["workers"] = workers_for(settings, size)
    write_json(path, results)
    report.write(console, recipe, results, path)


def chosen_arms(recipe: Recipe, wanted: tuple[str, ...] | None) -> tuple[list[str], dict[str, str]]:
    """(arms to train, in the order of the recipe; {arm: the arm that it goes on from} of these)."""
    parents = dict(recipe.parents) if isinstance(recipe, BranchedRecipe) else {}
    if wanted is None:
        return list(recipe.arms), parents
    unknown = [arm for arm in wanted if arm not in recipe.arms]
    if unknown:
        raise CommandError(f"{recipe.name} has no arm {unknown[0]!r} (--arms), but {', '.join(map(repr, recipe.arms))}")
    for arm in wanted:
        if parents.get(arm, arm) not in wanted:
            raise CommandError(f"--arms {arm!r} goes on from {parents[arm]!r}: name that arm as well")
    return [arm for arm in recipe.arms if arm in wanted], {arm: parents[arm] for arm in wanted if arm in parents}


def extended(rates: list[float], best: float) -> list[float]:
    """The rates, and the next one of their geometric grid, in two digits, beyond the end that is the best."""
    if len(rates) > 1 and best == rates[-1]:
        return [*rates, float(f"{rates[-1] ** 2 / rates[-2]:.2g}")]
    if len(rates) > 1 and best == rates[0]:
        return [float(f"{rates[0] ** 2 / rates[1]:.2g}"), *rates]
    return rates


def best_rate(found: dict, rates: dict[float, list[Run]]) -> float:
    """The rate with the lowest mean validation loss over its seeds."""
    return min(rates, key=lambda rate: mean(found[run.key]["validation"] for run in rates[rate]))


def best_checkpoint(found: dict, runs: list[Run]) -> Run:
    """The run whose best checkpoint has the highest score; the first one of equals."""
    return max(runs, key=lambda run: found[run.key]["checkpoint"]["score"])


def train(run: Run, show: training.Show) -> dict:
    """Train and validate. A model whose file is there, as after a failed validation, is not trained again."""
    recipe = RECIPES[run.recipe]
    size, start = recipe.sizes[run.size], time.perf_counter()

    def batch_of(step: int) -> Batch:
        return recipe.batch(step, run, size)

    def show_and_look(step: int, steps: int) -> None:
        show(step, steps)
        if isinstance(recipe, ScoredRecipe) and checkpoints.is_due(step, steps, size.checkpoints):
            checkpoints.keep_if_best(recipe, model, run, size, step)
        if isinstance(recipe, WatchedRecipe) and checkpoints.is_due(step, steps, size.watched):
            watched.note(recipe, model, run, size, step)

    if not run.path.exists():
        model = new_model(recipe, run)
        if size.compiled:
            torch._dynamo.config.recompile_limit = MOST_GRAPHS
            model.compile(fullgraph=True, dynamic=size.compiled == "dynamic")
        arguments = batch_of, recipe.loss, run.steps, run.learning_rate, run.path, show_and_look, size.adamw
        training.fit(model, *arguments, **branches(recipe, run))
    trained = trained_model(recipe, run)
    found = {"validation": recipe.validate(trained, run, size), "seconds": time.perf_counter() - start}
    return found | ({"checkpoint": checkpoints.kept(run)} if size.checkpoints else {})


def branches(recipe: Recipe, run: Run) -> dict:
    """What `fit` is told of a training that goes on from another one, or from which others go on."""
    step, parent = branch_step(recipe, run), parent_of(recipe, run)
    if parent is None:
        return {} if step is None else {"branch": (step, run.branch_path)}
    if not parent.branch_path.exists():
        raise CommandError(
            f"{parent.branch_path} is not there, and the results say that {parent.key} was trained: move them away"
        )
    return {"start": parent.branch_path}


def measure(run: Run, show: training.Show) -> dict:
    return measures_of(run, run.path, show)


def measure_best(run: Run, show: training.Show) -> dict:
    """Of the best checkpoint of the run."""
    return measures_of(run, checkpoints.path_of(run), show)


def measures_of(run: Run, path: Path, show: training.Show) -> dict:
    recipe = RECIPES[run.recipe]
    model = trained_model(recipe, run, path)
    with torch.no_grad():
        found = recipe.measure(model, run, recipe.sizes[run.size])
    show(1, 1)
    return found


def workers_for(settings: RecipeSettings, size: Size) -> int:
    """How many models are trained at a time. --workers, or else the size says it, for each GPU or up to the cores."""
    if settings.workers is not None:
        return settings.workers
    if settings.device == "cuda":
        return size.workers * torch.cuda.device_count()
    return min(size.workers, cores())
