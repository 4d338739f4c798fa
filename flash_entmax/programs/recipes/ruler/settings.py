"""How much the recipe ruler asks at each --size, and what the command line may say instead."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import CommandError, require
from ..settings import RecipeSettings
from .tasks import TASKS

TRAINED_LENGTH, TIMES = 2048, (1, 2, 4, 8, 16)
RULER_THRESHOLD = 85.6  # %: the mean score of Llama2-7B at 4,096 tokens (arXiv 2404.06654)


@dataclass(frozen=True)
class RulerSize:
    """What is asked of which models. All but the last two fields have an option of the same name on the command line.

    Attributes:
        model: folders of Transformers; none for the default model.
        lengths: tokens of a prompt and the room for its answer, ascending. None: TIMES the TRAINED_LENGTH, as far as
            all models read.
        tasks: of TASKS.
        samples: prompts of each task and length, with the seeds 0, 1, ...
        threshold: per cent. The effective length is the longest one with at least this mean score.
        write: a file for the prompts. Then no model is asked.
        tokens: how many are read at a time; a prompt that is longer is read alone.
        is_tiny: whether the default is a random model that reads bytes.
    """

    model: tuple[Path, ...] = ()
    lengths: tuple[int, ...] | None = None
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 64
    threshold: float = RULER_THRESHOLD
    write: Path | None = None
    tokens: int = 65_536
    is_tiny: bool = False


RULER_OPTIONS = ("model", "lengths", "tasks", "samples", "threshold", "write")
RULER_SIZES = {
    "toy": RulerSize(lengths=(1200, 2048), samples=2, tokens=8192, is_tiny=True),
    "small": RulerSize(lengths=(512, 1024), samples=4, tokens=2048),
    "full": RulerSize(),
}


def ruler_size_for(settings: RecipeSettings, given: Mapping[str, Any]) -> RulerSize:
    """The size, with what the command line gave in place of its own. Refuses what cannot be asked."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    size = replace(RULER_SIZES[settings.size], **given)
    if settings.workers is not None:
        raise CommandError(f"ruler asks one model at a time: leave --workers {settings.workers} out")
    if size.samples < 1:
        raise CommandError(f"--samples must be at least 1, got {size.samples}")
    if not 0 < size.threshold <= 100:
        raise CommandError(f"--threshold is per cent, above 0 and at most 100, got {size.threshold:g}")
    ascends(size.lengths)
    for name in ("tasks", "model"):
        if len(set(each := getattr(size, name))) < len(each):
            raise CommandError(f"--{name} names something twice: {' '.join(map(str, each))}")
    for folder in size.model:
        if not is_model(folder) and size.write is None:
            raise CommandError(f"--model {folder}: no folder of a model of Transformers (config.json)")
    if size.write is not None:
        if "threshold" in given:
            raise CommandError(f"--write asks no model: leave --threshold {size.threshold:g} out")
        if len(size.model) > 1:
            raise CommandError(f"--write is for one tokenizer, got --model {' '.join(map(str, size.model))}")
    require("adapt", "transformers", *([] if size.model or size.is_tiny else ["gguf", "accelerate"]))
    return size


def is_model(folder: Path) -> bool:
    """Whether it may have weights. A tokenizer alone is enough for --write."""
    return (folder / "config.json").is_file()


def ascends(lengths: tuple[int, ...] | None) -> None:
    if lengths is not None and (list(lengths) != sorted(set(lengths)) or lengths[0] < 1):
        raise CommandError(f"--lengths must be positive and ascend, got {' '.join(map(str, lengths))}")
