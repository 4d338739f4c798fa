"""Numbers of a model on the way of its training, at evenly spaced steps, in a file beside the model's."""

import json
from pathlib import Path

import torch
from torch import nn

from ..errors import CommandError
from ..files import write_json
from .recipe import Recipe, Run, Size, WatchedRecipe, branch_step, parent_of


def path_of(run: Run) -> Path:
    return run.path.with_suffix(".watched.json")


def note(recipe: WatchedRecipe, model: nn.Module, run: Run, size: Size, step: int) -> None:
    """A step that an interrupted training takes again is noted once."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        number = recipe.watch(model, run, size, step)
    write_json(path_of(run), own(run) | {str(step): number})


def own(run: Run) -> dict[str, float]:
    path = path_of(run)
    return json.loads(path.read_text()) if path.exists() else {}


def noted(recipe: Recipe, run: Run) -> dict[str, float]:
    """{step: number}, with those of the parent up to its branch. CommandError for a missing file."""
    parent, branch = parent_of(recipe, run), branch_step(recipe, run)
    found = {} if parent is None else {step: number for step, number in own(parent).items() if int(step) <= branch}
    if not path_of(run).exists():
        raise CommandError(f"{path_of(run)} is not there, and {run.path.name} is: move the results away")
    return dict(sorted((found | own(run)).items(), key=lambda item: int(item[0])))
