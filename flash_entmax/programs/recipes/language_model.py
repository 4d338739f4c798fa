"""A byte-level language model on long documents: what does entmax attention cost at the training length, and what does
it keep beyond it?

Transformers of 33 million parameters read the same bytes and differ in their attention: softmax, entmax 1.5, entmax
but for the first layer, and ASEntmax, with rotary positions or those of NAPE (arXiv 2506.16640). All have a gated MLP,
and an RMSNorm behind attention and MLP; one arm of softmax does without that norm, and shows what it does alone.
AdaSplash-2 (arXiv 2604.15180) claims that entmax matches softmax at short context and gains at long context. Four
things test that:

- the loss on held-out text at the training length;
- the loss by position, in windows of up to eight times that length;
- planted facts that are found again, by depth and by the length of the window;
- the loss on planted facts along the training, which falls when a model learns to look up.

A fact is four letters that name it and four that follow, all drawn at random. Training windows hold some facts, each in
several places. From the second place on, the name tells what follows.

A key with probability 0 gets no gradient, so a model that starts sparse learns late what to look for. Alpha therefore
starts at 1.01, which is almost softmax, and moves to 1.5 (arXiv 2502.12082). Arms "from softmax" go on from the model
of softmax, of the same seed, after 60 % of its steps. So they and softmax differ in nothing but what follows.
"""

from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flash_entmax.anneal import AlphaAnnealing

from ..demo.model import Transformer
from ..demo.text import Corpus, even_windows, read_corpus
from ..demo.train import precision
from .planted import DEPTHS, plant, slots_of_test, slots_of_training
from .recipe import Measure, Run, Size
from .training import TEST_SEED, mean_over
from .transformer import transformer
from .watched import noted

ARMS = {
    "softmax, RoPE": {"alpha": 1.0, "position": "rope"},
    "entmax 1.5, RoPE": {"alpha": 1.5, "position": "rope"},
    "entmax 1.5 after layer 1, RoPE": {"alpha": 1.5, "position": "rope", "first_layer_alpha": 1.0},
    "entmax 1.5 from softmax, RoPE": {"alpha": 1.5, "position": "rope"},
    "softmax, NAPE": {"alpha": 1.0, "position": "nape"},
    "softmax without sandwich norm, NAPE": {"alpha": 1.0, "position": "nape", "sandwich_norm": False},
    "entmax 1.5, NAPE": {"alpha": 1.5, "position": "nape"},
    "entmax 1.5 from softmax, NAPE": {"alpha": 1.5, "position": "nape"},
    "ASEntmax, NAPE": {"alpha": 1.5, "position": "nape", "temperature": "adaptive"},
    "ASEntmax from softmax, NAPE": {"alpha": 1.5, "position": "nape", "temperature": "adaptive"},
}
PARENTS = {
    "entmax 1.5 from softmax, RoPE": "softmax, RoPE",
    "entmax 1.5 from softmax, NAPE": "softmax, NAPE",
    "ASEntmax from softmax, NAPE": "softmax, NAPE",
}
BRANCH = 0.6  # share of the steps
# Alpha leaves 1.01 after the first share of the steps, and rests after the second: of a whole training, and of one that
# goes on from another.
MOVES, MOVES_AFTER_BRANCH = (0.2, 0.5), (BRANCH, 0.85)
TEST_BYTES = 2**14  # bytes of all windows that are tested at once


@dataclass(frozen=True)
class LanguageModelSize(Size):
    """Trains on windows of ``context`` bytes, each with ``facts`` facts in ``times`` places.

    Tests ``windows`` windows of each of the ``multiples`` of the context, with ``asked`` facts at each depth.
    ``softmax_rates`` are the learning rates of softmax; ``learning_rates`` are those of the others.
    """

    context: int
    layers: int
    width: int
    heads: int
    facts: int
    times: int
    asked: int
    multiples: tuple[int, ...]
    windows: int
    _: KW_ONLY
    learning_rates: tuple[float, ...] = (4e-4, 6e-4)
    softmax_rates: tuple[float, ...] = (6e-4, 9e-4)
    workers: int = 3
    watched: int = 12

    def rates_of(self, arm: str) -> tuple[float, ...]:
        return self.softmax_rates if ARMS[arm]["alpha"] == 1.0 else self.learning_rates


