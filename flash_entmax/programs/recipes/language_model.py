"""A byte-level language model on long documents: what does entmax attention cost at the training length, and what does
it keep beyond it?

Transformers of 25 million parameters, alike but for their attention, read the same bytes: softmax and entmax 1.5 with
rotary positions; softmax, entmax 1.5 and ASEntmax with the positions of NAPE (arXiv 2506.16640). AdaSplash-2 (arXiv
2604.15180) claims that entmax matches softmax at short context and gains at long context. So this is measured:
the loss on held-out text at the training length; the loss by position in windows of up to eight times that length; and
whether facts that were planted in the text are found again, by depth and by the length of the window. A fact is four
letters that name it and four that follow from these, all drawn at random. The windows of the training hold some, each
in several places, so that from the second on the last four can be known.

A key without any probability has no gradient, and what to look for is learned late. So in the arms of entmax alpha
moves from 1.01, all but softmax, to 1.5 over the first half of the training, as in AdaSplash (arXiv 2502.12082).
"""

from dataclasses import dataclass
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
from .report import Measure
from .runs import Run
from .training import TEST_SEED, mean_over

ARMS = {
    "softmax, RoPE": {"alpha": 1.0, "position": "rope"},
    "entmax 1.5, RoPE": {"alpha": 1.5, "position": "rope"},
    "softmax, NAPE": {"alpha": 1.0, "position": "nape"},
    "entmax 1.5, NAPE": {"alpha": 1.5, "position": "nape"},
    "ASEntmax, NAPE": {"alpha": 1.5, "position": "nape", "temperature": "adaptive"},
}
VALIDATION = "held-out text at the training length, without planted facts"
MEASURES = (
    Measure("length", "loss, nats per byte", "window, bytes", digits=4),
    Measure("position", "loss, nats per byte", "position in the longest window (up to)", digits=3),
    Measure("found", "planted facts found, %", "window, bytes"),
    Measure("depth", "planted facts found in the longest window, %", "depth, %", logarithmic=False),
    Measure("values", "loss on what follows the names of planted facts, nats per byte", "window, bytes", digits=2),
)
TOGETHER = 2**14  # bytes that are tested at a time


@dataclass(frozen=True)
class Size:
    """Windows of ``context`` bytes, in training with ``facts`` in ``times`` places each.

    ``windows`` of each of the ``multiples`` are tested, with ``asked`` facts at each depth. An arm's grid of
    learning rates may grow ``extensions`` times. ``compiled``: torch.compile makes one kernel of what stands between
    the products, in training.
    """

    steps: int
    batch: int
    context: int
    layers: int
    width: int
    heads: int
    facts: int
    times: int
    asked: int
    multiples: tuple[int, ...]
    windows: int
    learning_rates: tuple[float, ...] = (4e-4, 6e-4, 9e-4)
    seeds: int = 3
    sweep_seeds: int = 1
    extensions: int = 0
    workers: int = 3
    compiled: bool = False


TOY = {"learning_rates": (3e-3,), "seeds": 1, "workers": 1}
SMALL = {"learning_rates": (3e-3, 6e-3), "seeds": 1}
SIZES = {
    "toy": Size(12, 4, 128, layers=2, width=32, heads=2, facts=2, times=2, asked=1, multiples=(1, 2), windows=4, **TOY),
    "small": Size(
        600, 4, 256, layers=3, width=96, heads=4, facts=2, times=4, asked=2, multiples=(1, 2, 4, 8), windows=16, **SMALL
    ),
    "full": Size(
        1500,
        4,
        2048,
        layers=5,
        width=640,
        heads=10,
        facts=16,
        times=4,
        asked=8,
        multiples=(1, 2, 4, 8),
        windows=8,
        extensions=2,
        compiled=True,
    ),
}


def build(arm: str, size: Size) -> Transformer:
    return Transformer(size.layers, size.width, size.heads, **ARMS[arm])


@cache
def corpus_of(text: Path | None, context: int, device: str) -> Corpus:
    """The training text on the device, so that the windows of a step are made there."""
    corpus = read_corpus(text, context)
    return Corpus(corpus.training.to(device), corpus.validation, corpus.origin)


def corpus_for(run: Run, size: Size) -> Corpus:
    return corpus_of(run.text, max(size.multiples) * size.context, run.device)


