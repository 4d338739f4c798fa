"""Sort and reverse: does a model that learned on short sequences still do it on ones up to eight times as long?

A source of random tokens, a separator, and the answer: the tokens in order, or from the last to the first (as in arXiv
2506.16640, with a smaller model and shorter sources). Each token of the answer depends on one place of the source,
or on a count, and the longer the source, the more other tokens softmax mixes in. All arms are the same causal
transformer with the positions of NAPE: half of its heads see no positions, half prefer what is near. An answer counts
if every token of it is right, each predicted from the right ones before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..demo.model import Transformer
from ..demo.train import precision
from .report import Measure
from .runs import Run
from .training import TEST_SEED, VALIDATION_SEED, mean_over

VOCABULARY = 32
SEPARATOR = VOCABULARY
TOGETHER = 2**16  # tokens that are tested at a time


@dataclass(frozen=True)
class Size:
    """Sources of ``shortest`` to ``longest`` tokens; ``tests`` of each multiple of the longest."""

    steps: int
    batch: int
    layers: int
    width: int
    heads: int
    shortest: int
    longest: int
    multiples: tuple[int, ...]
    tests: int
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: int = 3
    sweep_seeds: int = 1
    extensions: int = 0
    workers: int = 6


class Sequences:
    """A recipe; ``answer`` makes the target of (batch, length) sources, ``steps`` are those of the full size."""

    ARMS = ("softmax", "entmax 1.5", "ASEntmax")
    MEASURES = (Measure("exact", "exact match, %", "times the longest source in training"),)
    VALIDATION = "sources of the longest length in training"

    def __init__(self, answer: Callable[[Tensor], Tensor], steps: int) -> None:
        self.answer = answer
        self.SIZES = {
            "toy": Size(40, 16, 2, 32, 2, 2, 4, (1, 2), 32, learning_rates=(3e-3,), seeds=1, workers=1),
            "small": Size(4000, 64, 2, 64, 4, 8, 16, (1, 2, 4, 8), 256),
            "full": Size(steps, 64, 3, 128, 8, 16, 32, (1, 2, 4, 8), 1024),
        }

    def build(self, arm: str, size: Size) -> Transformer:
        return Transformer(
            size.layers,
            size.width,
            size.heads,
            vocabulary=VOCABULARY + 1,
            alpha=1.0 if arm == "softmax" else 1.5,
            position="nape",
            temperature="adaptive" if arm == "ASEntmax" else "fixed",
        )

    def problems(self, length: int, batch: int, seed: int, device: str) -> Tensor:
        """(batch, 2 length + 1): source, separator, answer."""
        draw = torch.Generator(device).manual_seed(seed)
        source = torch.randint(VOCABULARY, (batch, length), generator=draw, device=device)
        return torch.cat((source, source.new_full((batch, 1), SEPARATOR), self.answer(source)), 1)

    def logits(self, model: Transformer, data: Tensor) -> Tensor:
        """(batch, length, vocabulary) of the answer's tokens, each from what stands before it."""
        with precision(data.device):
            return model(data[:, :-1])[:, data.shape[1] // 2 :].float()

    def batch(self, step: int, run: Run, size: Size) -> tuple[Tensor]:
        seed = run.seed * size.steps + step
        draw = torch.Generator().manual_seed(seed)
        length = int(torch.randint(size.shortest, size.longest + 1, (), generator=draw))
        return (self.problems(length, size.batch, seed, run.device),)

    def loss(self, model: Transformer, data: Tensor) -> Tensor:
        answer = data[:, data.shape[1] // 2 + 1 :]
        return cross_entropy(self.logits(model, data).flatten(0, 1), answer.flatten())

    def mean_of_problems(self, model: Transformer, length: int, run: Run, tests: int, of, seed: int) -> float:
        part = min(tests, max(1, TOGETHER // (2 * length)))
        parts = (self.problems(length, part, seed + first, run.device) for first in range(0, tests, part))
        return mean_over(parts, lambda data: of(self.logits(model, data), data[:, length + 1 :]))

    def validate(self, model: Transformer, run: Run, size: Size) -> float:
        def losses(logits: Tensor, answer: Tensor) -> Tensor:
            return cross_entropy(logits.mT, answer, reduction="none")

        return self.mean_of_problems(model, size.longest, run, 2 * size.tests, losses, VALIDATION_SEED)

    def measure(self, model: Transformer, run: Run, size: Size) -> dict[str, dict[str, float]]:
        def right(logits: Tensor, answer: Tensor) -> Tensor:
            return 100.0 * (logits.argmax(-1) == answer).all(1)

        exact = {
            str(n): self.mean_of_problems(model, n * size.longest, run, size.tests, right, TEST_SEED)
            for n in size.multiples
        }
        return {"exact": exact}


SORT = Sequences(lambda source: source.sort(1).values, steps=8000)
REVERSE = Sequences(lambda source: source.flip(1), steps=16000)
