"""What a recipe is: models that differ in one thing, how they are trained, and what is measured of them."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Measure:
    """One number of a model at several places, such as lengths: a table and a picture.

    ``title`` and ``place`` name the number and the places with their units. ``logarithmic`` is the axis of the places.
    The picture has all places, and the table at most ``columns`` of them, the last one included.
    """

    key: str
    title: str
    place: str
    digits: int = 1
    logarithmic: bool = True
    columns: int = 6


@dataclass(frozen=True)
class AdamW:
    """How AdamW trains. Only matrices decay; ``warm_up`` is the share of the steps in which the rate rises."""

    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warm_up: float = 0.05


ADAMW = AdamW()


@dataclass(frozen=True)
class Size:
    """How much a recipe trains at one --size. Each recipe adds fields of its own.

    Attributes:
        steps: optimizer steps of one training, each on one batch.
        batch: examples in a batch.
        learning_rates: the rates at which arms are trained first, ascending; see also ``rates_of``.
        extensions: how many more rates an arm may try, each beyond the end of its rates that was best.
        sweep_seeds: trainings of an arm at every rate, with the seeds 0, 1, ...
        seeds: trainings of an arm at its best rate.
        workers: how many models one device trains at a time.
        compiled: the shapes for which ``model.compile`` is called before a training: "static", a compilation for each,
            or "dynamic", one for all; None for no compilation.
        adamw: the optimizer of all trainings.
        checkpoints: at how many steps of a training, evenly spaced, a :class:`ScoredRecipe` scores the model. The best
            one is kept beside the last.
        watched: at how many steps of a training, evenly spaced, a :class:`WatchedRecipe` looks at the model.
    """

    steps: int
    batch: int
    _: KW_ONLY
    learning_rates: tuple[float, ...]
    seeds: int = 3
    sweep_seeds: int = 1
    extensions: int = 0
    workers: int = 6
    compiled: Literal["static", "dynamic"] | None = None
    adamw: AdamW = ADAMW
    checkpoints: int = 0
    watched: int = 0

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """The learning rates at which this arm is trained first."""
        return self.learning_rates


@dataclass(frozen=True)
class Run:
    """One model: what it is, how it is trained, and which file holds it afterwards."""

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

    @property
    def branch_path(self) -> Path:
        """The file of the model and the optimizer's state from which other trainings go on, until these are done."""
        return self.path.with_suffix(".branch.safetensors")


@runtime_checkable
class Recipe(Protocol):
    """A claim about models. Its arms are trained and measured alike.

    Attributes:
        name: as the command line and the files name the recipe.
        arms: the models that are compared, by name.
        sizes: one for each of "toy", "small" and "full".
        measures: what ``measure`` gives.
        validation: which examples ``validate`` uses, in words.
    """

    name: str
    arms: Collection[str]
    sizes: Mapping[str, Size]
    measures: Sequence[Measure]
    validation: str

    def build(self, arm: str, size: Size) -> nn.Module:
        """The untrained model on the CPU. Its weights come from PyTorch's global generator, seeded by the caller."""
        ...

    def batch(self, step: int, run: Run, size: Size) -> Batch:
        """The tensors of one step, on the device of the run. They depend on nothing but the arguments."""
        ...

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """The mean loss of a batch in nats: a scalar to differentiate."""
        ...

    def validate(self, model: nn.Module, run: Run, size: Size) -> float:
        """The mean loss in nats on examples that no training sees. The lowest one chooses the learning rate."""
        ...

    def measure(self, model: nn.Module, run: Run, size: Size) -> dict[str, dict[str, float]]:
        """{key of a measure: {place: number}}, in the units that the measures name. Called without gradients."""
        ...


@runtime_checkable
class ScoredRecipe(Recipe, Protocol):
    """A recipe whose sizes may have ``checkpoints``. ``scored`` names the examples and the score in words."""

    scored: str

    def score(self, model: nn.Module, run: Run, size: Size) -> float:
        """The higher, the better, on examples of its own. Called without gradients."""
        ...


@runtime_checkable
class WatchedRecipe(Recipe, Protocol):
    """A recipe whose sizes may be ``watched``."""

    def watch(self, model: nn.Module, run: Run, size: Size, step: int) -> float:
        """A number of the model after so many steps. Called without gradients."""
        ...


@runtime_checkable
class BranchedRecipe(Recipe, Protocol):
    """A recipe some of whose arms go on from the model of another arm, with its optimizer's state.

    Such an arm is trained at the best learning rate of its parent only. It shares the steps up to the branch with the
    parent's training of the same seed.

    Attributes:
        parents: {arm: the arm that it goes on from, which has no parent itself}.
        branch: the share of the steps after which it does.
    """

    parents: Mapping[str, str]
    branch: float


def parent_of(recipe: Recipe, run: Run) -> Run | None:
    """The training that this one goes on from."""
    parent = recipe.parents.get(run.arm) if isinstance(recipe, BranchedRecipe) else None
    return None if parent is None else replace(run, arm=parent)


def branch_step(recipe: Recipe, run: Run) -> int | None:
    """After how many steps a training branches: of an arm from which others go on, and of these others; else None."""
    if not isinstance(recipe, BranchedRecipe) or run.arm not in {*recipe.parents, *recipe.parents.values()}:
        return None
    return round(recipe.branch * run.steps)
