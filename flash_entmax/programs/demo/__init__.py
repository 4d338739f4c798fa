"""The demo: train a byte-level transformer with entmax attention on real text, then show what it attends to.

Needs matplotlib and rich: pip install "flash-entmax[demo]".
"""

import time

from ..errors import CommandError, make_folder, require
from .settings import DemoSettings

CLEAR_FALL = 0.9  # the validation loss after training is at most this times the loss before it


def run(settings: DemoSettings) -> None:
    """Read, train, measure and draw. Raises a CommandError, also if the validation loss does not clearly fall."""
    require("demo", "matplotlib", "rich")
    import torch
    from rich.console import Console

    from . import checkpoint, report, train
    from .model import Transformer
    from .text import read_corpus

    start = time.perf_counter()
    console = Console(highlight=False)
    make_folder(settings.out)
    corpus = read_corpus(settings.text, settings.context)
    console.print(corpus.origin, soft_wrap=True)
    torch.manual_seed(settings.seed)
    model = Transformer(settings.layers, settings.width, settings.heads, alpha=settings.alpha).to(settings.device)
    before = train.bits_per_byte(model, settings, corpus.validation)
    console.print(f"untrained model: {before:.2f} bits per byte on the validation text")

    training = train.train(model, settings, corpus.training, console)
    if training.was_cut:
        console.print(
            f"[yellow]training was cut off after {training.seconds:.0f} s, at step {training.steps} "
            f"of {settings.steps}: this machine is slow or busy",
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
    console.print(f"to see any text as the model does: flash-entmax inspect {saved.parent} --text FILE", soft_wrap=True)
    if not losses.after <= CLEAR_FALL * before:
        raise CommandError(
            f"the validation loss did not clearly fall: {before:.2f} bits per byte before training, "
            f"{losses.after:.2f} after {training.steps} steps"
        )
