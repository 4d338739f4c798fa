"""A pretrained model taken from softmax to entmax: what does it cost in loss, and what does it save in keys?

A model of Transformers, by default SmolLM2-135M-Instruct, is trained on with the same batches in several arms:

- softmax, as it was;
- entmax, one arm for each alpha: alpha is held near 1, then rises, and is then at rest (``flash_entmax.adapt``).

Half of the text is English prose, half Python sources; held-out files are apart. Every arm is trained at every rate
with seed 0. The rate with the lowest held-out loss is then trained with the other seeds. Shown are the loss at two
lengths, the keys a query attends to, how dense the attention is by layer, the time of a training step, the speed of
generation, and answers before and after. The best model of each arm is saved, and a plain ``from_pretrained`` loads
it.

Several alphas make a price list: what each costs in loss, and saves in keys. Several GPUs train a model each.
"""

import re
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from torch import nn

from ...errors import CommandError
from ...files import write_json
from ..results import conditions, load
from ..settings import RecipeSettings
from ..training import Show
from ..workers import distribute
from . import measures, report
from .models import load as load_model
from .models import open_model, save, take_entmax
from .settings import SOFTMAX, AdaptSize, settings_of_all_runs
from .text import Text, batch_of, texts
from .training import AdaptRun, arm_of, train


@dataclass(frozen=True)
class Job:
    """One training, and what a process must know to do it."""

    recipe: ClassVar[str] = "adapt"
    run: AdaptRun
    settings: RecipeSettings
    size: AdaptSize

    @property
    def key(self) -> str:
        return self.run.key

    @property
    def folder(self) -> Path:
        """Of the trained model, until the best one of the arm is known."""
        return folder_of(self.settings) / re.sub(r"[^\w.]+", "-", self.key)


def folder_of(settings: RecipeSettings) -> Path:
    return settings.out / f"adapt-{settings.size}"


@lru_cache(maxsize=1)
def opened(settings: RecipeSettings, size: AdaptSize):
    """(model, tokenizer, texts), once in each process."""
    model, tokenizer = open_model(size)
    return model, tokenizer, texts(settings, size, tokenizer)


def run(settings: RecipeSettings, size: AdaptSize) -> None:
    """Train what is not in the results yet; write results, models, tables, a picture and a page."""
    console, start = Console(highlight=False, markup=False), time.perf_counter()
    path = settings.out / f"adapt-{settings.size}.json"
    own = conditions("adapt", settings) | {"settings": settings_of_all_runs(size)}
    results = load(path, own)
    model, tokenizer, text = opened(settings, size)
    found = [part.found for part in text.values()]
    if results.setdefault("text", found) != found:
        raise CommandError(f"{path} has results on other text, {results['text']}, than {found}: take another --out")
    console.print(*results["text"], sep="\n", soft_wrap=True)
    before(model, tokenizer, text, size, settings, results)
    write_json(path, results)

    def perform(runs: list[AdaptRun]) -> None:
        jobs = [Job(each, settings, size) for each in runs if each.key not in results["runs"]]
        for job, numbers in distribute(train_one, jobs, workers_for(settings), console):
            results["runs"][job.key] = numbers
            write_json(path, results)
        for alpha in (SOFTMAX, *size.alphas):
            keep_the_best([Job(each, settings, size) for each in runs if each.alpha == alpha], results)
        write_json(path, results)

    alphas = (SOFTMAX, *size.alphas)
    grid = {alpha: [AdaptRun(alpha, rate, 0, size.steps) for rate in size.rates] for alpha in alphas}
    perform([each for runs in grid.values() for each in runs])
    best = {alpha: best_of(runs, results) for alpha, runs in grid.items()}
    chosen = {
        alpha: [AdaptRun(alpha, each.rate, seed, size.steps) for seed in range(size.seeds)]
        for alpha, each in best.items()
    }
    perform([each for runs in chosen.values() for each in runs])
    results["alphas"] = {each.arm: alpha for alpha, each in best.items()}
    results["best"] = {each.arm: each.rate for each in best.values()}
    results["chosen"] = {best[alpha].arm: [each.key for each in runs] for alpha, runs in chosen.items()}
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - start
    write_json(path, results)
    report.write(console, results, path)


def best_of(runs: list[AdaptRun], results: dict) -> AdaptRun:
    """The training of an arm with the lowest validation loss. CommandError if none has a finite one."""
    best = min(runs, key=lambda each: results["runs"][each.key]["validation"])
    if not isfinite(results["runs"][best.key]["validation"]):
        rates = " ".join(f"{each.rate:g}" for each in runs)
        raise CommandError(f"no training of {best.arm} has a finite loss with --rates {rates}: take lower ones")
    return best


def workers_for(settings: RecipeSettings) -> int:
    """How many models are trained at a time: --workers, or else one on each GPU."""
    if settings.workers is not None:
        return settings.workers
    return torch.cuda.device_count() if settings.device == "cuda" else 1


def train_one(job: Job, show: Show) -> dict:
    """Train, measure and save."""
    each, size, device = job.run, job.size, job.settings.device
    model, tokenizer, text = opened(job.settings, size)
    trained, numbers = train(
        model, each, size, lambda step: batch_of(text, step, each.seed, size, device), device, show
    )
    numbers["held_out"] = measures.held_out(trained, text, size, device)
    numbers["validation"] = measures.validation(numbers["held_out"])
    save(trained, tokenizer, each.alpha, job.folder)
    return numbers


def before(
    model: nn.Module, tokenizer, text: dict[str, Text], size: AdaptSize, settings: RecipeSettings, results: dict
) -> None:
    """Measure the model as it came, and with each alpha at once."""
    found, attention = results.setdefault("before", {}), model.config._attn_implementation
    model.to(settings.device)
    if "softmax" not in found:
        found["softmax"] = {
            "held_out": measures.held_out(model, text, size, settings.device),
            "answers": measures.answers(measures.for_generation(model), tokenizer, size),
        }
    for alpha in size.alphas:
        if arm_of(alpha) not in found:
            take_entmax(model, alpha)
            found[arm_of(alpha)] = {"held_out": measures.held_out(model, text, size, settings.device)}
    model.set_attn_implementation(attention)
    model.config.entmax_alpha = None
    model.to("cpu")


def keep_the_best(jobs: list[Job], results: dict) -> None:
    """Of all models of an arm, the one with the lowest validation loss moves to the arm's folder; the others go.

    It is loaded there by the plain call, and generates. All that is said of a saved model is measured here, so that
    results do not depend on its folder any more.
    """
    saved = results.setdefault("saved", {})
    for job in jobs:
        known = saved.get(job.run.arm)
        losses = [results["runs"][key]["validation"] for key in (job.key, *([known["run"]] if known else []))]
        if job.folder.exists() and losses[0] < min(losses[1:], default=float("inf")):
            saved[job.run.arm] = publish(job)
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)


def publish(job: Job) -> dict:
    """Move the model of a training to the folder of its arm, and measure it there."""
    size, settings, arm, is_softmax = job.size, job.settings, job.run.arm, job.run.alpha == SOFTMAX
    _, tokenizer, text = opened(settings, size)
    folder = folder_of(settings) / arm.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    job.folder.rename(folder)
    loaded = load_model(folder, settings.device)
    generating = measures.for_generation(loaded)
    return {
        "run": job.key,
        "folder": str(folder),
        "page": "" if is_softmax else report.page_of(loaded, tokenizer, text["prose"], size, folder, arm),
        "tokens_per_second": measures.tokens_per_second(generating, tokenizer, text["prose"], size),
        "answers": measures.answers(generating, tokenizer, size),
    }
