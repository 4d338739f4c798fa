"""The model that `flash-entmax demo` trained. It reads bytes."""

from pathlib import Path

import torch
from torch import Tensor

from .subject import Subject
from .wanted import ATTENTION, Wanted, check_against, check_offset, read_text


def demo_checkpoint(model: str) -> Path | None:
    """The file that the demo wrote, where `model` is it or its folder."""
    path = Path(model)
    if path.suffix == ".pt":
        return path
    inside = path / "model.pt"
    return inside if inside.is_file() and not (path / "config.json").exists() else None


def open_demo(wanted: Wanted) -> "DemoModel":
    from ..demo import checkpoint

    content = read_text(wanted.text)
    check_offset(wanted, len(content), DemoModel.unit, content)
    model, settings = checkpoint.load(demo_checkpoint(wanted.model), wanted.device)
    check_against(wanted, settings.layers, settings.heads)
    alpha = wanted.alpha or (ATTENTION[wanted.attention] if wanted.attention else None) or settings.alpha
    trained = "as trained" if alpha == settings.alpha else f"trained with {settings.alpha:g}"
    text = content[wanted.offset :][: min(wanted.tokens, settings.context)]
    ids = torch.tensor([list(text)], device=settings.device)
    subject = DemoModel(wanted, model, ids, [letter(byte) for byte in text], trained)
    subject.take(alpha)
    if settings.context == len(text) < min(wanted.tokens, len(content) - wanted.offset):
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
        self.take(1.0)

    def take(self, alpha: float) -> None:
        for block in self.model.blocks:
            block.attention.alpha = alpha


def letter(byte: int) -> str:
    """A byte as a letter; in angles, by its number, where it is none by itself."""
    return chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else f"⟨{byte:02x}⟩"
