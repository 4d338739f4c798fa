"""Long texts with a question at their end: up to which length does a model answer?

The tasks are those of ``tasks.py``, the lengths a training length and multiples of it. Every model is asked the same
questions, and goes on greedily behind the first words of an answer. A score is the share of the answers that occur in
what it wrote. The effective length of a model is the longest one at which its mean over the tasks is at least a
threshold: 85.6 % in RULER (arXiv 2404.06654), or the same share of the model's own mean at the shortest length.

Common and frequent words count all of a text, which may favour dense attention. They are shown and count in any case.
"""

import time
from collections.abc import Iterator

from rich.console import Console

from ...errors import CommandError
from ...files import write_json
from ..results import conditions, load
from ..settings import RecipeSettings
from ..workers import progress
from . import report
from .answers import score, written_behind
from .haystack import NOISE, Haystack, prose
from .models import Asked, lengths_for, models_of
from .prompts import write_prompts
from .report import key_of
from .settings import RulerSize
from .tasks import TASKS, generate, token_ids


def run(settings: RecipeSettings, size: RulerSize) -> None:
    """Ask what is not in the results yet; write results and tables. With ``size.write`` write the prompts, and end."""
    console, start = Console(highlight=False, markup=False), time.perf_counter()
    models = models_of(size)
    lengths = lengths_for(models, size)
    haystack = prose(settings.text) if settings.text else NOISE
    if size.write is not None:
        count = write_prompts(size.write, models[0].tokenizer(), size, lengths, haystack)
        console.print(f"{size.write}: {count:,} prompts", soft_wrap=True)
        return
    path = settings.out / f"ruler-{settings.size}.json"
    results = load(path, conditions("ruler", settings) | {"words": haystack.hash})
    known = results.setdefault("models", {})
    for model in models:
        own = {"files": model.files(), "attention": model.attention}
        if known.setdefault(model.name, own) != own:
            raise CommandError(f"{path} has results of what was in {model.name} before: take another --out")
    earlier = results.get("seconds", 0.0)
    for model in models:
        for _ in ask(model, lengths, size, settings, haystack, results["runs"], console):
            results["seconds"] = earlier + time.perf_counter() - start
            write_json(path, results)
    report.write(console, results, [model.name for model in models], lengths, size, path)


def ask(
    model: Asked, lengths: tuple[int, ...], size: RulerSize, settings: RecipeSettings, haystack: Haystack, runs: dict,
    console: Console,
) -> Iterator[None]:  # fmt: skip
    """Put what is missing of this model into the runs, and yield after each batch of prompts."""
    missing = {}
    for length in lengths:
        for task in size.tasks:
            there = runs.setdefault(key_of(model.name, task, length), {})
            missing[task, length] = [seed for seed in range(size.samples) if str(seed) not in there]
    total, done = sum(map(len, missing.values())), 0
    title = f"ruler, {settings.size}: {model.name}, {total} prompts"
    if not total:
        return
    tokenizer = model.tokenizer()
    for task in size.tasks:  # what cannot be asked is refused before the weights are read
        for length in (lengths[0], lengths[-1]):
            generate(task, tokenizer, length, 0, haystack)
    network = model.model(settings.device)
    with progress(console, title) as show:
        for (task, length), seeds in missing.items():
            for some in batches(seeds, max(1, size.tokens // length)):
                examples = [generate(task, tokenizer, length, seed, haystack) for seed in some]
                prompts = [token_ids(tokenizer, prompt) for prompt, _ in examples]
                texts = written_behind(network, tokenizer, prompts, TASKS[task].room)
                for seed, (_, answers), text in zip(some, examples, texts, strict=True):
                    numbers = {"score": score(answers, text), "answers": answers, "written": text}
                    runs[key_of(model.name, task, length)][str(seed)] = numbers
                done += len(some)
                show(done, total)
                yield


def batches(seeds: list[int], count: int) -> list[list[int]]:
    return [seeds[first : first + count] for first in range(0, len(seeds), count)]
