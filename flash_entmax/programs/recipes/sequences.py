"""Sort, reverse and copy: can a model that learned on short sequences still do it on ones up to eight times as long?

A sequence is a source of random tokens, a separator, and the answer. The answer has the tokens of the source in order,
from the last to the first, or as they are (arXiv 2506.16640). Each token of the answer depends on one place of the
source, or on a count. The longer the source, the more other tokens softmax mixes in.

All arms are the same causal transformer: the positions of NAPE, where half of the heads see no positions and half
prefer near tokens, a gated MLP, and normal(0, 0.02) as the start of all projections. But for one arm, an RMSNorm stands
behind attention and MLP as well (sandwich norm), as in the paper's models. That arm shows what the norm does alone.

No token marks the beginning, unlike in the paper. In trials models with such a token failed sooner beyond the training
lengths: it gives heads without positions an absolute place, and answers by place end where these lengths end.

An answer counts if every token is predicted right from the right ones in front of it. Single tokens are counted too:
where no whole answer is right, they still tell arms apart.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..demo.model import Transformer
from ..demo.train import precision
from .recipe import AdamW, Measure, Run, Size
from .training import SCORE_SEED, TEST_SEED, VALIDATION_SEED, mean_over
from .transformer import transformer

ARMS = {
    "softmax, pre-norm": {"alpha": 1.0, "sandwich_norm": False},
    "softmax": {"alpha": 1.0, "sandwich_norm": True},
    "entmax 1.5": {"alpha": 1.5, "sandwich_norm": True},
    "ASEntmax": {"alpha": 1.5, "sandwich_norm": True, "temperature": "adaptive"},
}
PLACE = "times the longest source in training"
MULTIPLES = (1, 1.5, 2, 3, 4, 8)
SCORED_MULTIPLE = 2
VOCABULARY = 32
SEPARATOR = VOCABULARY
TEST_TOKENS = 2**16  # tokens of all sequences that are tested at once

WITHOUT_DECAY = AdamW(weight_decay=0.0, betas=(0.9, 0.99), warm_up=0.06)


@dataclass(frozen=True)
class SequencesSize(Size):
    """Trains on sources of ``shortest`` to ``longest`` tokens, and tests ``tests`` of each multiple of the longest.

    ``softmax_rates`` are the learning rates of the softmax arms; ``learning_rates`` are those of the others.
    """

    layers: int
    width: int
    heads: int
    shortest: int
    longest: int
    multiples: tuple[float, ...]
    tests: int
    _: KW_ONLY
    learning_rates: tuple[float, ...] = (3e-3,)
    softmax_rates: tuple[float, ...] = (3e-3,)
    adamw: AdamW = WITHOUT_DECAY
    checkpoints: int = 10

    def rates_of(self, arm: str) -> tuple[float, ...]:
        return self.softmax_rates if ARMS[arm]["alpha"] == 1.0 else self.learning_rates


class Sequences:
    """``answer`` maps sources (batch, length) to answers of that shape. ``small`` and ``full`` are layers and steps."""

    arms = ARMS
    measures = Measure("exact", "whole answers right, %", PLACE), Measure("tokens", "tokens right, %", PLACE)
    validation = "sources of the longest length in training"
    scored = f"tokens right at {SCORED_MULTIPLE} times the longest source, of other draws than those of the tests"

    def __init__(
        self, name: str, answer: Callable[[Tensor], Tensor], *, small: tuple[int, int], full: tuple[int, int]
    ) -> None:
        self.name, self.answer = name, answer
        small_layers, small_steps = small
        full_layers, full_steps = full
        self.sizes = {
            "toy": SequencesSize(40, 16, 2, 32, 2, 2, 4, (1, 1.5, 2), 32, seeds=1, workers=1, checkpoints=2),
            "small": SequencesSize(small_steps, 64, small_layers, 64, 8, 4, 8, MULTIPLES, 512),
            "full": SequencesSize(
                full_steps,
                128,
                full_layers,
                256,
                8,
                32,
                64,
                MULTIPLES,
                1024,
                learning_rates=(4e-4, 8e-4),
                softmax_rates=(1.6e-3, 6.4e-3),
                compiled="dynamic",
            ),
        }

    def build(self, arm: str, size: SequencesSize) -> Transformer:
        options = {"vocabulary": VOCABULARY + 1, "position": "nape"} | ARMS[arm]
        return transformer(size.layers, size.width, size.heads, **options)

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

    def score(self, model: Transformer, run: Run, size: SequencesSize) -> float:
        length = SCORED_MULTIPLE * size.longest
        return self.mean_of_problems(model, length, run, size.tests, right_tokens, SCORE_SEED)

    def measure(self, model: Transformer, run: Run, size: SequencesSize) -> dict[str, dict[str, float]]:
        def mean(length: int, numbers_of: Callable) -> float:
            return self.mean_of_problems(model, length, run, size.tests, numbers_of, TEST_SEED)

        lengths = {f"{multiple:g}": round(multiple * size.longest) for multiple in size.multiples}
        return {
            "exact": {place: mean(length, right_answers) for place, length in lengths.items()},
            "tokens": {place: mean(length, right_tokens) for place, length in lengths.items()},
        }


def right_tokens(logits: Tensor, answer: Tensor) -> Tensor:
    """(batch, length): 100 for each token that is the likeliest, else 0."""
    return 100.0 * (logits.argmax(-1) == answer)


def right_answers(logits: Tensor, answer: Tensor) -> Tensor:
    """(batch,): 100 for each answer without an error, else 0."""
    return right_tokens(logits, answer).amin(1)


# At full size on an H200: 16 models, six at a time, take 8 minutes for copy, of which sort has the size, and 11 for
# reverse.
SORT = Sequences("sort", lambda source: source.sort(1).values, small=(2, 2500), full=(2, 15_000))
REVERSE = Sequences("reverse", lambda source: source.flip(1), small=(3, 2500), full=(6, 8000))
COPY = Sequences("copy", lambda source: source.clone(), small=(2, 2500), full=(2, 15_000))
