"""The demo: train a byte-level transformer with entmax attention on real text, then show what it attends to.

Needs matplotlib and rich: pip install ".[demo]", from a clone.
"""

import shlex
import time
from typing import TYPE_CHECKING

from ..errors import CommandError, make_folder, require
from .settings import DemoSettings

if TYPE_CHECKING:
    from rich.console import Console

CLEAR_FALL = 0.9  # the validation loss after training is at most this times the loss before it


def run(settings: DemoSettings) -> None:
    """Train, measure and draw; with ``generate``, go on with a text as well, or only, where a model is trained."""
    require("demo", "matplotlib", "rich", "safetensors")
    from rich.console import Console

    from . import checkpoint
    from .generate import continue_text
    from .text import read_corpus

    console = Console(highlight=False, markup=False)
    make_folder(settings.out)
    trained = checkpoint.load_trained(settings) if settings.generate else None
    if trained is None:
        train_and_report(settings, console)
    if settings.generate:
        model, settings = trained or checkpoint.load_trained(settings)
        if trained:
            path = settings.out / checkpoint.MODEL_FILE
            console.print(f"the model is {path}, which was trained before", soft_wrap=True)
        continue_text(console, model, settings, read_corpus(settings.text, settings.context).validation)


def train_and_report(settings: DemoSettings, console: "Console") -> None:
    """Read, train, measure and draw. Raises a CommandError, also if the validation loss does not clearly fall."""
    import torch

    from . import checkpoint, report, train
    from .model import Transformer
    from .text import read_corpus

    start = time.perf_counter()
    corpus = read_corpus(settings.text, settings.context)
    console.print(corpus.origin, soft_wrap=True)
    torch.manual_seed(settings.seed)
    model = Transformer(settings.layers, settings.width, settings.heads, alpha=settings.alpha).to(settings.device)
    before = train.bits_per_byte(model, settings, corpus.validation)
    console.print(f"untrained model: {before:.2f} bits per byte on the validation text")

    training = train.train(model, settings, corpus.training, console)
    if training.was_cut:
        console.print(
            f"training was cut off after {training.seconds:.0f} s, at step {training.steps} "
            f"of {settings.steps}: this machine is slow or busy",
            style="yellow",
            soft_wrap=True,
        )
    saved = checkpoint.save(model, settings)
    by_frequency = train.bits_by_frequency(corpus.training, corpus.validation)
    losses = report.Losses(before, train.bits_per_byte(model, settings, corpus.validation), by_frequency)
    layers, tile = report.measure_sparsity(model, settings, corpus.validation)
    picture = report.draw(model, settings, corpus.validation)
    facts = report.conditions(model, settings, training)
    seconds = time.perf_counter() - start
    results = settings.out / "results.json"
    report.write_results(results, losses, layers, tile, training, seconds, facts)
    report.print_report(console, losses, layers, tile, training.tokens_per_second, facts)
    console.print(f"\n{seconds:.0f} s in all; the picture is {picture}, the numbers are {results}", soft_wrap=True)
    command = shlex.join(["flash-entmax", "inspect", str(saved.parent), "--text"])
    console.print(f"to see any text as the model does: {command} FILE", soft_wrap=True)
    if not losses.after <= CLEAR_FALL * before:
        raise CommandError(
            f"the validation loss did not clearly fall: {before:.2f} bits per byte before training, "
            f"{losses.after:.2f} after {training.steps} steps"
        )
