"""The models of a recipe, one by one."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import Options, module_of


@dataclass(frozen=True)
class Run:
    """What it is, how it is trained, and where its file is."""

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


def runs_of(name: str, options: Options, arm: str, rate: float, seeds: int) -> list[Run]:
    folder, steps = options.out / f"{name}-{options.size}", module_of(name).SIZES[options.size].steps
    return [
        Run(name, options.size, arm, rate, seed, steps, folder, options.device, options.text) for seed in range(seeds)
    ]


def chosen_runs(name: str, options: Options, best: dict[str, float]) -> list[Run]:
    """All seeds of every arm at its best learning rate."""
    seeds = module_of(name).SIZES[options.size].seeds
    return [each for arm, rate in best.items() for each in runs_of(name, options, arm, rate, seeds)]
