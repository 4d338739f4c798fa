"""What the trained model attends to, in numbers and in one picture, and the table of results."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flash_entmax import __version__, inspection
from flash_entmax.backends import choose
from flash_entmax.show.plot import save_attention

from .model import Transformer
from .settings import DemoSettings
from .text import Passage, even_windows, telling_passage
from .train import Training, precision

PASSAGE_LENGTH = 128
SPARSITY_WINDOWS = 4


@dataclass(frozen=True)
class Sparsity:
    """One layer: mean keys per query of all heads, of the sparsest and of the densest, and its block sparsity."""

    keys_per_query: float
    fewest: float
    most: float
    block_sparsity: float


@dataclass(frozen=True)
class Losses:
    """Bits per byte of validation text, before and after training.

    ``by_frequency`` is the loss of a predictor that knows only how often each byte occurs.
    """

    before: float
    after: float
    by_frequency: float


@torch.no_grad()
def measure_sparsity(model: Transformer, settings: DemoSettings, validation: Tensor) -> tuple[list[Sparsity], int]:
    """The sparsity of each layer over a few validation windows, and the number of queries in a tile."""
    data = even_windows(validation, SPARSITY_WINDOWS, settings.context).to(settings.device)
    with precision(settings.device), inspection.record(model) as calls:
        model(data)
    return [sparsity_of(call) for call in calls], calls[0].support.tile_shape[0]


def sparsity_of(call: inspection.RecordedCall) -> Sparsity:
    keys = call.keys_per_query
    return Sparsity(keys.mean().item(), keys.min().item(), keys.max().item(), call.block_sparsity.mean().item())


@torch.no_grad()
def attention_of(model: Transformer, settings: DemoSettings, passage: Passage) -> Tensor:
    """The attention of a passage to itself: probabilities (layers, heads, length, length)."""
    data = torch.tensor([list(passage.data)], device=settings.device)
    with precision(settings.device), inspection.record(model) as calls:
        model(data)
    heads = range(settings.heads)
    return torch.stack([torch.stack([call.rows(head=head).to_dense() for head in heads]) for call in calls])


def draw(model: Transformer, settings: DemoSettings, validation: Tensor) -> Path:
    """Draw the attention of the telling passage of the validation text."""
    path = settings.out / "attention.png"
    passage = telling_passage(validation, min(PASSAGE_LENGTH, settings.context))
    title = f"The bytes that each head attends to, in one passage of held-out text (alpha {settings.alpha:g})"
    save_attention(attention_of(model, settings, passage), passage.data, passage.position, title, path)
    return path


def conditions(model: Transformer, settings: DemoSettings, training: Training) -> dict[str, str | int | float]:
    on_cuda = settings.device.type == "cuda"
    probe = torch.empty(0, device=settings.device, dtype=torch.bfloat16 if on_cuda else torch.float32)
    return {
        "device": torch.cuda.get_device_name() if on_cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": f"flash-entmax {__version__}, torch {torch.__version__}",
        "implementation": f"{choose(probe.dtype, probe.device, 'auto')}, {str(probe.dtype).removeprefix('torch.')}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": settings.layers,
        "heads": settings.heads,
        "head size": settings.head_size,
        "context": settings.context,
        "batch": settings.batch,
        "alpha": settings.alpha,
        "steps": training.steps,
        "steps planned": settings.steps,
        "seed": settings.seed,
    }


def print_report(
    console: Console, losses: Losses, layers: list[Sparsity], tile: int, speed: float, facts: dict
) -> None:
    context = facts["context"]
    title = f"Attention of the trained model: means over {SPARSITY_WINDOWS} windows of validation text"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column(f"keys per query\n(of {(context + 1) / 2:.0f} visible)", justify="right")
    table.add_column("sparsest to\ndensest head", justify="right")
    table.add_column(f"block sparsity\n({tile} x {tile} tiles)", justify="right")
    for index, layer in enumerate(layers, start=1):
        heads = f"{layer.fewest:.1f} to {layer.most:.1f}"
        table.add_row(str(index), f"{layer.keys_per_query:.1f}", heads, f"{100 * layer.block_sparsity:.0f} %")
    console.print()
    console.print(table)

    summary = Table.grid(padding=(0, 2))
    summary.add_row("validation, bits per byte", f"{losses.before:.2f} before, {losses.after:.2f} after", style="bold")
    summary.add_row("  by frequency of bytes alone", f"{losses.by_frequency:.2f}")
    summary.add_row("training, bytes per second", f"{speed:,.0f}")
    for name, value in facts.items():
        summary.add_row(name, f"{value:,}" if name == "parameters" else str(value))
    console.print(summary, highlight=False)


def write_results(
    path: Path, losses: Losses, layers: list[Sparsity], tile: int, training: Training, seconds: float, facts: dict
) -> None:
    results = {
        "bits_per_byte": asdict(losses),
        "layers": [asdict(layer) for layer in layers],
        "tile": tile,
        "training": asdict(training),
        "seconds": seconds,
        "conditions": facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