def next_byte_losses(model: Transformer, data: Tensor, alpha: Tensor | None = None) -> Tensor:
    """(batch, length + 1) bytes -> (batch, length) losses in nats; on CUDA in bfloat16 autocast."""
    with precision(data.device):
        logits = model(data[:, :-1], alpha)
    return cross_entropy(logits.float().mT, data[:, 1:], reduction="none")


def batch(step: int, run: Run, size: Size) -> tuple[Tensor] | tuple[Tensor, Tensor]:
    """Windows with planted facts, and alpha as long as it moves."""
    text = corpus_for(run, size).training
    draw = torch.Generator(run.device).manual_seed(run.seed * size.steps + step)
    starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=draw, device=run.device)
    data = text[starts + torch.arange(size.context + 1, device=run.device)].long()
    plant(data, slots_of_training(size.batch, size.context, size.facts, size.times, draw), draw)
    return (data,) if step >= moves_until(run) else (data, alpha_at(step, run))


def moves_until(run: Run) -> int:
    """The step from which on alpha is where it shall be."""
    return run.steps // 2 if ARMS[run.arm]["alpha"] > 1.0 else 0


def alpha_at(step: int, run: Run) -> Tensor:
    annealing = AlphaAnnealing(moves_until(run), end=ARMS[run.arm]["alpha"], device=run.device)
    annealing.load_state_dict({"taken": step})
    return annealing.alpha


def loss(model: Transformer, data: Tensor, alpha: Tensor | None = None) -> Tensor:
    return next_byte_losses(model, data, alpha).mean()


def windows_of(run: Run, size: Size, length: int, count: int) -> Tensor:
    """(windows, length + 1) of held-out text, evenly spaced."""
    return even_windows(corpus_for(run, size).validation, count, length + 1).to(run.device)


def validate(model: Transformer, run: Run, size: Size) -> float:
    data = windows_of(run, size, size.context, max(size.multiples) * size.windows)
    return mean_over(data.split(max(1, TOGETHER // size.context)), lambda part: next_byte_losses(model, part))


def measure(model: Transformer, run: Run, size: Size) -> dict[str, dict[str, float]]:
    lengths = [size.context * multiple for multiple in size.multiples]
    longest = windows_of(run, size, lengths[-1], size.windows)
    together = max(1, TOGETHER // lengths[-1])
    by_position = torch.cat([next_byte_losses(model, part).double() for part in longest.split(together)]).mean(0)
    ends = [lengths[0] // 4, lengths[0] // 2, *lengths]
    starts = [0, *ends]
    found = {length: recall(model, run, size, length) for length in lengths}
    return {
        "length": {str(length): loss_at(model, longest, length) for length in lengths},
        "position": {str(end): by_position[start:end].mean().item() for start, end in zip(starts, ends, strict=False)},
        "found": {str(length): sum(shares.values()) / len(shares) for length, (shares, _) in found.items()},
        "depth": found[lengths[-1]][0],
        "values": {str(length): nats for length, (_, nats) in found.items()},
    }


def loss_at(model: Transformer, longest: Tensor, length: int) -> float:
    """Mean loss of windows of a length that make up the same text as the longest ones."""
    data = longest.unfold(1, length + 1, length).flatten(0, 1)
    return mean_over(data.split(max(1, TOGETHER // length)), lambda part: next_byte_losses(model, part))


def recall(model: Transformer, run: Run, size: Size, length: int) -> tuple[dict[str, float], float]:
    """Where the name of a fact is repeated: how often, by the fact's depth, all that follows is the likeliest, in per
    cent; and the loss on it, nats per byte.
    """
    data = windows_of(run, size, length, size.windows)[:, :-1].clone()
    draw = torch.Generator(data.device).manual_seed(TEST_SEED)
    places = plant(data, slots_of_test(len(data), length, size.asked, draw), draw)
    right, losses = [], []
    together = max(1, TOGETHER // length)
    for part, of_values in zip(data.split(together), places.split(together), strict=True):
        with precision(data.device):
            logits = model(part)
        row = torch.arange(len(part), device=part.device)[:, None, None]
        before, values = logits[row, of_values - 1].float(), part[row, of_values]
        right.append((before.argmax(-1) == values).all(-1).unflatten(1, (len(DEPTHS), size.asked)))
        losses.append(cross_entropy(before.flatten(0, 2), values.flatten(), reduction="none"))
    shares = 100.0 * torch.cat(right).double().mean((0, 2))
    found = {str(depth): share for depth, share in zip(DEPTHS, shares.tolist(), strict=True)}
    return found, torch.cat(losses).double().mean().item()
