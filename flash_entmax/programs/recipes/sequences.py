"""Sort and reverse: can a model that learned on short sequences still do it on ones up to eight times as long?

A sequence is a source of random tokens, a separator, and the answer. The answer has the tokens of the source in order,
or from the last to the first (as in arXiv 2506.16640, with a smaller model and shorter sources). Each token of the
answer depends on one place of the source, or on a count. The longer the source, the more other tokens softmax mixes in.
All arms are the same causal transformer with the positions of NAPE: half of its heads see no positions, half prefer
near tokens. An answer counts if every token is predicted right from the right ones in front of it.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..demo.model import Transformer
from ..demo.train import precision
from .recipe import Measure, Run, Size
from .training import TEST_SEED, VALIDATION_SEED, mean_over

VOCABULARY = 32
SEPARATOR = VOCABULARY
TEST_TOKENS = 2**16  # tokens of all sequences that are tested at once


@dataclass(frozen=True)
class SequencesSize(Size):
    """Trains on sources of ``shortest`` to ``longest`` tokens, and tests ``tests`` of each multiple of the longest."""

    layers: int
    width: int
    heads: int
    shortest: int
    longest: int
    multiples: tuple[int, ...]
    tests: int
    _: KW_ONLY
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)


class Sequences:
    """``answer`` maps sources (batch, length) to answers of that shape. ``steps`` are those of the full size."""

    arms = ("softmax", "entmax 1.5", "ASEntmax")
    measures = (Measure("exact", "exact match, %", "times the longest source in training"),)
    validation = "sources of the longest length in training"

    def __init__(self, name: str, answer: Callable[[Tensor], Tensor], steps: int) -> None:
        self.name, self.answer = name, answer
        self.sizes = {
            "toy": SequencesSize(40, 16, 2, 32, 2, 2, 4, (1, 2), 32, learning_rates=(3e-3,), seeds=1, workers=1),
            "small": SequencesSize(4000, 64, 2, 64, 4, 8, 16, (1, 2, 4, 8), 256),
            "full": SequencesSize(steps, 64, 3, 128, 8, 16, 32, (1, 2, 4, 8), 1024),
        }

    def build(self, arm: str, size: SequencesSize) -> Transformer:
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
        """(batch, 2 length + 1) int64: source, separator, answer."""
        draw = torch.Generator(device).manual_seed(seed)
        source = torch.randint(VOCABULARY, (batch, length), generator=draw, device=device)
        return torch.cat((source, source.new_full((batch, 1), SEPARATOR), self.answer(source)), 1)

    def logits(self, model: Transformer, data: Tensor) -> Tensor:
        """(batch, length, vocabulary) logits of the answer's tokens, each from the tokens in front of it."""
        with precision(data.device):
            return model(data[:, :-1])[:, data.shape[1] // 2 :].float()

    def batch(self, step: int, run: Run, size: SequencesSize) -> tuple[Tensor]:
        seed = run.seed * size.steps + step
        draw = torch.Generator().manual_seed(seed)
        length = int(torch.randint(size.shortest, size.longest + 1, (), generator=draw))
        return (self.problems(length, size.batch, seed, run.device),)

    def loss(self, model: Transformer, data: Tensor) -> Tensor:
        answer = data[:, data.shape[1] // 2 + 1 :]
        return cross_entropy(self.logits(model, data).flatten(0, 1), answer.flatten())

    def mean_of_problems(
        self, model: Transformer, length: int, run: Run, tests: int, numbers_of: Callable, seed: int
    ) -> float:
        """The mean of ``numbers_of(logits, answer)`` over ``tests`` sources of one length, from ``seed`` on."""
        part = min(tests, max(1, TEST_TOKENS // (2 * length)))
        parts = (self.problems(length, part, seed + first, run.device) for first in range(0, tests, part))
        return mean_over(parts, lambda data: numbers_of(self.logits(model, data), data[:, length + 1 :]))

    def validate(self, model: Transformer, run: Run, size: SequencesSize) -> float:
        def losses(logits: Tensor, answer: Tensor) -> Tensor:
            return cross_entropy(logits.mT, answer, reduction="none")

        return self.mean_of_problems(model, size.longest, run, 2 * size.tests, losses, VALIDATION_SEED)

    def measure(self, model: Transformer, run: Run, size: SequencesSize) -> dict[str, dict[str, float]]:
        def right(logits: Tensor, answer: Tensor) -> Tensor:
            return 100.0 * (logits.argmax(-1) == answer).all(1)

        exact = {
            str(n): self.mean_of_problems(model, n * size.longest, run, size.tests, right, TEST_SEED)
            for n in size.multiples
        }
        return {"exact": exact}


SORT = Sequences("sort", lambda source: source.sort(1).values, steps=8000)
REVERSE = Sequences("reverse", lambda source: source.flip(1), steps=16000)
