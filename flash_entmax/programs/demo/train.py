"""The training loop, with its progress display, and the validation loss."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy

from .model import Transformer
from .settings import DemoSettings
from .text import even_windows, windows

BITS = 1.0 / math.log(2.0)
PLAIN_LINES = 10
LATE_SHARE = 0.1  # how far the clock may run ahead of the steps until it paces the learning rate


@dataclass(frozen=True)
class Training:
    """What a training did. ``was_cut`` says that the time ran out before the steps."""

    steps: int
    seconds: float
    tokens_per_second: float
    was_cut: bool


def train(model: Transformer, settings: DemoSettings, training: Tensor, console: Console) -> Training:
    """AdamW with a warm-up and a cosine, until the steps or the time run out.

    The steps pace the learning rate, so that a run can be repeated. On a machine that is too slow for all steps, the
    time paces it.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=settings.learning_rate, betas=(0.9, 0.95))
    start, step, elapsed = time.perf_counter(), 0, 0.0
    with progress(console, settings) as show:
        while step < settings.steps and elapsed < settings.seconds:
            along = max((step + 1) / settings.steps, elapsed / settings.seconds - LATE_SHARE)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * pace(along)
            starts = torch.randint(len(training) - settings.context, (settings.batch,), generator=draw)
            loss = next_byte_loss(model, windows(training, starts, settings.context + 1), settings)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            show(step, loss.item() * BITS)
            elapsed = time.perf_counter() - start
    tokens = step * settings.batch * settings.context
    return Training(step, elapsed, tokens / elapsed, step < settings.steps)


def parameter_groups(model: Transformer, weight_decay: float = 0.1) -> list[dict]:
    """Weight decay for the matrices only, and not for the gains of the norms, the embedding or the temperature."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        decays = parameter.dim() == 2 and not name.startswith("embed") and ".temperature." not in name
        (matrices if decays else others).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def pace(along: float, warm_up: float = 0.05) -> float:
    """The learning rate relative to its peak, at the share ``along`` of the training.

    It rises over the share ``warm_up``, then falls by a cosine to a twentieth of the peak.
    """
    if along < warm_up:
        return along / warm_up
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (along - warm_up) / (1 - warm_up))) / 2


def next_byte_loss(model: Transformer, data: Tensor, settings: DemoSettings) -> Tensor:
    """Mean loss in nats per byte, predicted from the bytes in front of it. data is (batch, context + 1).

    On CUDA in bfloat16 autocast.
    """
    data = data.to(settings.device)
    with precision(settings.device):
        logits = model(data[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), data[:, 1:].flatten())


def precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def bits_per_byte(model: Transformer, settings: DemoSettings, validation: Tensor) -> float:
    """The validation loss: the mean over windows that are evenly spaced in the validation text."""
    data = even_windows(validation, settings.validation_windows, settings.context + 1)
    losses = [next_byte_loss(model, part, settings).item() * len(part) for part in data.split(settings.batch)]
    return BITS * sum(losses) / len(data)


def bits_by_frequency(training: Tensor, validation: Tensor) -> float:
    """Bits per byte of a predictor that knows only how often each byte occurs."""
    counts = torch.bincount(training, minlength=256).double() + 1
    expected = torch.bincount(validation, minlength=256).double()
    return float(-(expected * (counts / counts.sum()).log2()).sum() / expected.sum())


@contextmanager
def progress(console: Console, settings: DemoSettings) -> Iterator:
    """Yield show(step, bits per byte). It moves a bar on a terminal, and prints PLAIN_LINES lines elsewhere."""
    if not console.is_terminal:
        every = max(1, settings.steps // PLAIN_LINES)

        def show_line(step: int, bits: float) -> None:
            if step % every == 0 or step == 1:
                console.print(f"  step {step:>5} of {settings.steps}   training loss {bits:.2f} bits per byte")

        yield show_line
        return
    columns = (
        TextColumn("  training"),
        BarColumn(),
        TextColumn("step {task.completed} of {task.total}   loss {task.fields[bits]:.2f} bits per byte"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=settings.steps, bits=8.0)
        yield lambda step, bits: bar.update(task, completed=step, bits=bits)
