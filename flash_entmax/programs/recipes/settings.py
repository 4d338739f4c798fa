"""What the command line said after `flash-entmax recipe`, and its checks before any work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from ..errors import CommandError, device_for, require

TRAINED = ("max-retrieval", "sort", "reverse", "copy", "language-model")  # these train models by the plan in sweep.py
TRAINED_OPTIONS = ("arms", "seeds", "rates")
MEASURED = ("sparsity", "training-speed")  # these measure the models of language-model
FITTED = ("mixture",)  # these fit estimators
NAMES = (*TRAINED, *MEASURED, *FITTED)
ADAPT = "adapt"  # takes a pretrained model, needs further packages, and has options of its own
RULER = "ruler"  # asks pretrained models, and has options of its own
READ_TEXT = {"language-model", *MEASURED, ADAPT, RULER}
SIZES = ("toy", "small", "full")  # in seconds, in minutes on a laptop, in minutes on a GPU


@dataclass(frozen=True)
class RecipeSettings:
    """What all recipes take.

    ``device`` is "cpu" or "cuda"; ``text`` is the language model's corpus, or the prose of adapt and ruler. ``workers``
    None: as the size says. What recipes that train take as well: some of the ``arms`` by name, how many ``seeds``, and
    ``rates`` for all arms; None: as the recipe and its size say.
    """

    out: Path
    size: str
    device: str
    text: Path | None = None
    workers: int | None = None
    arms: tuple[str, ...] | None = None
    seeds: int | None = None
    rates: tuple[float, ...] | None = None


def settings_for(
    out: Path, size: str | None, device: str, text: Path | None, workers: int | None, extra: str = "recipes"
) -> RecipeSettings:
    """``device`` may be "auto". A size of None becomes the one that fits the device. ``extra`` is what is needed."""
    require(extra, "matplotlib", "rich", "safetensors", "sklearn")
    device = device_for(device)
    if workers is not None and workers < 1:
        raise CommandError(f"--workers must be at least 1, got {workers}")
    if text is not None and not text.exists():
        raise CommandError(f"--text {text}: no such file or folder")
    return RecipeSettings(out, size or ("full" if device == "cuda" else "small"), device, text, workers)


def of_training(settings: RecipeSettings, given: Mapping[str, Any]) -> RecipeSettings:
    """With what the command line gave of TRAINED_OPTIONS. Each recipe checks its arms."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if given.get("seeds", 1) < 1:
        raise CommandError(f"--seeds must be at least 1, got {given['seeds']}")
    rates = given.get("rates", ())
    if not all(0 < rate < inf for rate in rates):
        raise CommandError(f"--rates must be positive and finite, got {' '.join(f'{rate:g}' for rate in rates)}")
    return replace(settings, **given)
