"""What the command line said after `flash-entmax demo`: the sizes for each kind of machine, and its checks."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.call import NUMBER_ALPHAS
from ..errors import CommandError, device_for


@dataclass(frozen=True)
class DemoSettings:
    """A step trains on ``batch`` windows of ``context`` bytes. Training ends after ``steps`` or ``seconds``."""

    device: torch.device
    out: Path
    text: Path | None
    alpha: float
    context: int
    layers: int
    width: int
    head_size: int
    batch: int
    steps: int
    learning_rate: float
    seconds: float
    validation_windows: int
    seed: int = 0
    generate: bool = False

    @property
    def heads(self) -> int:
        return self.width // self.head_size


MODEL_FILE = "model.safetensors"
SMALLEST = {
    "context": 256,
    "layers": 2,
    "width": 64,
    "head_size": 32,
    "batch": 8,
    "steps": 60,
    "learning_rate": 6e-3,
    "seconds": 20.0,
    "validation_windows": 8,
}
CPU = {
    "context": 512,
    "layers": 4,
    "width": 128,
    "head_size": 32,
    "batch": 4,
    "steps": 200,
    "learning_rate": 3e-3,
    "seconds": 140.0,
    "validation_windows": 24,
}
CUDA = {
    "context": 4096,
    "layers": 8,
    "width": 512,
    "head_size": 64,
    "batch": 8,
    "steps": 1000,
    "learning_rate": 1e-3,
    "seconds": 120.0,
    "validation_windows": 32,
}


def settings_for(
    device: str, out: Path, text: Path | None, alpha: float, steps: int | None, smallest: bool, generate: bool = False
) -> DemoSettings:
    """The sizes that fit the machine. ``device`` is "auto", "cpu" or "cuda"; ``steps`` None: as the sizes say."""
    device = device_for(device)
    lowest, highest = NUMBER_ALPHAS
    if not lowest <= alpha <= highest:
        raise CommandError(
            f"--alpha must be from {lowest} (1 is softmax, nothing sparse to show) to {highest:g}, got {alpha}"
        )
    if steps is not None and steps < 1:
        raise CommandError(f"--steps must be at least 1, got {steps}")
    sizes = SMALLEST if smallest else CUDA if device == "cuda" else CPU
    if generate and steps is not None and (out / MODEL_FILE).exists():
        raise CommandError(
            f"--steps {steps}: with --generate, {out / MODEL_FILE} is not trained again: leave --steps out, or choose "
            "another --out"
        )
    settings = DemoSettings(torch.device(device), out, text, alpha, **sizes, generate=generate)
    return settings if steps is None else replace(settings, steps=steps)