@cache
def corpus_of(text: Path | None, context: int, device: str) -> Corpus:
    """The corpus, with the training text on the device, where the windows of a step are cut out of it."""
    corpus = read_corpus(text, context)
    return Corpus(corpus.training.to(device), corpus.validation, corpus.origin)


def corpus_for(run: Run, size: LanguageModelSize) -> Corpus:
    return corpus_of(run.text, max(size.multiples) * size.context, run.device)


def next_byte_losses(model: Transformer, data: Tensor, alpha: Tensor | None = None) -> Tensor:
    """(batch, length + 1) bytes -> (batch, length) losses in nats; on CUDA in bfloat16 autocast."""
    with precision(data.device):
        logits = model(data[:, :-1], alpha)
    return cross_entropy(logits.float().mT, data[:, 1:], reduction="none")


def annealing_of(run: Run) -> AlphaAnnealing | None:
    """How alpha moves over the steps of a training; None for softmax."""
    if ARMS[run.arm]["alpha"] == 1.0:
        return None
    hold, end = (round(share * run.steps) for share in (MOVES_AFTER_BRANCH if run.arm in PARENTS else MOVES))
    return AlphaAnnealing(end - hold, end=ARMS[run.arm]["alpha"], shape="geometric", device=run.device, hold=hold)


def moving_alpha(step: int, run: Run) -> Tensor | None:
    """Alpha after so many steps of a training, while it moves; None where it is what it will stay."""
    annealing = annealing_of(run)
    if annealing is None or step >= annealing.last_step:
        return None
    annealing.load_state_dict({"taken": step})
    return annealing.alpha


def windows_of(run: Run, size: LanguageModelSize, length: int, count: int) -> Tensor:
    """(windows, length + 1) int64: bytes of held-out text, evenly spaced."""
    return even_windows(corpus_for(run, size).validation, count, length + 1).to(run.device)


