"""The models of a recipe: which ones there are, and each before and after its training."""

from pathlib import Path

import torch
from torch import nn

from ..errors import CommandError
from . import training
from .recipe import Recipe, Run
from .settings import RecipeSettings


def runs_of(recipe: Recipe, settings: RecipeSettings, arm: str, rate: float, seeds: int) -> list[Run]:
    """One arm at one learning rate, with the seeds 0 to ``seeds`` - 1."""
    folder, steps = settings.out / f"{recipe.name}-{settings.size}", recipe.sizes[settings.size].steps
    return [
        Run(recipe.name, settings.size, arm, rate, seed, steps, folder, settings.device, settings.text)
        for seed in range(seeds)
    ]


def chosen_runs(recipe: Recipe, settings: RecipeSettings, best: dict[str, float], seeds: int) -> list[Run]:
    """All seeds of every arm at its best learning rate."""
    return [run for arm, rate in best.items() for run in runs_of(recipe, settings, arm, rate, seeds)]


def new_model(recipe: Recipe, run: Run) -> nn.Module:
    """The model before its training, on the device of the run."""
    torch.manual_seed(run.seed)
    return recipe.build(run.arm, recipe.sizes[run.size]).to(run.device)


def trained_model(recipe: Recipe, run: Run, path: Path | None = None) -> nn.Module:
    """The model after its training, or the one in ``path``, in evaluation mode. CommandError for a missing file."""
    path = path or run.path
    if not path.exists():
        raise CommandError(f"{path} is not there, and the results say that it was trained: move the results away")
    model = new_model(recipe, run)
    training.restore(path, model)
    return model.eval()
