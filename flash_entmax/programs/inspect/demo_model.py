"""The model that `flash-entmax demo` trained. It reads bytes."""

from pathlib import Path

import torch
from torch import Tensor

from .settings import ATTENTION, InspectSettings, check_against, check_offset, read_text
from .subject import Subject


def demo_checkpoint(model: str) -> Path | None:
    """The demo's file, if `model` is that file or the folder that holds it; else None."""
    path = Path(model)
    if path.suffix == ".safetensors":
        return path
    inside = path / "model.safetensors"
    return inside if inside.is_file() and not (path / "config.json").exists() else None


def open_demo(settings: InspectSettings) -> "DemoModel":
    from ..demo import checkpoint

    content = read_text(settings.text)
    check_offset(settings, len(content), DemoModel.unit, content)
    model, demo = checkpoint.load(demo_checkpoint(settings.model), settings.device)
    check_against(settings, demo.layers, demo.heads)
    alpha = settings.alpha or (ATTENTION[settings.attention] if settings.attention else None) or demo.alpha
    origin = "as trained" if alpha == demo.alpha else f"trained with {demo.alpha:g}"
    text = content[settings.offset :][: min(settings.tokens, demo.context)]
    ids = torch.tensor([list(text)], device=demo.device)
    subject = DemoModel(settings, model, ids, [letter(byte) for byte in text], origin)
    subject.set_alpha(alpha)
    if demo.context == len(text) < min(settings.tokens, len(content) - settings.offset):
        subject.read += ", all that the model takes at once"
    return subject


class DemoModel(Subject):
    unit = "byte"

    @property
    def vocabulary(self) -> int:
        return self.model.predict.out_features

    def run(self) -> None:
        self.model(self.ids)

    def logits(self, first: int, stop: int) -> Tensor:
        return self.model(self.ids)[0, first:stop]

    def take_softmax(self, implementation: str) -> None:
        self.set_alpha(1.0)

    def set_alpha(self, alpha: float) -> None:
        for block in self.model.blocks:
            block.attention.alpha = alpha


def letter(byte: int) -> str:
    """The character of a printable byte; of any other, its hexadecimal number in angle brackets."""
    return chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else f"⟨{byte:02x}⟩"