def loss_at(model: Transformer, longest: Tensor, length: int) -> float:
    """Mean loss of windows of ``length`` bytes, cut out of the longest ones."""
    data = longest.unfold(1, length + 1, length).flatten(0, 1)
    return mean_over(data.split(max(1, TEST_BYTES // length)), lambda part: next_byte_losses(model, part))


def recall(
    model: Transformer, run: Run, size: LanguageModelSize, length: int, alpha: Tensor | None = None
) -> tuple[dict[str, float], float]:
    """How well the planted facts of windows of ``length`` bytes are found, where the name of each is repeated.

    Returns ({depth: per cent of the facts whose bytes are all the likeliest}, mean loss of these bytes in nats).
    """
    data = windows_of(run, size, length, size.windows)[:, :-1].clone()
    draw = torch.Generator(data.device).manual_seed(TEST_SEED)
    places = plant(data, slots_of_test(len(data), length, size.asked, draw), draw)
    right, losses = [], []
    windows = max(1, TEST_BYTES // length)
    for part, value_places in zip(data.split(windows), places.split(windows), strict=True):
        with precision(data.device):
            logits = model(part, alpha)
        row = torch.arange(len(part), device=part.device)[:, None, None]
        predicted, values = logits[row, value_places - 1].float(), part[row, value_places]
        right.append((predicted.argmax(-1) == values).all(-1).unflatten(1, (len(DEPTHS), size.asked)))
        losses.append(cross_entropy(predicted.flatten(0, 2), values.flatten(), reduction="none"))
    shares = 100.0 * torch.cat(right).double().mean((0, 2))
    found = {str(depth): share for depth, share in zip(DEPTHS, shares.tolist(), strict=True)}
    return found, torch.cat(losses).double().mean().item()


def one_rate(rate: float) -> dict[str, tuple[float]]:
    return {"learning_rates": (rate,), "softmax_rates": (rate,)}


class LanguageModel:
    name = "language-model"
    arms = ARMS
    validation = "held-out text at the training length, without planted facts"
    measures = (
        Measure("length", "loss, nats per byte", "window, bytes", digits=4),
        Measure("position", "loss, nats per byte", "position in the longest window (up to)", digits=3),
        Measure("found", "planted facts found, %", "window, bytes"),
        Measure("depth", "planted facts found in the longest window, %", "depth, %", logarithmic=False),
        Measure("values", "loss on what follows the names of planted facts, nats per byte", "window, bytes", digits=2),
        Measure(
            "emergence",
            "loss on what follows the names of planted facts, at the training length, nats per byte",
            "steps",
            digits=2,
            logarithmic=False,
        ),
    )
    parents, branch = PARENTS, BRANCH

    def __init__(self) -> None:
        toy = {"layers": 2, "width": 32, "heads": 2, "facts": 2, "times": 2, "asked": 1, "windows": 4}
        small = {"layers": 3, "width": 96, "heads": 4, "facts": 2, "times": 4, "asked": 2, "windows": 16}
        full = {"layers": 5, "width": 640, "heads": 10, "facts": 16, "times": 4, "asked": 8, "windows": 8}
        self.sizes = {
            "toy": LanguageModelSize(
                12, 4, 128, **toy, multiples=(1, 2), **one_rate(3e-3), seeds=1, workers=1, watched=2
            ),
            "small": LanguageModelSize(600, 4, 256, **small, multiples=(1, 2, 4, 8), **one_rate(3e-3), seeds=1),
            "full": LanguageModelSize(12_000, 4, 2048, **full, multiples=(1, 2, 4, 8), extensions=1, compiled="static"),
        }

    def build(self, arm: str, size: LanguageModelSize) -> Transformer:
        return transformer(size.layers, size.width, size.heads, **ARMS[arm])

    def batch(self, step: int, run: Run, size: LanguageModelSize) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        """Windows (batch, context + 1) with planted facts; while alpha moves, alpha as well."""
        text = corpus_for(run, size).training
        draw = torch.Generator(run.device).manual_seed(run.seed * size.steps + step)
        starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=draw, device=run.device)
        data = text[starts + torch.arange(size.context + 1, device=run.device)].long()
        plant(data, slots_of_training(size.batch, size.context, size.facts, size.times, draw), draw)
        alpha = moving_alpha(step, run)
        return (data,) if alpha is None else (data, alpha)

    def loss(self, model: Transformer, data: Tensor, alpha: Tensor | None = None) -> Tensor:
        return next_byte_losses(model, data, alpha).mean()

    def validate(self, model: Transformer, run: Run, size: LanguageModelSize) -> float:
        data = windows_of(run, size, size.context, max(size.multiples) * size.windows)
        return mean_over(data.split(max(1, TEST_BYTES // size.context)), lambda part: next_byte_losses(model, part))

    def watch(self, model: Transformer, run: Run, size: LanguageModelSize, step: int) -> float:
        """The loss on what follows the names of planted facts, at the training length."""
        return recall(model, run, size, size.context, moving_alpha(step, run))[1]

    def measure(self, model: Transformer, run: Run, size: LanguageModelSize) -> dict[str, dict[str, float]]:
        lengths = [size.context * multiple for multiple in size.multiples]
        longest = windows_of(run, size, lengths[-1], size.windows)
        windows = max(1, TEST_BYTES // lengths[-1])
        by_position = torch.cat([next_byte_losses(model, part).double() for part in longest.split(windows)]).mean(0)
        ends = [lengths[0] // 4, lengths[0] // 2, *lengths]
        starts = [0, *ends[:-1]]
        found = {length: recall(model, run, size, length) for length in lengths}
        return {
            "length": {str(length): loss_at(model, longest, length) for length in lengths},
            "position": {
                str(end): by_position[start:end].mean().item() for start, end in zip(starts, ends, strict=True)
            },
            "found": {str(length): sum(shares.values()) / len(shares) for length, (shares, _) in found.items()},
            "depth": found[lengths[-1]][0],
            "values": {str(length): nats for length, (_, nats) in found.items()},
            "emergence": noted(self, run),
        }


RECIPE = LanguageModel()
