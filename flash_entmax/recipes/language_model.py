"""A byte-level language model on long documents: what does entmax attention cost at the training length, and what does
it keep beyond it?

Four transformers of 25 million parameters, alike but for their attention, read the same bytes: softmax and entmax 1.5
with rotary positions, softmax and ASEntmax with the positions of NAPE (arXiv 2506.16640). AdaSplash-2 (arXiv
2604.15180) claims that entmax matches softmax at short context and gains at long context. So three things are measured:
the loss on held-out text at the training length; the loss by position in windows of up to eight times that length; and
whether a fact that was planted in the text is found again, by its depth and by the length of the window. For that,
every window, in training too, holds a few facts, lines such as `@kfwq=zmra;`, each of them twice: the second time, what
follows the sign can be known from the first.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..demo.model import Transformer
from ..demo.settings import DemoError
from ..demo.text import Corpus, even_windows, read_corpus
from ..demo.train import precision
from . import RecipeError
from .report import Measure
from .training import mean_over

ARMS = {
    "softmax, RoPE": {"alpha": 1.0, "position": "rope"},
    "entmax 1.5, RoPE": {"alpha": 1.5, "position": "rope"},
    "softmax, NAPE": {"alpha": 1.0, "position": "nape"},
    "ASEntmax, NAPE": {"alpha": 1.5, "position": "nape", "temperature": "adaptive"},
}
VALIDATION = "held-out text at the training length, without planted facts"
MEASURES = (
    Measure("length", "loss, nats per byte", "window, bytes", digits=4),
    Measure("position", "loss, nats per byte", "position in the longest window (up to)", digits=3),
    Measure("found", "planted facts found, %", "window, bytes"),
    Measure("depth", "planted facts found in the longest window, %", "depth, %", logarithmic=False),
)
LINE = 16  # bytes of a slot in which a fact may stand
KEY = VALUE = 4
LETTERS = 26
DEPTHS = (0, 25, 50, 75, 95)  # where the fact stands, in per cent of the window; it is asked for at the end
TOGETHER = 2**17  # bytes that are tested at a time


@dataclass(frozen=True)
class Size:
    """Windows of ``context`` bytes with ``facts`` each; ``windows`` of each of the multiples are tested."""

    steps: int
    batch: int
    context: int
    layers: int
    width: int
    heads: int
    facts: int
    multiples: tuple[int, ...]
    windows: int
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    seeds: int = 3
    sweep_seeds: int = 1
    sweep_steps: int = 100
    workers: int = 1


SIZES = {
    "toy": Size(12, 4, 64, 2, 32, 2, 1, (1, 2), 4, learning_rates=(3e-3,), seeds=1, sweep_steps=12),
    "full": Size(450, 16, 2048, 8, 512, 8, 16, (1, 2, 4, 8), 16),
}


def build(arm: str, size: Size) -> Transformer:
    return Transformer(size.layers, size.width, size.heads, **ARMS[arm])


@cache
def corpus_of(text: Path | None, context: int, device: str) -> Corpus:
    """The training text on the device, so that the windows of a step are made there."""
    try:
        corpus = read_corpus(text, context)
    except DemoError as error:
        raise RecipeError(str(error)) from error
    return Corpus(corpus.training.to(device), corpus.validation, corpus.origin)


def corpus_for(run, size: Size) -> Corpus:
    return corpus_of(run.text, max(size.multiples) * size.context, run.device)


def next_byte_losses(model: Transformer, data: Tensor) -> Tensor:
    """(batch, length + 1) bytes -> (batch, length) losses in nats; on CUDA in bfloat16 autocast."""
    with precision(data.device):
        logits = model(data[:, :-1])
    return cross_entropy(logits.float().mT, data[:, 1:], reduction="none")


def batch(step: int, run, size: Size) -> tuple[Tensor]:
    text = corpus_for(run, size).training
    draw = torch.Generator(run.device).manual_seed(run.seed * size.steps + step)
    starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=draw, device=run.device)
    data = text[starts + torch.arange(size.context + 1, device=run.device)].long()
    slots = torch.rand(size.batch, size.context // LINE, generator=draw, device=run.device).argsort(1)
    for fact in range(size.facts):
        plant(data, slots[:, 2 * fact : 2 * fact + 2], draw)
    return (data,)


def loss(model: Transformer, data: Tensor) -> Tensor:
    return next_byte_losses(model, data).mean()


def plant(data: Tensor, slots: Tensor, draw: torch.Generator) -> Tensor:
    """Write a fact into slots (batch, times) of data, over what stood there; the places (batch, VALUE) of its last."""
    letters = torch.randint(ord("a"), ord("a") + LETTERS, (len(data), KEY + VALUE), generator=draw, device=data.device)
    signs = {sign: letters.new_full((len(data), 1), ord(sign)) for sign in "\n@=;"}
    line = torch.cat((signs["\n"], signs["@"], letters[:, :KEY], signs["="], letters[:, KEY:], signs[";"]), 1)
    places = LINE * slots.unsqueeze(-1) + torch.arange(line.shape[1], device=data.device)
    data.scatter_(1, places.flatten(1), line.repeat(1, slots.shape[1]))
    return places[:, -1, KEY + 3 : KEY + 3 + VALUE]


def windows_of(run, size: Size, length: int, count: int) -> Tensor:
    """(windows, length + 1) of held-out text, evenly spaced."""
    return even_windows(corpus_for(run, size).validation, count, length + 1).to(run.device)


def validate(model: Transformer, run, size: Size) -> float:
    data = windows_of(run, size, size.context, max(size.multiples) * size.windows)
    return mean_over(data.split(max(1, TOGETHER // size.context)), lambda part: next_byte_losses(model, part))


def measure(model: Transformer, run, size: Size) -> dict[str, dict[str, float]]:
    lengths = [size.context * multiple for multiple in size.multiples]
    longest = windows_of(run, size, lengths[-1], size.windows)
    together = max(1, TOGETHER // lengths[-1])
    by_position = torch.cat([next_byte_losses(model, part).double() for part in longest.split(together)]).mean(0)
    ends = [lengths[0] // 4, lengths[0] // 2, *lengths]
    starts = [0, *ends]
    found = {n: {depth: share_found(model, run, size, n, depth) for depth in DEPTHS} for n in lengths}
    return {
        "length": {str(length): loss_at(model, longest, length) for length in lengths},
        "position": {str(end): by_position[start:end].mean().item() for start, end in zip(starts, ends, strict=False)},
        "found": {str(n): sum(found[n].values()) / len(DEPTHS) for n in lengths},
        "depth": {str(depth): share for depth, share in found[lengths[-1]].items()},
    }


def loss_at(model: Transformer, longest: Tensor, length: int) -> float:
    """Mean loss of windows of a length that make up the same text as the longest ones."""
    data = longest.unfold(1, length + 1, length).flatten(0, 1)
    return mean_over(data.split(max(1, TOGETHER // length)), lambda part: next_byte_losses(model, part))


def share_found(model: Transformer, run, size: Size, length: int, depth: int) -> float:
    """Of facts at a depth, asked for at the end of the window, in per cent: all bytes of the value are likeliest."""
    data = windows_of(run, size, length, size.windows)[:, :-1].clone()
    last = length // LINE - 1
    slots = torch.tensor([min(depth * last // 100, last - 1), last], device=data.device).expand(len(data), 2)
    places = plant(data, slots, torch.Generator(data.device).manual_seed(2**40 + depth))

    def right(part: tuple[Tensor, Tensor]) -> Tensor:
        data, places = part
        with precision(data.device):
            predicted = model(data).argmax(-1)
        return 100.0 * (predicted.gather(1, places - 1) == data.gather(1, places)).all(1)

    together = max(1, TOGETHER // length)
    return mean_over(zip(data.split(together), places.split(together), strict=True), right)
