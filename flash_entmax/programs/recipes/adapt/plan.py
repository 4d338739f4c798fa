"""A pretrained model taken from softmax to entmax: what does it cost in loss, and what does it save in keys?

A model of Transformers, by default SmolLM2-135M-Instruct, is trained on with the same batches in several arms:

- softmax, as it was;
- entmax, one arm for each alpha: alpha is held near 1, then rises, and is then at rest (``flash_entmax.adapt``).

Half of the text is English prose, half Python sources; held-out files are apart. Every arm is trained at every rate
with seed 0. The rate with the lowest held-out loss is then trained with the other seeds. Shown are the loss at two
lengths, the keys a query attends to, how dense the attention is by layer, the time of a training step, the speed of
generation, and answers before and after. The best model of each alpha is saved, and a plain ``from_pretrained`` loads
it.

Several alphas make a price list: what each costs in loss, and saves in keys.
"""

import time

from rich.console import Console
from torch import nn

from ...errors import CommandError
from ...files import write_json
from ..results import conditions, load
from ..settings import RecipeSettings
from ..workers import progress
from . import measures, report
from .models import load as load_model
from .models import open_model, save, take_entmax
from .settings import AdaptSize, settings_of_all_runs
from .text import Text, batch_of, texts
from .training import SOFTMAX, AdaptRun, arm_of, train


def run(settings: RecipeSettings, size: AdaptSize) -> None:
    """Train what is not in the results yet; write results, models, tables, a picture and a page."""
    console, start = Console(highlight=False), time.perf_counter()
    path = settings.out / f"adapt-{settings.size}.json"
    own = conditions("adapt", settings) | {"settings": settings_of_all_runs(size)}
    results = load(path, own)
    model, tokenizer = open_model(size)
    text = texts(settings, size, tokenizer)
    found = [part.found for part in text.values()]
    if results.setdefault("text", found) != found:
        raise CommandError(f"{path} has results on other text, {results['text']}, than {found}: take another --out")
    console.print(*results["text"], sep="\n", soft_wrap=True)
    before(model, tokenizer, text, size, settings, results)
    write_json(path, results)

    def perform(runs: list[AdaptRun]) -> None:
        for each in runs:
            if each.key in results["runs"]:
                continue
            with progress(console, f"adapt, {settings.size}: {each.key}") as show:
                trained, numbers = train(
                    model, each, size, lambda step, seed=each.seed: batch_of(text, step, seed, size, settings.device),
                    settings.device, show,
                )  # fmt: skip
            numbers["held_out"] = measures.held_out(trained, text, size, settings.device)
            numbers["validation"] = measures.validation(numbers["held_out"])
            if each.alpha != SOFTMAX:
                keep_the_best(trained, tokenizer, each, numbers, text["prose"], size, settings, results)
            results["runs"][each.key] = numbers
            write_json(path, results)

    alphas = (SOFTMAX, *size.alphas)
    grid = {alpha: [AdaptRun(alpha, rate, 0, size.steps) for rate in size.rates] for alpha in alphas}
    perform([each for runs in grid.values() for each in runs])
    best = {alpha: min(runs, key=lambda each: results["runs"][each.key]["validation"]) for alpha, runs in grid.items()}
    chosen = {
        alpha: [AdaptRun(alpha, each.rate, seed, size.steps) for seed in range(size.seeds)]
        for alpha, each in best.items()
    }
    perform([each for runs in chosen.values() for each in runs])
    results["alphas"] = {arm_of(alpha): alpha for alpha in alphas}
    results["best"] = {arm_of(alpha): each.rate for alpha, each in best.items()}
    results["chosen"] = {arm_of(alpha): [each.key for each in runs] for alpha, runs in chosen.items()}
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - start
    write_json(path, results)
    report.write(console, results, path)


def before(
    model: nn.Module, tokenizer, text: dict[str, Text], size: AdaptSize, settings: RecipeSettings, results: dict
) -> None:
    """Measure the model as it came, and with each alpha at once."""
    found, attention = results.setdefault("before", {}), model.config._attn_implementation
    model.to(settings.device)
    if "softmax" not in found:
        generating = measures.for_generation(model)
        found["softmax"] = {
            "held_out": measures.held_out(model, text, size, settings.device),
            "tokens_per_second": measures.tokens_per_second(generating, tokenizer, text["prose"], size),
            "answers": measures.answers(generating, tokenizer, size),
        }
    for alpha in size.alphas:
        if arm_of(alpha) not in found:
            take_entmax(model, alpha)
            found[arm_of(alpha)] = {"held_out": measures.held_out(model, text, size, settings.device)}
    model.set_attn_implementation(attention)
    model.config.entmax_alpha = None
    model.to("cpu")


def keep_the_best(
    model: nn.Module, tokenizer, each: AdaptRun, numbers: dict, text: Text, size: AdaptSize, settings: RecipeSettings,
    results: dict,
) -> None:  # fmt: skip
    """Save the model if none of its arm had a lower validation loss; load it by the plain call, and generate with it.

    All that is said of a saved model is measured here, so that results do not depend on its folder any more.
    """
    saved = results.setdefault("saved", {})
    known = saved.get(each.arm)
    if known is not None and numbers["validation"] >= results["runs"][known["run"]]["validation"]:
        return
    folder = settings.out / f"adapt-{settings.size}" / each.arm.replace(" ", "-")
    save(model, tokenizer, each.alpha, folder)
    loaded = load_model(folder, settings.device)
    generating = measures.for_generation(loaded)
    saved[each.arm] = {
        "run": each.key,
        "folder": str(folder),
        "page": report.page_of(loaded, tokenizer, text, size, folder, each.arm),
        "tokens_per_second": measures.tokens_per_second(generating, tokenizer, text, size),
        "answers": measures.answers(generating, tokenizer, size),
    }
