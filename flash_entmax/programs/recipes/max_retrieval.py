"""Find the largest among many: does an attention head that learned on a few items still find it among thousands?

Each item has a class and a priority. The answer is the class of the item with the highest priority (Velickovic et al.
2024, arXiv 2410.01104). One attention head looks at all items. It is trained on 5 to 16 of them and tested on up to
131,072. Softmax must fail: every item keeps some probability, and enough items outweigh any single one. Entmax gives
most items exactly zero. SSMax (Nakanishi 2025, arXiv 2501.19399) lets the scores of softmax grow with the number of
items. ASEntmax (arXiv 2506.16640) does the same for entmax.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, softplus

from flash_entmax import entmax_attention

from .recipe import Measure, Run, Size
from .training import TEST_SEED, VALIDATION_SEED, mean_over

CLASSES, WIDTH = 10, 32
FEWEST, MOST = 5, 16  # items in training
TEST_ITEMS = 2**21  # items of all problems that are tested at once


@dataclass(frozen=True)
class MaxRetrievalSize(Size):
    """Tests ``tests`` problems of each of the ``lengths``, in items."""

    lengths: tuple[int, ...]
    tests: int
    _: KW_ONLY
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    sweep_seeds: int = 3


class Finder(nn.Module):
    """One attention head: a random query, items as keys and values, and the class read from what it found."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm = arm
        self.item = nn.Sequential(nn.Linear(CLASSES + 1, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.ask = nn.Sequential(nn.Linear(1, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.answer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES))
        if arm == "SSMax":
            self.growth = nn.Parameter(torch.tensor(1.0))
        if arm == "ASEntmax":
            self.beta, self.gamma = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)
            for parameter in (*self.beta.parameters(), *self.gamma.parameters()):
                nn.init.zeros_(parameter)

    def temperature(self, asked: Tensor, count: int) -> Tensor | float:
        """The factor of the scores among ``count`` items; (batch, 1, 1) if it depends on what is asked."""
        if self.arm == "SSMax":
            return self.growth * math.log(count)
        if self.arm == "ASEntmax":
            return 1.0 + softplus(self.beta(asked)) * math.log(count) ** (2.0 * torch.tanh(self.gamma(asked)))
        return 1.0

    def forward(self, items: Tensor, asked: Tensor) -> Tensor:
        """items (batch, count, classes + 1) and asked (batch, 1) -> logits (batch, classes)."""
        items, asked = self.item(items), self.ask(asked).unsqueeze(1)
        query = self.query(asked) * self.temperature(asked, items.shape[1])
        alpha = 1.5 if "entmax" in self.arm.lower() else 1.0
        heads = (tensor.unsqueeze(1) for tensor in (query, self.key(items), self.value(items)))
        return self.answer(entmax_attention(*heads, alpha=alpha).flatten(1))


def problems(count: int, batch: int, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Items (batch, count, classes + 1), what is asked (batch, 1), and the answers (batch,).

    An item is its class, one-hot, and its priority. What is asked is a random number that says nothing.
    """
    draw = torch.Generator(device).manual_seed(seed)
    classes = torch.randint(CLASSES, (batch, count), generator=draw, device=device)
    priority = torch.rand(batch, count, 1, generator=draw, dtype=torch.float32, device=device)
    asked = torch.rand(batch, 1, generator=draw, dtype=torch.float32, device=device)
    answer = classes.gather(1, priority.squeeze(-1).argmax(1, keepdim=True)).squeeze(1)
    return torch.cat((one_hot(classes, CLASSES).float(), priority), -1), asked, answer


def mean_of_problems(model: Finder, count: int, run: Run, tests: int, numbers_of: Callable, seed: int) -> float:
    """The mean of ``numbers_of(logits, answer)`` over ``tests`` problems of ``count`` items, from ``seed`` on."""
    part = min(tests, max(1, TEST_ITEMS // count))
    parts = (problems(count, part, seed + first, run.device) for first in range(0, tests, part))
    return mean_over(parts, lambda part: numbers_of(model(*part[:2]), part[2]))


class MaxRetrieval:
    name = "max-retrieval"
    arms = ("softmax", "entmax 1.5", "SSMax", "ASEntmax")
    measures = (Measure("accuracy", "accuracy, %", "items"),)
    validation = "16 items, as in training"

    def __init__(self) -> None:
        self.sizes = {
            "toy": MaxRetrievalSize(60, 64, (16, 64), 64, learning_rates=(3e-3,), seeds=1, sweep_seeds=1, workers=1),
            "small": MaxRetrievalSize(3000, 128, (16, 64, 256, 1024, 4096), 512),
            "full": MaxRetrievalSize(5000, 256, (16, 64, 256, 1024, 4096, 16_384, 131_072), 1024),
        }

    def build(self, arm: str, size: MaxRetrievalSize) -> Finder:
        return Finder(arm)

    def batch(self, step: int, run: Run, size: MaxRetrievalSize) -> tuple[Tensor, Tensor, Tensor]:
        seed = run.seed * size.steps + step
        count = FEWEST + int(torch.randint(MOST + 1 - FEWEST, (), generator=torch.Generator().manual_seed(seed)))
        return problems(count, size.batch, seed, run.device)

    def loss(self, model: Finder, items: Tensor, asked: Tensor, answer: Tensor) -> Tensor:
        return cross_entropy(model(items, asked), answer)

    def validate(self, model: Finder, run: Run, size: MaxRetrievalSize) -> float:
        def losses(logits: Tensor, answer: Tensor) -> Tensor:
            return cross_entropy(logits, answer, reduction="none")

        return mean_of_problems(model, MOST, run, 8192, losses, VALIDATION_SEED)

    def measure(self, model: Finder, run: Run, size: MaxRetrievalSize) -> dict[str, dict[str, float]]:
        def right(logits: Tensor, answer: Tensor) -> Tensor:
            return 100.0 * (logits.argmax(-1) == answer)

        return {
            "accuracy": {
                str(count): mean_of_problems(model, count, run, size.tests, right, TEST_SEED) for count in size.lengths
            }
        }


RECIPE = MaxRetrieval()
