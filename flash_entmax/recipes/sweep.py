"""The plan of every recipe that trains: arms, learning rates and seeds; what came of each is kept in one file.

Every arm is trained at every learning rate with the sweep's seeds and steps, and at the best rate with all of them. The
best is that of the lowest mean validation loss, which is taken where the arm was trained: what happens at other lengths
chooses nothing. Only then the models at the best rates are measured. What is in the results is not made again, and a
run that was interrupted goes on from its last checkpoint.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from flash_entmax import __version__

from . import TRAINED, Options, RecipeError, module_of, report, training


@dataclass(frozen=True)
class Run:
    """One model: what it is, how it is trained, and where its files are."""

    recipe: str
    size: str
    arm: str
    learning_rate: float
    seed: int
    steps: int
    folder: Path
    device: str
    text: Path | None

    @property
    def key(self) -> str:
        return f"{self.arm} | {self.learning_rate:g} | seed {self.seed} | {self.steps} steps"

    @property
    def path(self) -> Path:
        return self.folder / (re.sub(r"[^\w.]+", "-", self.key).lower() + ".safetensors")

    def model(self) -> nn.Module:
        """The model before the training."""
        torch.manual_seed(self.seed)
        recipe = module_of(self.recipe)
        return recipe.build(self.arm, recipe.SIZES[self.size]).to(self.device)


def run(name: str, options: Options) -> None:
    console = Console(highlight=False)
    recipe, size = module_of(name), module_of(name).SIZES[options.size]
    path = options.out / f"{name}-{options.size}.json"
    results = load(path, conditions(name, options))
    save(path, results)
    start = time.perf_counter()

    def perform(task: Callable, keep: dict, runs: list[Run]) -> None:
        missing = [each for each in runs if each.key not in keep]
        console.print(f"{name}, {options.size}: {task.__name__} {len(runs)} models, {len(runs) - len(missing)} done")
        for each, found in distribute(task, missing, workers_for(options, size), console):
            keep[each.key] = found
            save(path, results)

    swept = {
        arm: {
            rate: runs_of(name, options, arm, rate, size.sweep_seeds, size.sweep_steps) for rate in size.learning_rates
        }
        for arm in recipe.ARMS
    }
    perform(train, results["runs"], [each for rates in swept.values() for runs in rates.values() for each in runs])
    results["best"] = {arm: best_rate(results["runs"], rates) for arm, rates in swept.items()}
    chosen = chosen_runs(name, options, results["best"])
    perform(train, results["runs"], chosen)
    perform(measure, results["measures"], chosen)
    results["chosen"] = {arm: [each.key for each in chosen if each.arm == arm] for arm in recipe.ARMS}
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - start
    save(path, results)
    report.write(console, recipe, results, path)


def runs_of(name: str, options: Options, arm: str, rate: float, seeds: int, steps: int) -> list[Run]:
    folder = options.out / f"{name}-{options.size}"
    return [
        Run(name, options.size, arm, rate, seed, steps, folder, options.device, options.text) for seed in range(seeds)
    ]


def best_rate(found: dict, rates: dict[float, list[Run]]) -> float:
    return min(rates, key=lambda rate: mean(found[each.key]["validation"] for each in rates[rate]))


def chosen_runs(name: str, options: Options, best: dict[str, float]) -> list[Run]:
    """All seeds and steps of every arm at its best learning rate."""
    size = module_of(name).SIZES[options.size]
    return [each for arm, rate in best.items() for each in runs_of(name, options, arm, rate, size.seeds, size.steps)]


def train(run: Run, show: training.Show) -> dict:
    """A model that is there, as after a failure between its training and its validation, is not trained again."""
    recipe = module_of(run.recipe)
    model, size, start = run.model(), recipe.SIZES[run.size], time.perf_counter()

    def batch_of(step: int) -> training.Batch:
        return recipe.batch(step, run, size)

    if run.path.exists():
        training.restore(run.path, model)
    else:
        training.fit(model, batch_of, recipe.loss, run.steps, run.learning_rate, run.path, show)
    return {"validation": recipe.validate(model.eval(), run, size), "seconds": time.perf_counter() - start}


def measure(run: Run, show: training.Show) -> dict:
    recipe = module_of(run.recipe)
    model = run.model()
    if not run.path.exists():
        raise RecipeError(f"{run.path} is not there, and the results say that it was trained: move the results away")
    training.restore(run.path, model)
    with torch.no_grad():
        found = recipe.measure(model.eval(), run, recipe.SIZES[run.size])
    show(1, 1)
    return found


def distribute(task: Callable, runs: list[Run], workers: int, console: Console) -> Iterator[tuple[Run, dict]]:
    """Results as they come, of so many processes at a time, on all GPUs."""
    if workers == 1:
        for each in runs:
            with progress(console, f"{each.recipe}: {each.key}") as show:
                found = task(each, show)
            yield each, found
        return
    if not runs:
        return
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, initialise, (workers, context.Value("i", 0))) as pool,
        progress(console, f"{task.__name__}, {workers} at a time") as show,
    ):
        along = manager.dict()
        waiting = {pool.submit(perform_in_worker, task, each, along): each for each in runs}
        while waiting:
            finished, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                each = waiting.pop(future)
                along.pop(each.key, None)
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                yield each, future.result()
            done = len(runs) - len(waiting)
            show(round(1000 * (done + sum(along.values()))), 1000 * len(runs))


def initialise(workers: int, started) -> None:
    """Share the cores, and settle on a GPU: graphs are captured on the one that a process began with."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def perform_in_worker(task: Callable, run: Run, along: dict) -> dict:
    shown = -1.0

    def show(step: int, of: int) -> None:
        nonlocal shown
        if step / of >= shown + 0.01:
            shown = along[run.key] = step / of

    return task(run, show)


def workers_for(options: Options, size) -> int:
    if options.workers is not None:
        return options.workers
    return size.workers * torch.cuda.device_count() if options.device == "cuda" else 1


def conditions(name: str, options: Options) -> dict:
    threads = f"cpu, {torch.get_num_threads()} threads"
    return {
        "recipe": name,
        "size": options.size,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else threads,
        "text": str(options.text) if options.text else "default",
        "settings": asdict(module_of(name).SIZES[options.size]) if name in TRAINED else {},
        "flash_entmax": __version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def load(path: Path, own: dict) -> dict:
    """What an earlier start of the same recipe left, or a new beginning."""
    if not path.exists():
        if path.with_suffix("").exists():
            raise RecipeError(f"{path.with_suffix('')} has models without their {path.name}: move it away")
        return {"conditions": own, "runs": {}, "measures": {}}
    try:
        results = json.loads(path.read_text())
        there = results["conditions"]
        own = json.loads(json.dumps(own))  # tuples become lists there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read ({error}): move it away to start anew") from error
    for name, value in own.items():
        if name != "date" and there.get(name) != value:
            raise RecipeError(
                f"{path} has results of {name} {there.get(name)!r}, and this is {value!r}: take another --out"
            )
    return results


def save(path: Path, results: dict) -> None:
    """First beside it, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)


@contextmanager
def progress(console: Console, title: str) -> Iterator[training.Show]:
    """Yields show(step, of): a bar on a terminal, elsewhere one line."""
    if not console.is_terminal:
        console.print(f"  {title}", soft_wrap=True)
        yield lambda step, of: None
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda step, of: bar.update(task, completed=step / of)
