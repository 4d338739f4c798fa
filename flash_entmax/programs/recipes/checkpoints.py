"""The best model on the way of a training: it is scored at evenly spaced steps, and the first of the best is kept.

The score is that of the recipe. A training that goes on after an interruption may score some steps once more.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..errors import CommandError
from . import training
from .recipe import Run, ScoredRecipe, Size


def path_of(run: Run) -> Path:
    return run.path.with_suffix(".best.safetensors")


def is_due(step: int, steps: int, checkpoints: int) -> bool:
    """Whether the model is scored after this step, counted from 1. The last step is one of them."""
    return step * checkpoints // steps > (step - 1) * checkpoints // steps


def keep_if_best(recipe: ScoredRecipe, model: nn.Module, run: Run, size: Size, step: int) -> None:
    with torch.no_grad():
        score = recipe.score(model, run, size)
    path = path_of(run)
    if not path.exists() or score > kept(run)["score"]:
        training.save(path, model, step=step, score=repr(score))


def kept(run: Run) -> dict[str, float]:
    """The step and the score of the model that was kept. CommandError if its file is not there."""
    path = path_of(run)
    if not path.exists():
        raise CommandError(f"{path} is not there, and {run.path.name} is: move both away to train the model again")
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    return {"step": int(notes["step"]), "score": float(notes["score"])}
